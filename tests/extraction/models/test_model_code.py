"""The provenance field of a model's code: nothing for a plain model, and another value for whatever computes otherwise."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import PROMPTS, save_tiny, tiny_model, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

from lmprobe_zarr.extraction.models.fingerprint import ATTRIBUTES_VOLATILE  # noqa: E402
from lmprobe_zarr.extraction.models.model_code import code_of_named, code_of_object  # noqa: E402

ONE, FIVE = 1.0, 5.0


def code_of(model: Any) -> str | None:
    return code_of_object(model, skipped=ATTRIBUTES_VOLATILE)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("code") / "tiny-llama")


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mixtral", "bert", "deepseek_v3", "falcon_new"])
@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForCausalLM"])
def test_a_plain_model_has_no_such_field(kind: str, head: str) -> None:
    model = tiny_model(kind, head)
    assert code_of(model) is None
    assert code_of_named(model.config.to_dict()) is None
    with torch.no_grad():
        model(input_ids=torch.arange(5, 20)[None])
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert code_of(model) is None


# ---------------------------------------------------------------- what is replaced for every model of a type


def modelling() -> Any:
    from transformers.models.llama import modeling_llama

    return modeling_llama


def adding(number: float) -> Callable[..., Any]:
    original = modelling().LlamaDecoderLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) + number

    return forward


def adding_by_default(number: float) -> Callable[..., Any]:
    original = modelling().LlamaDecoderLayer.forward

    def forward(self: Any, *args: Any, _by: float = number, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) + _by

    return forward


def adding_by_a_global(number: float) -> Callable[..., Any]:
    space: dict[str, Any] = {"NUMBER": number, "original": modelling().LlamaDecoderLayer.forward, "__name__": "__main__"}
    exec("def forward(self, *args, **kwargs):\n    return original(self, *args, **kwargs) + NUMBER", space)  # noqa: S102
    made: Callable[..., Any] = space["forward"]
    return made


def adding_by_a_constant(number: float) -> Callable[..., Any]:
    space: dict[str, Any] = {"original": modelling().LlamaDecoderLayer.forward, "__name__": "__main__"}
    exec(f"def forward(self, *args, **kwargs):\n    return original(self, *args, **kwargs) + {number}", space)  # noqa: S102
    made: Callable[..., Any] = space["forward"]
    return made


def adding_by_a_tensor(number: float) -> Callable[..., Any]:
    original, direction = modelling().LlamaDecoderLayer.forward, torch.full((32,), number)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) + direction

    return forward


def adding_by_a_function_inside(number: float) -> Callable[..., Any]:
    original = modelling().LlamaDecoderLayer.forward

    def inner() -> float:
        return number

    def between(hidden: Any) -> Any:
        return hidden + inner()

    return lambda self, *args, **kwargs: between(original(self, *args, **kwargs))


def adding_in_disguise(number: float) -> Callable[..., Any]:
    original = modelling().LlamaDecoderLayer.forward
    return functools.wraps(original)(lambda self, *args, **kwargs: original(self, *args, **kwargs) + number)


def adding_under_no_grad(number: float) -> Callable[..., Any]:
    return torch.no_grad()(adding(number))  # type: ignore[no-any-return]


class Shift:
    def __init__(self, number: float) -> None:
        self.number, self.calls = number, 0

    def __call__(self, hidden: Any) -> Any:
        self.calls = self.calls + 1
        return hidden + self.number


def adding_by_an_object(number: float) -> Callable[..., Any]:
    original, shift = modelling().LlamaDecoderLayer.forward, Shift(number)
    return lambda self, *args, **kwargs: shift(original(self, *args, **kwargs))


def adding_by_an_array(number: float) -> Callable[..., Any]:
    original, settings = modelling().LlamaDecoderLayer.forward, {"by": [np.array([number])]}
    return lambda self, *args, **kwargs: original(self, *args, **kwargs) + float(settings["by"][0][0])


WAYS = [
    adding, adding_by_default, adding_by_a_global, adding_by_a_constant, adding_by_a_tensor, adding_by_a_function_inside,
    adding_in_disguise, adding_under_no_grad, adding_by_an_object, adding_by_an_array,
]  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_is_defined_again_with_another_number_is_another_model(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    config = model.config.to_dict()
    found = set()
    for number in (ONE, FIVE, ONE):
        with monkeypatch.context() as patch:
            patch.setattr(modelling().LlamaDecoderLayer, "forward", way(number))
            found |= {(code_of(model), code_of_named(config))}
            with torch.no_grad():
                model(input_ids=torch.arange(5, 20)[None])
            found |= {(code_of(model), code_of_named(config))}
    assert len(found) == 2
    assert all("LlamaDecoderLayer.forward" in str(value) for pair in found for value in pair)
    assert code_of(model) is None
    assert code_of_named(config) is None


def test_code_with_other_comments_and_other_lines_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = tiny_model("llama"), set()
    for text in ("def forward(self, x):\n    return x + 1", "\n\n# moved\ndef forward(self, x):  # and noted\n    return x + 1"):
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(text, space)  # noqa: S102
        with monkeypatch.context() as patch:
            patch.setattr(modelling().LlamaMLP, "forward", space["forward"])
            found.add(code_of(model))
    assert len(found) == 1
    assert None not in found


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(holder)[name]
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def without_rotation(query: Any, key: Any, *_: Any, **__: Any) -> Any:
    return query, key


def twice(hidden: Any, *_: Any, **__: Any) -> Any:
    return hidden * 2


def replacements() -> dict[str, tuple[Any, str, Any]]:
    from transformers import activations, masking_utils
    from transformers.integrations import sdpa_attention
    from transformers.models.glm import modeling_glm
    from transformers.models.gpt2 import modeling_gpt2

    llama = modelling()
    return {
        "a function of the modelling file": (llama, "apply_rotary_pos_emb", without_rotation),
        "a function of another modelling file": (llama, "apply_rotary_pos_emb", modeling_glm.apply_rotary_pos_emb),
        "an object instead of a function": (llama, "apply_rotary_pos_emb", Shift(1.0)),
        "a partial instead of a function": (llama, "apply_rotary_pos_emb", functools.partial(without_rotation)),
        "a function that it imports": (llama, "create_causal_mask", twice),
        "the same where it is defined": (masking_utils, "sdpa_mask", twice),
        "a function behind the attention": (sdpa_attention, "repeat_kv", twice),
        "a method that forward calls": (llama.LlamaRotaryEmbedding, "forward", modeling_gpt2.GPT2MLP.forward),
        "a norm": (llama.LlamaRMSNorm, "forward", twice),
        "an activation": (activations.SiLUActivation, "forward", twice),
        "a property": (torch.nn.Linear, "scaled", property(lambda self: self.weight * 2)),
        "torch's linear layer": (torch.nn.Linear, "forward", twice),
        "a function of torch": (torch.nn.functional, "silu", twice),
        "a function of torch in C": (torch.nn.functional, "scaled_dot_product_attention", twice),
        "a function of tensors": (torch, "softmax", twice),
        "how every module is called": (torch.nn.Module, "__call__", twice),
        "a class": (llama, "LlamaMLP", type("LlamaMLP", (llama.LlamaMLP,), {"forward": twice})),
    }


@pytest.mark.few(3)
@pytest.mark.parametrize("what", list(replacements()) if hasattr(transformers, "LlamaModel") else [])
def test_what_is_replaced_in_an_installed_package_is_in_the_key(what: str) -> None:
    holder, name, value = replacements()[what]
    model = tiny_model("llama")
    config = model.config.to_dict()
    added = name not in vars(holder)
    if added:
        setattr(holder, name, None)
    try:
        with replaced(holder, name, value):
            assert name in str(code_of(model))
            assert name in str(code_of_named(config))
    finally:
        if added:
            delattr(holder, name)
    assert code_of(model) is None
    assert code_of_named(config) is None


# ---------------------------------------------------------------- registries


def attention(scale: float) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * scale, weights

    return scaled


def test_registered_attention_counts_where_it_is_used() -> None:
    model, found = tiny_model("llama"), []
    for scale in (2.0, 3.0):
        transformers.AttentionInterface.register("tests_own", attention(scale))
        assert code_of(model) is None
        model.set_attn_implementation("tests_own")
        found.append(code_of(model))
        model.set_attn_implementation("sdpa")
    assert found[0] != found[1]
    assert all("ALL_ATTENTION_FUNCTIONS['tests_own']" in str(each) for each in found)
    assert code_of(model) is None


@pytest.mark.parametrize("registry", ["ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS"])
def test_attention_that_is_registered_under_a_name_of_transformers_counts(registry: str) -> None:
    from transformers import masking_utils, modeling_utils

    held = getattr(masking_utils if "MASK" in registry else modeling_utils, registry)
    model = tiny_model("llama")
    held["sdpa"] = attention(2.0)
    try:
        assert registry in str(code_of(model))
        assert registry in str(code_of_named(model.config.to_dict()))
    finally:
        del held["sdpa"]
    assert code_of(model) is None


# ---------------------------------------------------------------- in one model


class Wrapped(torch.nn.Module):  # type: ignore[name-defined,misc]
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block, self.change = block, None
        self.saved: Any = None

    def control(self, change: Any) -> None:
        self.change = change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.saved = self.change(self.block(*args, **kwargs))  # type: ignore[misc]
        return self.saved


def wrap(model: Any, number: float) -> None:
    block = model.layers[0]
    model.layers[0] = block if isinstance(block, Wrapped) else Wrapped(block)
    model.layers[0].control(lambda hidden: hidden + number)


def parametrize(model: Any, number: float) -> None:
    class Scaled(torch.nn.Module):  # type: ignore[name-defined,misc]
        def forward(self, weight: Any) -> Any:
            return weight * number

    layer = model.layers[1].mlp.up_proj
    if torch.nn.utils.parametrize.is_parametrized(layer):
        torch.nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())


def call_an_object(model: Any, number: float) -> None:
    for block in model.layers:
        block.mlp._modules.pop("act_fn", None)
        block.mlp.act_fn = Shift(number)


def call_a_lambda(model: Any, number: float) -> None:
    for block in model.layers:
        block.mlp._modules.pop("act_fn", None)
        block.mlp.act_fn = lambda hidden: hidden * number


def call_a_partial(model: Any, number: float) -> None:
    for block in model.layers:
        block.mlp._modules.pop("act_fn", None)
        block.mlp.act_fn = functools.partial(torch.nn.functional.leaky_relu, negative_slope=Shift(number))


def hold_a_namespace(model: Any, number: float) -> None:
    model.layers[0].settings = types.SimpleNamespace(strength=number)


@pytest.mark.few(2)
@pytest.mark.parametrize("edit", [wrap, parametrize, call_an_object, call_a_lambda, call_a_partial, hold_a_namespace])
def test_own_code_in_a_model_object_is_in_the_key(edit: Any) -> None:
    model, found = tiny_model("llama"), []
    for number in (ONE, FIVE, ONE):
        edit(model, number)
        found.append(code_of(model))
        if edit in (wrap, call_an_object, call_a_lambda):
            with torch.no_grad():
                model(input_ids=torch.arange(5, 20)[None])
            assert code_of(model) == found[-1]
    assert found[0] == found[2] != found[1]
    assert None not in found


def test_a_mode_that_stands_before_every_function_of_torch_is_in_the_key() -> None:
    from torch.overrides import TorchFunctionMode

    class Rounded(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    model = tiny_model("llama")
    with Rounded():
        assert "Rounded" in str(code_of(model))
    assert code_of(model) is None


# ---------------------------------------------------------------- through the store


def alone(model: Any, prompt: str, layer: int) -> Any:
    """The output of a block, from plain transformers, for one prompt by itself."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]), output_hidden_states=True)
    return out.hidden_states[layer + 1][0].numpy()


def stored(store: Any, name: str, group: str, prompt: str, layer: int) -> Any:
    return store.tokens(name, group=group).resid.sel(layer=layer, prompt=prompt_hash(prompt)).values


def test_a_replaced_function_never_serves_the_plain_model_by_name_or_the_other_way(llama: Path, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "store")
    options: dict[str, Any] = {"store": store, "keep_tokens": True, "progress": False, "device": "cpu"}
    model = transformers.AutoModel.from_pretrained(llama).eval()
    plain = lz.extract(llama, PROMPTS, **options)
    with replaced(modelling(), "apply_rotary_pos_emb", without_rotation):
        edited = lz.extract(llama, PROMPTS, **options)
        truth = alone(model, PROMPTS[0], 2)
        assert lz.extract(llama, PROMPTS, **options).found == len(PROMPTS)
    assert (plain.found, edited.found) == (0, 0)
    assert plain.group != edited.group
    assert lz.extract(llama, PROMPTS, **options).found == len(PROMPTS)
    np.testing.assert_allclose(stored(store, "tiny-llama", edited.group, PROMPTS[0], 2), truth, atol=1e-5)
    np.testing.assert_allclose(stored(store, "tiny-llama", plain.group, PROMPTS[0], 2), alone(model, PROMPTS[0], 2), atol=1e-5)
    with pytest.raises(lz.errors.AmbiguousProvenanceError, match=r"model_code: 'llama\.modeling_llama\.apply_rotary_pos_emb.*as installed"):
        store.dataset("tiny-llama")
