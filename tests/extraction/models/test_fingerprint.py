"""The fingerprint of a model in memory: what a pass leaves behind does not count, and weights of classes of their own do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import PROMPTS, tiny_model, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import DeviceMemoryError, InvalidArgumentError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

from lmprobe_zarr.extraction.models.fingerprint import model_fingerprint  # noqa: E402

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(5, 20)[None]


def recurrent() -> Any:
    torch.manual_seed(0)
    types = ["recurrent", "recurrent", "attention"]
    options = {**SMALL, "num_key_value_heads": 1, "lru_width": 32, "head_dim": 8, "attention_window_size": 8, "block_types": types}
    return transformers.RecurrentGemmaModel(transformers.RecurrentGemmaConfig(**options)).eval()


def rwkv() -> Any:
    torch.manual_seed(0)
    return transformers.RwkvModel(transformers.RwkvConfig(**SMALL, attention_hidden_size=32, rescale_every=2)).eval()


def causal() -> Any:
    return tiny_model("llama", "AutoModelForCausalLM")


def forward(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=IDS)


def long_after_short(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=IDS[:, :3])
        model(input_ids=torch.arange(5, 70)[None])


def generate(model: Any) -> None:
    model.generate(IDS, max_new_tokens=2, do_sample=False)


def generate_with_a_static_cache(model: Any) -> None:
    model.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)


def checkpointing(model: Any) -> None:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def gradients(model: Any) -> None:
    model.train()
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()


def compiled_in_place(model: Any) -> None:
    model.compile()


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("make", "use"),
    [
        (recurrent, forward), (recurrent, long_after_short), (rwkv, forward), (causal, forward), (causal, generate),
        (causal, generate_with_a_static_cache), (causal, checkpointing), (causal, gradients), (causal, compiled_in_place),
    ],
)  # fmt: skip
def test_what_is_left_in_a_model_by_its_use_is_not_in_its_key(make: Any, use: Any) -> None:
    model = make()
    first = model_fingerprint(model)
    use(model)
    assert model_fingerprint(model) == first
    assert model_fingerprint(make()) == first
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1
    assert model_fingerprint(model) != first


def test_the_fingerprint_leaves_a_model_as_it_is_after_its_first_pass() -> None:
    model = rwkv()
    forward(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model_fingerprint(model)
    assert model.layers_are_rescaled
    assert not model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_has_run_is_found_again_and_one_of_its_groups_stays_one(tmp_path: Path) -> None:
    for number, (make, modules) in enumerate([(recurrent, {"layers": "layers"}), (rwkv, {"layers": "blocks"})]):
        model, store = make(), lz.open_store(tmp_path / str(number))
        options: dict[str, Any] = {"store": store, "name": "m", "tokenizer": tiny_tokenizer(), "modules": modules, "progress": False}
        assert [lz.extract(model, PROMPTS, **options).found for _ in range(2)] == [0, len(PROMPTS)]
        assert len(store.groups()) == 1


# ---------------------------------------------------------------- weights that are made of other tensors


class Packed(torch.Tensor):  # type: ignore[name-defined,misc]
    """A weight in 8 bits that can be looked at, detached and multiplied with, and nothing else."""

    whole: Any
    scale: Any
    zero: float

    @staticmethod
    def __new__(cls, whole: Any, scale: Any, zero: float = 0.0) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)  # type: ignore[no-any-return]

    def __init__(self, whole: Any, scale: Any, zero: float = 0.0) -> None:
        self.whole, self.scale, self.zero = whole, scale, zero

    def __tensor_flatten__(self) -> Any:
        return ["whole", "scale"], {"zero": self.zero}

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            weight = args[1]
            return torch.nn.functional.linear(args[0], (weight.whole.float() - weight.zero) * weight.scale, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].whole, args[0].scale, args[0].zero)
        raise NotImplementedError(f"{cls.__name__} does not support {function}")


class Sealed(Packed):
    """The same without a way to its parts."""

    __tensor_flatten__ = None  # type: ignore[assignment]


def packed(kind: type[Packed] = Packed, zero: float = 0.0) -> Any:
    model = tiny_model("llama")
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            scale = part.weight.detach().abs().max() / 127
            whole = (part.weight.detach() / scale).round().to(torch.int8)
            part.weight = torch.nn.Parameter(kind(whole, scale, zero), requires_grad=False)
    return model


def test_a_model_of_packed_weights_is_extracted_as_it_computes(tmp_path: Path) -> None:
    model, store = packed(), lz.open_store(tmp_path)
    options: dict[str, Any] = {"store": store, "name": "m", "tokenizer": tiny_tokenizer(), "keep_tokens": True, "progress": False}
    lz.extract(model, PROMPTS, **options)
    assert lz.extract(model, PROMPTS, **options).found == len(PROMPTS)
    for prompt in PROMPTS:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]), output_hidden_states=True)
        kept = store.tokens("m").resid.sel(layer=2, prompt=prompt_hash(prompt)).values
        np.testing.assert_allclose(kept, out.hidden_states[3][0].numpy(), atol=1e-5)


def by_torchao(model: Any, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, config)())


def by_quanto(model: Any, bits: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=getattr(quanto, bits))
    quanto.freeze(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quantise", "how"),
    [(by_torchao, "Int8WeightOnlyConfig"), (by_torchao, "Float8WeightOnlyConfig"), (by_quanto, "qint8"), (by_quanto, "qint4")],
)
def test_a_model_quantised_by_a_package_is_extracted_as_it_computes(quantise: Any, how: str, tmp_path: Path) -> None:
    def make() -> Any:
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        quantise(model, how)
        return model

    model, store = make(), lz.open_store(tmp_path)
    options: dict[str, Any] = {"store": store, "name": "m", "tokenizer": tiny_tokenizer(), "keep_tokens": True, "progress": False}
    lz.extract(model, PROMPTS, **options)
    assert lz.extract(make(), PROMPTS, **options).found == len(PROMPTS)
    assert "model_code" not in next(iter(store.groups().values())).provenance
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]]), output_hidden_states=True)
    kept = store.tokens("m").resid.sel(layer=2, prompt=prompt_hash(PROMPTS[0])).values
    np.testing.assert_allclose(kept, out.hidden_states[3][0].numpy(), atol=1e-4)


def test_every_number_of_a_packed_weight_is_in_the_key() -> None:
    first = model_fingerprint(packed())
    assert model_fingerprint(packed()) == first
    scaled, whole = packed(), packed()
    scaled.layers[1].mlp.up_proj.weight.scale.mul_(2)
    whole.layers[1].mlp.up_proj.weight.whole[0, 0] += 1
    assert len({first, model_fingerprint(scaled), model_fingerprint(whole), model_fingerprint(packed(zero=1.0))}) == 4


def test_a_weight_whose_values_cannot_be_read_is_refused_in_words() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"weight 'layers\.0\.self_attn\.q_proj\.weight' is a .*Sealed, whose values cannot be read"
    ):
        model_fingerprint(packed(Sealed))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_too_little_memory_for_a_weight_is_no_weight_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("lmprobe_zarr.extraction.models.tensor_bits._chunk_sums", fail)
    with pytest.raises(DeviceMemoryError, match=r"the weight '.*' cannot be read, because 'cpu' has too little free memory"):
        model_fingerprint(packed())


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.array([0.5, 1]), torch.tensor([0.5]), {"a": [0.5]}, (0.5, None), np.array(["a", 1.0], object)]
)
def test_numbers_beside_the_weights_are_in_the_key(value: Any) -> None:
    model = tiny_model("llama")
    seen = {model_fingerprint(model)}
    model.layers[0].mlp.extra = value
    seen |= {model_fingerprint(model), model_fingerprint(model)}
    assert len(seen) == 2


def test_a_model_on_the_device_meta_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaModel(tiny_model("llama").config)
    with pytest.raises(InvalidArgumentError, match="is on the meta device, where it has no values"):
        lz.extract(model, PROMPTS, name="m", tokenizer=tiny_tokenizer(), progress=False)


def test_the_own_forward_on_a_module_changes_nothing_and_another_does() -> None:
    model = tiny_model("llama")
    first = model_fingerprint(model)
    block = model.layers[1]
    block.forward = block.forward  # as transformers 4 leaves it
    assert model_fingerprint(model) == first
    block.forward = model.layers[2].forward
    assert model_fingerprint(model) != first
    block.forward = lambda *given, **named: type(block).forward(block, *given, **named)
    assert model_fingerprint(model) != first


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20, 1 << 22])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_digest_of_a_tensor_is_that_of_plain_integers_however_many_are_summed_at_a_time(
    step: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprobe_zarr.extraction.models import tensor_bits

    monkeypatch.setattr(tensor_bits, "CACHED", step)
    monkeypatch.setattr(tensor_bits, "CHUNK", 1 << 12)
    values = (torch.randn(5, 1237, generator=torch.Generator().manual_seed(0)) * 50).to(getattr(torch, dtype))
    digest = tensor_bits.TensorBits().digest("w", values, lambda _name, value: value)
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(raw, "<i4" if len(raw) % 4 == 0 else "u1").tolist()
    sums = []
    for start in range(0, len(words), 1 << 12):
        total = 0
        for place, word in enumerate(words[start : start + (1 << 12)], 1):
            spread = place * 0x9E3779B97F4A7C15 % 2**64
            total += word * (((spread ^ spread >> 30) * 0xBF58476D1CE4E5B9 % 2**64) | 1)
        sums.append((total + 2**63) % 2**64 - 2**63)
    assert digest[2] == hashlib.sha256(np.array(sums, "<i8").tobytes()).hexdigest()
