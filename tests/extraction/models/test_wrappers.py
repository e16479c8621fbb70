"""Models inside of wrappers: the values and the key of the model inside, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaded_models import by_prompt, loaded_from
from tiny_models import PROMPTS, tiny_model

from lmprobe_zarr.batch.sites import Outputs
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import parse_prompts, tokenize
from lmprobe_zarr.extraction.models.wrappers import broken_weights, check_complete, uncompiled, unwrapped

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch.compile imports what torch deprecates
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]

OUTPUTS = Outputs(perplexity=True, logits="last_token")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def llama() -> Any:
    return tiny_model("llama", "AutoModelForCausalLM")


def call(model: Any) -> Any:
    """The model after a pass, so that what is compiled is there."""
    with torch.no_grad():
        model(input_ids=torch.arange(5)[None])
    return model


def values(loaded: extraction.LoadedModel) -> dict[str, dict[str, Any]]:
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    return by_prompt(list(extraction.run(loaded, tokenized, sites=("resid", "mlp"), keep_tokens=True, outputs=OUTPUTS, batch_tokens=100)))


def check_the_same(wrapped: Any) -> None:
    """Key, values and logits are those of the model inside, before and after a run."""
    right = loaded_from(llama())
    loaded = loaded_from(wrapped)
    assert loaded.provenance == right.provenance
    truth, found = values(right), values(loaded)
    for digest, each in truth.items():
        for name, value in each.items():
            np.testing.assert_array_equal(found[digest][name], value, err_msg=name)
    assert loaded_from(wrapped).provenance == right.provenance


def compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return call(model)


def compile_body(model: Any) -> Any:
    model.model.compile(backend="eager")
    return call(model)


def compile_blocks(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return call(model)


def compile_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return call(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "data parallel": torch.nn.DataParallel,
    "compiled": lambda model: call(torch.compile(model, backend="eager")),
    "compiled in data parallel": lambda model: torch.nn.DataParallel(torch.compile(model, backend="eager")),
    "compiled in place": compile_in_place,
    "compiled body": compile_body,
    "compiled blocks": compile_blocks,
    "compiled forward": compile_forward,
}


@pytest.mark.few(1)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_values_and_the_key_of_the_model_inside(wrapper: str) -> None:
    check_the_same(WRAPPERS[wrapper](llama()))


def test_distributed_data_parallel_has_the_values_and_the_key_of_the_model_inside(process_group: None) -> None:
    check_the_same(torch.nn.parallel.DistributedDataParallel(llama()))


@pytest.mark.long
def test_compiled_code_is_there_again_after_a_run() -> None:
    model = compile_forward(compile_in_place(llama()))
    before = {name: vars(model)[name] for name in ("forward", "_compiled_call_impl")}
    with uncompiled(model):
        assert not set(before) & set(vars(model))
    values(loaded_from(model))
    assert {name: vars(model)[name] for name in before} == before


def test_code_of_the_callers_inside_of_compiled_code_is_noticed() -> None:
    model = llama()
    own = type(model).forward

    def steered(*args: Any, **options: Any) -> Any:
        return own(model, *args, **options)

    model.forward = torch.compile(steered, backend="eager")
    loaded = loaded_from(model)  # the body is the model's own
    with pytest.raises(InvalidArgumentError, match="a replaced 'forward'"):
        values(loaded)


def test_a_block_in_a_wrapper_of_its_own_is_refused_with_what_to_do() -> None:
    model = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(InvalidArgumentError, match=r"'model.layers.1' of LlamaForCausalLM is wrapped by OptimizedModule: give the model"):
        loaded_from(model)


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_sharded_models_are_refused_with_what_to_do(process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(InvalidArgumentError, match="sharded by FSDP, so this process has only a part of its weights: save the whole"):
        loaded_from(FullyShardedDataParallel(llama(), device_id=torch.device("cpu")))
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return
    sharded = llama()
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(InvalidArgumentError, match="sharded by FSDP"):
        loaded_from(sharded)


def test_tensor_parallel_models_are_refused_with_what_to_do(process_group: None) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = parallelize_module(llama(), mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    with pytest.raises(InvalidArgumentError, match="sharded by tensor parallelism"):
        loaded_from(sharded)


def test_engines_of_deepspeed_are_refused_with_what_to_do() -> None:
    class DeepSpeedEngine(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.module = llama()

    engine = DeepSpeedEngine()
    DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"
    with pytest.raises(InvalidArgumentError, match=r"sharded by DeepSpeed.*engine.module where ZeRO's stage is below 3"):
        loaded_from(engine)
    partitioned = llama()
    partitioned.lm_head.weight.ds_id = 7
    with pytest.raises(InvalidArgumentError, match="sharded by DeepSpeed"):
        loaded_from(partitioned)


def test_a_model_without_values_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"'model.embed_tokens.weight' of LlamaForCausalLM is on the meta device.*from_pretrained"
    ):
        loaded_from(llama().to("meta"))
    partly = llama()
    partly.model.layers[2].to("meta")
    with pytest.raises(InvalidArgumentError, match=r"'model.layers.2.*is on the meta device"):
        loaded_from(partly)


def test_a_dispatched_model_has_the_key_of_the_model_and_an_offloaded_one_says_what_to_do() -> None:
    accelerate = pytest.importorskip("accelerate")
    check_the_same(accelerate.dispatch_model(llama(), {"": "cpu"}, main_device="cpu", force_hooks=True))
    with pytest.raises(InvalidArgumentError, match="offloaded"):
        loaded_from(accelerate.cpu_offload(llama(), execution_device="cpu"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_lora_model_in_data_parallel_has_its_key() -> None:
    peft = pytest.importorskip("peft")

    def lora() -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    right, found = loaded_from(lora()), loaded_from(torch.nn.DataParallel(lora()))
    assert found.provenance == right.provenance
    assert found.provenance["adapter"] is not None


def test_a_plain_model_is_taken_as_it_is() -> None:
    model = llama()
    assert unwrapped(model) is model
    check_complete(model)

    class Holder(torch.nn.Module):  # type: ignore[misc,name-defined]
        module = None

    holder = Holder()
    assert unwrapped(holder) is holder


# ---------------------------------------------------------------- weights that are no numbers


def spoil(weight: Any, place: tuple[int, ...], value: float) -> None:
    with torch.no_grad():
        weight[place] = value


@pytest.mark.few(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("model.layers.2.mlp.up_proj.weight", r"1 of the 1536 values of the weight 'model.layers.2.mlp.up_proj.weight' of layer 2"),
        ("model.layers.0.input_layernorm.weight", r"'model.layers.0.input_layernorm.weight' of layer 0"),
    ],
)
def test_weights_that_are_no_numbers_are_named_before_anything_comes_out(value: float, path: str, words: str) -> None:
    model = llama()
    weight = model.get_parameter(path)
    spoil(weight, (0,) * weight.ndim, value)
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    asked: tuple[dict[str, Any], ...] = ({}, {"poolings": (), "keep_tokens": True}, {"sites": (), "outputs": Outputs(perplexity=True)})
    for options in asked:
        with pytest.raises(InvalidArgumentError, match=words):
            next(iter(extraction.run(loaded, tokenized, batch_tokens=1, **options)))


def test_layers_before_a_weight_that_is_no_number_are_extracted() -> None:
    right, model = values(loaded_from(llama())), llama()
    spoil(model.model.layers[2].mlp.up_proj.weight, (0, 0), float("nan"))
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    found = by_prompt(list(extraction.run(loaded, tokenized, layers=[0, 1], keep_tokens=True, batch_tokens=100)))
    for digest, each in right.items():
        np.testing.assert_array_equal(found[digest]["resid"], each["resid"][:2])


def test_only_prompts_with_a_token_whose_embedding_is_no_number_are_refused() -> None:
    model = llama()
    spoil(model.model.embed_tokens.weight, (77, 3), float("nan"))
    loaded = loaded_from(model)
    assert len(list(extraction.run(loaded, tokenize(parse_prompts([[5, 6], [7, 8]]), loaded.tokenizer)))) == 1
    with pytest.raises(InvalidArgumentError, match=r"'model.embed_tokens.weight' of 'tiny' are NaN or infinite"):
        list(extraction.run(loaded, tokenize(parse_prompts([[5, 77]]), loaded.tokenizer)))


def test_values_that_only_the_computation_makes_infinite_are_kept_and_weights_are_examined_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama().half()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(60000.0)
        model.model.layers[1].mlp.up_proj.weight.mul_(1000.0)
    loaded = loaded_from(model)
    looked: list[Any] = []

    def counted(module: Any) -> Any:
        looked.append(module)
        return broken_weights(module)

    monkeypatch.setattr("lmprobe_zarr.extraction.models.finite.broken_weights", counted)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    batches = list(extraction.run(loaded, tokenized, layers=[1], batch_tokens=1))
    assert len(batches) == len(PROMPTS)
    assert any(not np.isfinite(batch.prompts["resid_last_token"]).all() for batch in batches)
    assert len(looked) == 1
