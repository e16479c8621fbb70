"""Sites of any module in a store: what is found again, what makes another group, which layers have a site."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.store.store import Store

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")

from tiny_models import GROUPED, PROMPTS, SharedModels, random_model, tiny_model, tiny_tokenizer  # noqa: E402 — needs torch

Z = {"z": "self_attn.o_proj:input"}


@pytest.fixture(scope="session")
def saved(tiny_models: SharedModels) -> Callable[[str], Path]:
    return partial(tiny_models, head="AutoModelForCausalLM")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts")


def run(model: Any, acts: Store, prompts: list[str] = PROMPTS, **options: Any) -> lz.ExtractStats:
    return lz.extract(model, prompts, store=acts, device="cpu", progress=False, **options)


@functools.cache
def loaded(model: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def truth(model: Any, path: str, prompt: str, *, given: bool = True) -> Any:
    """What one module is given or returns for one prompt by itself, straight from transformers, (token, width)."""
    whole = loaded(model) if isinstance(model, Path) else model
    found: list[Any] = []
    module = whole.get_submodule(path)
    if given:
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: found.append(output))
    with torch.inference_mode():
        whole(input_ids=torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]))
    handle.remove()
    return found[0][0].double().numpy()


def test_several_widths_in_one_call_are_stored_found_and_pooled_later(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    sites = {"resid": "resid", "neurons": "neurons", **Z, "final_norm": "/model.norm"}
    stats = run(model, acts, sites=sites, pooling=[], keep_tokens=True)
    assert stats.extracted == len(PROMPTS)
    toks = acts.tokens(prompts=PROMPTS)
    assert toks.neurons.dims == ("layer", "token", "neurons_unit")
    assert toks.z.dims == toks.resid.dims == ("layer", "token", "hidden")
    assert toks.final_norm.dims == ("token", "hidden")
    for prompt in PROMPTS[:3]:
        held = toks.sel(prompt=lz.prompt_hash(prompt))
        for site, path in (("neurons", "mlp.down_proj"), ("z", "self_attn.o_proj")):
            for layer in range(4):
                right = truth(model, f"model.layers.{layer}.{path}", prompt)
                np.testing.assert_allclose(held[site].sel(layer=layer).values, right, atol=1e-5)
        np.testing.assert_allclose(held.final_norm.values, truth(model, "model.norm", prompt, given=False), atol=1e-5)
    again = run(model, acts, sites=sites, pooling=["mean", "max"], keep_tokens=True)
    assert (again.extracted, again.derived, again.model_loaded) == (0, len(PROMPTS), False)
    ds = acts.dataset(prompts=PROMPTS)
    for site in sites:
        for number, prompt in enumerate(PROMPTS):
            of_prompt = toks[site].sel(prompt=lz.prompt_hash(prompt))
            np.testing.assert_allclose(ds[f"{site}_mean"].isel(prompt=number).values, of_prompt.mean("token").values, atol=1e-5)
            np.testing.assert_allclose(ds[f"{site}_max"].isel(prompt=number).values, of_prompt.max("token").values)
    assert ds.neurons_mean.dims == ("layer", "prompt", "neurons_unit")
    assert ds.z_mean.attrs["site_path"] == toks.z.attrs["site_path"] == Z["z"]
    acts.compact(progress=False)
    assert acts.tokens(prompts=PROMPTS).z.attrs["site_path"] == Z["z"]
    assert run(model, acts, sites=sites, pooling=["mean", "max"], keep_tokens=True).extracted == 0
    assert acts.verify(progress=False).ok


def test_a_path_of_the_whole_model_and_of_its_body_is_one_module(saved: Callable[[str], Path], acts: Store, runs: list[int]) -> None:
    model = saved("llama")
    run(model, acts, sites={"last": "/model.norm"})
    assert run(model, acts, sites={"last": "/norm"}).extracted == 0
    assert run(model, acts, sites={"last": "/norm"}, perplexity=True).group == run(model, acts, sites={"last": "/model.norm"}).group
    assert len(acts.models()) == 1


def test_another_module_under_the_same_name_goes_into_another_group_and_says_so(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    first = run(model, acts, sites={"resid": "resid", **Z})
    other = {"resid": "resid", "z": "mlp.down_proj:input"}
    with pytest.warns(UserWarning, match=r"holds 'z' of the module 'self_attn.o_proj:input'.*a group of its own"):
        second = run(model, acts, sites=other)
    assert second.group != first.group
    assert second.extracted == len(PROMPTS)
    with pytest.warns(UserWarning, match="a group of its own"):
        assert run(model, acts, sites=other).extracted == 0, "it is found there"
    assert run(model, acts, sites={"resid": "resid", **Z}).extracted == 0
    for group, path in ((first.group, "self_attn.o_proj"), (second.group, "mlp.down_proj")):
        values = acts.dataset(group=group, prompts=PROMPTS[:1]).z_last_token.sel(layer=2).values[0]
        np.testing.assert_allclose(values, truth(model, f"model.layers.2.{path}", PROMPTS[0])[-1], atol=1e-5)
    assert acts.groups()[second.group].provenance["site_z"] == "mlp.down_proj:input"
    with pytest.raises(InvalidArgumentError, match="was asked for, but it holds 'z' of the module"):
        run(model, acts, sites=other, group=first.group)


def test_two_modules_under_one_name_that_two_writers_left_are_never_mixed(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    run(model, acts, PROMPTS[:3], sites={**Z, "resid": "resid"})
    group = next(iter(acts.groups().values()))
    # As another writer would at the same time, who has not seen the first one's part yet.
    from lmprobe_zarr.batch import TokenBatch, prompt_sha256

    values = np.ones((4, 1, 32), np.float32)
    batch = TokenBatch(
        sha256=[prompt_sha256("new")], layers=(0, 1, 2, 3), prompts={"z_last_token": values, "resid_last_token": values},
        site_attributes={"z": {"site_path": "mlp"}},
    )  # fmt: skip
    acts.write(group, batch)
    with pytest.raises(InvalidArgumentError, match="hold 'z_last_token' of different modules"):
        lz.open_store(acts.url).dataset()
    lz.open_store(acts.url).drop(None, ["z_last_token"])
    assert set(lz.open_store(acts.url).dataset().data_vars) == {"resid_last_token"}


def hybrid() -> Any:
    sizes = {**GROUPED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2}
    rest = {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0}
    return random_model("Qwen3NextForCausalLM", "Qwen3NextConfig", **sizes, **rest)


def test_layers_that_lack_a_site_are_not_stored_and_coverage_says_so(tmp_path: Path, acts: Store) -> None:
    folder = tmp_path / "hybrid"
    model = hybrid()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    run(folder, acts, sites=["resid", "heads"], pooling=["mean"], keep_tokens=True)
    toks, covered = acts.tokens(prompts=PROMPTS), acts.coverage(prompts=PROMPTS)
    held = [layer for layer in range(4) if np.isfinite(toks.heads.sel(layer=layer).values).all()]
    assert held == [1, 3]
    assert np.isnan(toks.heads.sel(layer=[0, 2]).values).all(), "nothing missing is zero"
    assert covered.sel(variable="heads", layer=[1, 3]).values.all()
    assert not covered.sel(variable="heads", layer=[0, 2]).values.any()
    assert covered.sel(variable="resid").values.all()
    again = run(folder, acts, sites=["resid", "heads"], pooling=["mean"], keep_tokens=True)
    assert (again.extracted, again.model_loaded) == (0, False), "which layers have it is stored"
    pooled = run(folder, acts, sites=["heads"], pooling=["max"], keep_tokens=True)
    assert (pooled.extracted, pooled.derived) == (0, len(PROMPTS))
    values = acts.dataset(prompts=PROMPTS[:1]).heads_max.sel(layer=3).values[0]
    np.testing.assert_allclose(values, truth(model, "model.layers.3.self_attn.o_proj", PROMPTS[0]).max(0), atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="none of them is asked for"):
        run(folder, acts, sites=["heads"], layers=[0])


def test_heads_are_apart_with_the_stored_number_of_them(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("qwen3")
    run(model, acts, sites="heads", pooling=["mean"], keep_tokens=True)
    ds, toks = acts.dataset(prompts=PROMPTS), acts.tokens(prompts=PROMPTS)
    for array in (ds.heads_mean, toks.heads, toks.chunk({"layer": 1}).heads):
        apart = array.lz.heads()
        assert apart.dims == (*array.dims[:-1], "head", "head_dim")
        assert (apart.sizes["head"], apart.sizes["head_dim"]) == (4, 8)
        np.testing.assert_array_equal(apart.isel(head=2).values, array.values[..., 16:24])
    assert ds.heads_mean.mean("prompt", keep_attrs=False).lz.heads(4).sizes["head"] == 4
    with pytest.raises(InvalidArgumentError, match=r"is not recorded: give it"):
        ds.heads_mean.mean("prompt", keep_attrs=False).lz.heads()
    with pytest.raises(InvalidArgumentError, match="is not 5 heads of one size"):
        ds.heads_mean.lz.heads(5)
    with pytest.raises(InvalidArgumentError, match="num_heads=0 is no number of heads"):
        ds.heads_mean.lz.heads(0)


def test_the_router_is_a_site_too(saved: Callable[[str], Path], acts: Store) -> None:
    run(saved("mixtral"), acts, sites=["resid", "router"])
    assert run(saved("mixtral"), acts, router=True).extracted == 0
    assert acts.tokens(prompts=PROMPTS).router.dims == ("layer", "token", "expert")
    with pytest.raises(UnknownArchitectureError, match="no router"):
        run(saved("llama"), acts, sites=["router"])


def test_the_plan_counts_the_bytes_of_each_width(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    sites = ["resid", "neurons"]
    run(model, acts, PROMPTS[:2], sites=sites, pooling=["mean"])
    plan = lz.plan_extract(model, PROMPTS, store=acts, sites=sites, pooling=["mean"])
    assert plan.nbytes == plan.missing * 4 * (32 + 48) * 4
    assert plan.variables == ("resid_mean", "neurons_mean")


def test_a_column_and_a_site_of_one_name_are_refused(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    with pytest.raises(InvalidArgumentError, match="'z' is a column of coords= and a variable"):
        run(model, acts, sites=Z, keep_tokens=True, coords={"z": [1] * len(PROMPTS)})
    run(model, acts, coords={"z": [1] * len(PROMPTS)})
    with pytest.raises(InvalidArgumentError, match=r"'z' is a column of .*choose another name for the site"):
        run(model, acts, sites=Z, keep_tokens=True, pooling=[])
    run(model, acts, sites={"y": "mlp"}, keep_tokens=True)
    with pytest.raises(InvalidArgumentError, match=r"'y' is a variable of .*choose another name for that column"):
        run(model, acts, coords={"y": [1] * len(PROMPTS)})


def test_list_sites_names_what_extract_takes(saved: Callable[[str], Path], acts: Store) -> None:
    table = lz.list_sites(saved("gpt2"))
    assert table[table.site != ""].site.tolist() == ["resid", "resid_mid", "attn", "mlp", "embed", "neurons", "heads"]
    assert table[table.path == "mlp.c_proj:input"].width.tolist() == [128]
    assert table[table.path == "mlp.c_proj:input"].nbytes.tolist() == [512]
    assert table[table.path == "mlp.c_proj:input"].layers.tolist() == ["0-3"]
    assert set(table[table.layers == ""].path) >= {"/wte", "/wpe", "/ln_f", "/ln_f:input"}
    every = {f"s{number}": path for number, path in enumerate(table[table.site == ""].path)}
    run(saved("gpt2"), acts, PROMPTS[:2], sites=every, pooling=["mean"])
    ds = acts.dataset(prompts=PROMPTS[:2])
    for number, (_, row) in enumerate(table[table.site == ""].iterrows()):
        array = ds[f"s{number}_mean"]
        assert array.shape == ((4,) if row.layers else ()) + (2, row.width), row.path
        assert np.isfinite(array.values).all()
    model = hybrid()
    listed = lz.list_sites(model)
    assert listed[listed.site == "heads"].layers.tolist() == ["1, 3"]
    assert listed[listed.path == "linear_attn.out_proj:input"].layers.tolist() == ["0, 2"]
    assert listed[listed.path == "/model.norm"].width.tolist() == [32]


def test_modules_of_a_block_that_is_called_for_every_layer_are_listed(acts: Store) -> None:
    config = {"vocab_size": 300, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = random_model("AlbertModel", "AlbertConfig", **config, intermediate_size=48, max_position_embeddings=128)
    listed = lz.list_sites(model)
    path = "albert_layers.0.attention.query"
    assert listed[listed.path == path].layers.tolist() == ["0-2"]
    lz.extract(
        model, PROMPTS, store=acts, sites={"q": path}, pooling="mean", layers=[2], name="m", tokenizer=tiny_tokenizer(), progress=False
    )
    kept: list[Any] = []
    module = model.encoder.albert_layer_groups[0].get_submodule(path)
    handle = module.register_forward_hook(lambda _, _args, out: kept.append(out[0].mean(0)))
    with torch.no_grad():
        model(input_ids=torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]]))
    handle.remove()
    np.testing.assert_allclose(acts.dataset(prompts=PROMPTS[:1]).q_mean.values[0, 0], kept[2].numpy(), atol=1e-5)


def test_sites_of_blocks_that_share_their_modules_are_found_in_every_layer(acts: Store) -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    blocks = model.model.layers
    blocks[2].mlp, blocks[3].self_attn = blocks[0].mlp, blocks[1].self_attn
    sites = {"resid_mid": "post_attention_layernorm", "neurons": "mlp.down_proj", "heads": "self_attn.o_proj"}
    lz.extract(model, PROMPTS, store=acts, sites=list(sites), pooling="mean", name="m", tokenizer=tiny_tokenizer(), progress=False)
    kept: dict[str, list[Any]] = {site: [] for site in sites}
    modules = {id(block.get_submodule(path)): (site, block.get_submodule(path)) for block in blocks for site, path in sites.items()}
    handles = [
        module.register_forward_pre_hook(lambda _, args, site=site: kept[site].append(args[0][0].mean(0)))
        for site, module in modules.values()
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]]))
    for handle in handles:
        handle.remove()
    ds = acts.dataset(prompts=PROMPTS[:1])
    for site, values in kept.items():
        np.testing.assert_allclose(ds[f"{site}_mean"].values[:, 0], torch.stack(values).numpy(), atol=1e-5)


def test_the_command_line_takes_paths_and_parts_and_lists_sites(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from command_line import call, call_json

    model, prompts, url = str(saved("llama")), tmp_path / "p.txt", str(tmp_path / "acts")
    prompts.write_text("the cat sat\non the mat\n", encoding="utf-8")
    over = '{"all": "all", "tail": {"position": [-2, null]}}'
    extract = ("extract", model, str(prompts), "--store", url, "--pooling", "mean")
    code, _, err = call(capsys, *extract, "--sites", "resid,z=self_attn.o_proj:input", "--over", over)
    assert code == 0, err
    ds = lz.open_store(url).dataset()
    assert set(ds.data_vars) == {"resid_mean", "resid_mean_tail", "z_mean", "z_mean_tail"}
    right = truth(Path(model), "model.layers.1.self_attn.o_proj", "the cat sat")[-2:].mean(0)
    np.testing.assert_allclose(ds.z_mean_tail.sel(layer=1, prompt=lz.prompt_hash("the cat sat")).values, right, atol=1e-5)
    code, out, _ = call(capsys, "sites", model)
    assert code == 0
    assert "self_attn.o_proj:input" in out
    assert "(token, 48)" in out
    assert call_json(capsys, "sites", model)[0] == {"site": "resid", "path": "", "layers": "0-3", "width": 32, "nbytes": 128}
    code, _, err = call(capsys, *extract, "--over", "assistant")
    assert code == 1
    assert "roles are of chats" in err


def test_what_extract_wrote_of_any_site_is_swept(saved: Callable[[str], Path], tmp_path: Path, acts: Store) -> None:
    model, prompts, label = saved("qwen3"), [f"a text of number {i}" for i in range(20)], [0, 1] * 10
    run(model, acts, prompts, sites=["neurons", "heads"], pooling=["mean"], coords={"label": label})
    ds = acts.dataset(prompts=prompts)
    assert lz.fit_directions(ds.neurons_mean, "label", "ridge").coef.dims == ("layer", "neurons_unit")
    one = lz.sweep(ds.heads_mean.lz.heads().isel(head=1), "label", "ridge", cv=2)
    right = lz.sweep(ds.heads_mean.load()[..., 8:16], "label", "ridge", cv=2)
    np.testing.assert_array_equal(one.accuracy.values, right.accuracy.values)
    folder = tmp_path / "hybrid"
    made = hybrid()
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    other = lz.open_store(tmp_path / "other")
    run(folder, other, prompts, sites=["resid", "heads"], pooling=["mean"], coords={"label": label})
    with pytest.warns(UserWarning, match=r"'heads_mean' is not stored in the layers \[0, 2\], which are left out"):
        scores = lz.sweep(other.dataset(prompts=prompts).heads_mean, "label", "ridge", cv=2)
    assert scores.layer.values.tolist() == [1, 3]
