"""Sites inside of blocks and modules by path, against plain hooks on one prompt at a time.

Where each site is stands here by hand for every architecture: the hooks of these tests know nothing of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from loaded_models import by_prompt, loaded_from  # noqa: E402 — after the skips
from tiny_models import GROUPED, TINY, random_model, tiny_model  # noqa: E402

from lmprobe_zarr.batch import parse_prompts  # noqa: E402
from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError  # noqa: E402
from lmprobe_zarr.extraction import models as extraction  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute:FutureWarning")]

IDS_PROMPTS = [[7, 9, 11, 30, 41], [12, 5], [9, 8, 7, 6, 5, 4, 33], [31]]
POOLINGS = ("last_token", "mean", "max")


@dataclass(frozen=True)
class Hooked:
    """Where the sites of one architecture are: the list of blocks, and in a block the module whose input each site is."""

    blocks: str
    resid_mid: str | None
    neurons: str | None
    heads: str | None
    # Layers that lack a site.
    without: dict[str, tuple[int, ...]] | None = None


LLAMA = Hooked("layers", "post_attention_layernorm", "mlp.down_proj", "self_attn.o_proj")
SANDWICH = Hooked("layers", "pre_feedforward_layernorm", "mlp.down_proj", "self_attn.o_proj")
MOE = Hooked("layers", "post_attention_layernorm", None, "self_attn.o_proj")
BERT = Hooked("encoder.layer", "attention.output.LayerNorm", "output.dense", "attention.output.dense")
NEOX = Hooked("layers", None, "mlp.dense_4h_to_h", "attention.dense")
FALCON = Hooked("h", None, "mlp.dense_4h_to_h", "self_attention.dense")
BY_KIND = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma": LLAMA, "phi3": LLAMA,
    "gemma2": SANDWICH, "gemma3": SANDWICH,
    "olmo2": Hooked("layers", "mlp", "mlp.down_proj", "self_attn.o_proj"),
    "gpt2": Hooked("h", "ln_2", "mlp.c_proj", "attn.c_proj"),
    "gpt_neox": NEOX,
    "gpt_neox_sequential": Hooked("layers", "post_attention_layernorm", "mlp.dense_4h_to_h", "attention.dense"),
    "opt": Hooked("decoder.layers", "final_layer_norm", "fc2", "self_attn.out_proj"),
    "opt_post_norm": Hooked("decoder.layers", "self_attn_layer_norm", "fc2", "self_attn.out_proj"),
    "phi": Hooked("layers", None, "mlp.fc2", "self_attn.dense"),
    "falcon": FALCON, "falcon_new": FALCON,
    "falcon_alibi": Hooked("h", "post_attention_layernorm", "mlp.dense_4h_to_h", "self_attention.dense"),
    "mixtral": MOE, "qwen2_moe": MOE, "qwen3_moe": MOE,
    "deepseek_v3": Hooked("layers", "post_attention_layernorm", "mlp.down_proj", "self_attn.o_proj", {"neurons": (1, 2, 3)}),
    "bert": BERT, "roberta": BERT, "xlm_roberta": BERT,
}  # fmt: skip


def hooked(model: Any, at: dict[tuple[str, int | None], tuple[str, bool]]) -> list[dict[Any, Any]]:
    """The values of modules, (path, whether its input), one dict per prompt: each prompt by itself, in float64 of what the model gives."""
    found: list[dict[Any, Any]] = []
    for ids in IDS_PROMPTS:
        values: dict[Any, Any] = {}
        handles = []
        for key, (path, given) in at.items():
            module = model.get_submodule(path)

            def before(_: Any, args: Any, kwargs: Any, key: Any = key, values: Any = values) -> None:
                values[key] = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()).clone()

            def after(_: Any, _args: Any, output: Any, key: Any = key, values: Any = values) -> None:
                values[key] = (output if isinstance(output, torch.Tensor) else output[0]).clone()

            handles.append(
                module.register_forward_pre_hook(before, with_kwargs=True) if given else module.register_forward_hook(after)
            )  # fmt: skip
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        found.append({key: value.reshape(len(ids), -1).double().numpy() for key, value in values.items()})
    return found


def captured(model: Any, sites: Any, *, encoder: bool = False, **options: Any) -> list[dict[str, Any]]:
    loaded = loaded_from(model, encoder=encoder, prompts_kind="ids")
    prompts = parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer)
    tokenized = extraction.tokenize(prompts, loaded.tokenizer)
    merged: dict[str, dict[str, Any]] = {}
    for batch in extraction.run(loaded, tokenized, sites=sites, poolings=POOLINGS, keep_tokens=True, **options):
        for digest, values in by_prompt([batch]).items():
            merged.setdefault(digest, {}).update(values)
            merged[digest].setdefault("layers", {}).update(dict.fromkeys((*batch.tokens, *batch.prompts), batch.layers))
    return [merged[digest] for digest in prompts.sha256]


def close(values: Any, right: Any, **where: Any) -> None:
    np.testing.assert_allclose(values, right, rtol=0, atol=1e-5 * max(1e-3, float(np.abs(right).max())), err_msg=str(where))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", sorted(BY_KIND))
def test_sites_by_structure_equal_plain_hooks_one_prompt_at_a_time(kind: str) -> None:
    model, where = tiny_model(kind), BY_KIND[kind]
    paths = {site: path for site in ("resid_mid", "neurons", "heads") if (path := getattr(where, site)) is not None}
    n_layers = model.config.num_hidden_layers
    has = {site: [layer for layer in range(n_layers) if layer not in (where.without or {}).get(site, ())] for site in paths}
    at: dict[tuple[str, int | None], tuple[str, bool]] = {
        (site, layer): (f"{where.blocks}.{layer}.{path}", True) for site, path in paths.items() for layer in has[site]
    }  # fmt: skip
    at |= {("resid", layer): (f"{where.blocks}.{layer}", False) for layer in range(n_layers)}
    right = hooked(model, at)
    for prompt, values in zip(right, captured(model, ("resid", *paths), encoder=TINY[kind].encoder), strict=True):
        for site in ("resid", *paths):
            layers = has.get(site, list(range(n_layers)))
            assert values["layers"][site] == tuple(layers)
            tokens = np.stack([prompt[site, layer] for layer in layers])
            close(values[site], tokens, kind=kind, site=site)
            for pooling, pooled in (("last_token", tokens[:, -1]), ("mean", tokens.mean(1)), ("max", tokens.max(1))):
                close(values[f"{site}_{pooling}"], pooled, kind=kind, site=site, pooling=pooling)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", sorted(kind for kind, where in BY_KIND.items() if None in (where.resid_mid, where.neurons)))
def test_a_site_that_an_architecture_lacks_is_an_error_that_says_why(kind: str) -> None:
    lacking = [site for site in ("resid_mid", "neurons") if getattr(BY_KIND[kind], site) is None]
    for site in lacking:
        with pytest.raises(UnknownArchitectureError, match=f"no '{site}' that is found by structure .*(at once|mixture of experts)"):
            captured(tiny_model(kind), ("resid", site))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", sorted(set(BY_KIND) - {"bert", "roberta", "xlm_roberta", "opt", "opt_post_norm"}))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_show_the_same_modules_as_float32(kind: str, dtype: str) -> None:
    from lmprobe_zarr.batch import Sites
    from lmprobe_zarr.extraction.models.places import places_of

    names = tuple(site for site in ("resid_mid", "neurons", "heads") if getattr(BY_KIND[kind], site) is not None)
    model = tiny_model(kind)
    wide = places_of(loaded_from(model), Sites(names), range(4))
    narrow = places_of(loaded_from(model.to(getattr(torch, dtype))), Sites(names), range(4))
    for site in names:
        assert dict(wide[site].modules) == dict(narrow[site].modules), site
    if "resid_mid" not in names:
        with pytest.raises(UnknownArchitectureError, match="at once"):
            places_of(loaded_from(model), Sites(("resid_mid",)), range(4))


def hybrid() -> Any:
    sizes = {**GROUPED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2}
    rest = {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0}
    return random_model("Qwen3NextModel", "Qwen3NextConfig", **sizes, **rest)


def test_layers_that_lack_a_site_are_left_out_of_it() -> None:
    model = hybrid()
    at: dict[tuple[str, int | None], tuple[str, bool]] = {("heads", i): (f"layers.{i}.self_attn.o_proj", True) for i in (1, 3)}
    at |= {("gate", i): (f"layers.{i}.linear_attn.out_proj", True) for i in (0, 2)}
    at |= {("neurons", i): (f"layers.{i}.mlp.down_proj", True) for i in range(4)}
    sites = {"heads": "heads", "gate": "linear_attn.out_proj:input", "neurons": "neurons", "embed": "embed"}
    for prompt, values in zip(hooked(model, at), captured(model, sites), strict=True):
        for site, layers in (("heads", (1, 3)), ("gate", (0, 2)), ("neurons", (0, 1, 2, 3))):
            assert values["layers"][site] == layers
            close(values[site], np.stack([prompt[site, layer] for layer in layers]), site=site)
            close(values[f"{site}_mean"], np.stack([prompt[site, layer].mean(0) for layer in layers]), site=site)
        assert values["embed"].shape == (len(values["position"]), 32)
    with pytest.raises(InvalidArgumentError, match=r"'heads' is in layers 1, 3 .* none of them is asked for"):
        captured(model, "heads", layers=[0, 2])


PATHS = {
    "q": ("self_attn.q_proj", False, 32), "z": ("self_attn.o_proj", True, 32), "gate": ("mlp.gate_proj", False, 48),
    "pre": ("", True, 32), "normed": ("input_layernorm", False, 32), "act": ("mlp.act_fn", False, 48),
}  # fmt: skip


def test_modules_by_path_equal_plain_hooks_in_one_call_of_several_widths() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    at: dict[tuple[str, int | None], tuple[str, bool]] = {
        (site, layer): (f"model.layers.{layer}{'.' if path else ''}{path}", given)
        for site, (path, given, _) in PATHS.items()
        for layer in range(4)
    }
    at |= {("final_norm", None): ("model.norm", False), ("emb", None): ("model.embed_tokens", False)}
    sites = {site: f"{path}:input" if given else path for site, (path, given, _) in PATHS.items()}
    sites |= {"final_norm": "/model.norm", "emb": "/embed_tokens:output"}
    for prompt, values in zip(hooked(model, at), captured(model, sites), strict=True):
        for site, (_, _, width) in PATHS.items():
            right = np.stack([prompt[site, layer] for layer in range(4)])
            assert right.shape[-1] == width
            close(values[site], right, site=site)
        for site in ("final_norm", "emb"):
            close(values[site], prompt[site, None], site=site)
            close(values[f"{site}_mean"], prompt[site, None].mean(0), site=site)


def test_a_module_with_an_axis_of_heads_gives_them_end_to_end() -> None:
    """Qwen 3 normalises the query of every head, (prompt, token, head, head_dim); four heads and prompts of four tokens change nothing."""
    model = tiny_model("qwen3")
    at: dict[tuple[str, int | None], tuple[str, bool]] = {("q", layer): (f"layers.{layer}.self_attn.q_norm", False) for layer in range(4)}
    for prompt, values in zip(hooked(model, at), captured(model, {"q": "self_attn.q_norm"}), strict=True):
        close(values["q"], np.stack([prompt["q", layer] for layer in range(4)]))


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        ({"z": "self_attn.o_prj"}, InvalidArgumentError, r"has a module 'self_attn.o_prj'; the nearest are 'self_attn.o_proj'"),
        ({"z": "/model.nrm"}, InvalidArgumentError, "no module of 'tiny' has this path; the nearest are .*'model.norm'"),
        ({"z": "/lm_head"}, InvalidArgumentError, "outside of the part .* logits="),
        ({"z": "/model.layers.0.mlp"}, InvalidArgumentError, "inside of a block"),
        ({"z": "/embed_tokens:input"}, UnknownArchitectureError, "is given nothing with a fraction"),
        ({"z": "mlp:in"}, InvalidArgumentError, "no path of a module"),
        ({"z": ""}, InvalidArgumentError, "no path of a module"),
        ({"z": 3}, Exception, "give the path of a module"),
        ({"resid": "mlp"}, InvalidArgumentError, "path of a built-in site"),
        ({"a_mean": "mlp"}, InvalidArgumentError, "ends like a pooling"),
        ({"token_id": "mlp"}, InvalidArgumentError, "name of the format"),
        ({"a b": "mlp"}, InvalidArgumentError, "letters a to z"),
        ({"z": "mlp", "Z": "mlp"}, InvalidArgumentError, "case alone"),
        (("z",), InvalidArgumentError, "unknown site 'z'.*name a module"),
    ],
)
def test_a_path_that_names_nothing_is_an_error_that_says_what_would(sites: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        captured(tiny_model("llama", "AutoModelForCausalLM"), sites)


def test_a_width_that_differs_between_layers_is_an_error_that_names_the_layers() -> None:
    """OpenELM's kind: here by hand, two blocks with a wider MLP."""
    model = tiny_model("llama")
    for layer in (1, 3):
        mlp = model.layers[layer].mlp
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
    with pytest.raises(InvalidArgumentError, match=r"'neurons' of 'tiny' differs between layers \(48 in layers 0, 2; 64 in layers 1, 3\)"):
        captured(model, "neurons")
    at: dict[tuple[str, int | None], tuple[str, bool]] = {("neurons", i): (f"layers.{i}.mlp.down_proj", True) for i in (1, 3)}
    for prompt, values in zip(hooked(model, at), captured(model, "neurons", layers=[1, 3]), strict=True):
        close(values["neurons"], np.stack([prompt["neurons", layer] for layer in (1, 3)]))


class Pooled(torch.nn.Module):  # type: ignore[misc,name-defined]
    """An MLP whose inner module is given one row per prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(32, 32)

    def forward(self, x: Any) -> Any:
        return x + self.inner(x.mean(1))[:, None]


def test_what_has_no_row_for_every_token_is_refused() -> None:
    model = tiny_model("llama")
    for block in model.layers:
        block.mlp = Pooled()
    with pytest.raises(UnknownArchitectureError, match=r"returns \(1, 32\) and \(1, 32\) for .* which is not a row for every"):
        captured(model, {"pool": "mlp.inner"})
    model.layers[0].mlp.unused = torch.nn.Linear(2, 2)
    with pytest.raises(UnknownArchitectureError, match="without calling the module of site 'pool'"):
        captured(model, {"pool": "mlp.unused"})


def test_only_as_many_blocks_are_computed_as_a_site_needs() -> None:
    model = tiny_model("llama")
    ran: list[int] = []
    for number, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    loaded = loaded_from(model, prompts_kind="ids", provenance={"hooks": "count"})
    tokenized = extraction.tokenize(parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    batches = extraction.run(loaded, tokenized, sites={"z": "self_attn.o_proj:input"}, layers=[1], poolings=("mean",))
    ran.clear()
    list(batches)
    assert set(ran) == {0, 1}
    batches = extraction.run(loaded, tokenized, sites={"n": "/norm"}, poolings=("mean",))
    ran.clear()
    list(batches)
    assert set(ran) == {0, 1, 2, 3}


def test_mamba_has_no_heads_and_what_it_adds_is_attn() -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "intermediate_size": 64}
    model = random_model("MambaModel", "MambaConfig", **sizes)
    with pytest.raises(UnknownArchitectureError, match="no 'heads'"):
        captured(model, "heads")
    at: dict[tuple[str, int | None], tuple[str, bool]] = {("x", i): (f"layers.{i}.mixer.out_proj", True) for i in range(2)}
    for prompt, values in zip(hooked(model, at), captured(model, {"x": "mixer.out_proj:input"}), strict=True):
        close(values["x"], np.stack([prompt["x", layer] for layer in range(2)]))
