"""Models inside of what others put around them: data parallelism, compiled code, shards. Never a pass.

Hooks do not run in compiled code, so a compiled model is run as it is without compilation. Its values, and so its key, are those of the
model inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError

__all__ = ["broken_weights", "check_complete", "uncompiled", "unwrapped"]

# Where each of these keeps the model inside.
INSIDE: Final = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
SHARDED: Final = ("FullyShardedDataParallel", "FSDPModule")
ORIGINAL: Final = "_torchdynamo_orig_callable"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of data parallelism and of ``torch.compile``."""
    while True:
        kind = next((each.__name__ for each in type(model).__mro__ if each.__name__ in INSIDE and _is_of_torch(each)), None)
        inside = None if kind is None else dict(model.named_children()).get(INSIDE[kind])
        if inside is None:
            return model
        model = inside


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def check_complete(model: nn.Module) -> None:
    """Check that this process has all the weights of a model.

    Raises
    ------
    InvalidArgumentError
        They are spread over processes, are on the meta device, or its blocks are wrapped by ``torch.compile`` each for itself.
    """
    name = type(model).__name__
    if type(model).__module__.partition(".")[0] == "deepspeed" or any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise _in_shards(name, "DeepSpeed", "engine.save_16bit_model(), or give engine.module where ZeRO's stage is below 3")
    if any(each.__name__ in SHARDED and _is_of_torch(each) for part in model.modules() for each in type(part).__mro__):
        raise _in_shards(name, "FSDP", "from its full state dict")
    if any(type(weight).__name__ == "DTensor" for weight in model.parameters()):
        raise _in_shards(name, "tensor parallelism (DTensor)", "from its full state dict")
    placed = any("_hf_hook" in vars(part) for part in model.modules())
    empty = next((each for each, weight in model.named_parameters() if weight.device.type == "meta"), None)
    if empty is not None and not placed:
        raise InvalidArgumentError(
            f"the weight {empty!r} of {name} is on the meta device, where it has no values: load the model with from_pretrained(), "
            "or fill it with to_empty() and load_state_dict()"
        )
    inner = next((each for each, part in model.named_modules() if each and unwrapped(part) is not part), None)
    if inner is not None:
        raise InvalidArgumentError(
            f"the part {inner!r} of {name} is wrapped by {type(model.get_submodule(inner)).__name__}: give the model without it; "
            "to compile a part, call its compile(), which leaves the module in its place"
        )


def _in_shards(name: str, what: str, how: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name} is sharded by {what}, so this process has only a part of its weights: save the whole model ({how}), and give that folder; "
        "or extract before it is sharded"
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, no part of a model runs compiled code; afterwards all is as before."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for part in model.modules():
        held = vars(part)
        if held.get("_compiled_call_impl") is not None:
            before.append((held, "_compiled_call_impl", held.pop("_compiled_call_impl")))
        forward = held.get("forward")
        plain = getattr(forward, ORIGINAL, None)
        if plain is not None:
            before.append((held, "forward", forward))
            if getattr(plain, "__func__", None) is type(part).forward:
                del held["forward"]
            else:
                held["forward"] = plain
    try:
        yield
    finally:
        for held, name, value in before:
            held[name] = value


def broken_weights(model: nn.Module) -> tuple[str, int, int] | None:
    """The first weight that holds NaN or infinity: its name, how many such values, and of how many; None if there is none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.element_size() < 2:
            continue
        # A sum is NaN or infinite if a value is; of large values also otherwise, so these are counted.
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            wrong = int((~torch.isfinite(tensor.detach())).sum())
            # Masks hold infinity on purpose.
            if wrong and (isinstance(tensor, nn.Parameter) or bool(torch.isnan(tensor).any())):
                return name, wrong, tensor.numel()
    return None
