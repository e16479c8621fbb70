"""A fingerprint of a model in memory: its weights, its configuration and the settings of its modules. Never a file.

The caller's own code that runs inside a model cannot be put into a fingerprint. This module only finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models.described import TRUSTED, code_name, is_placing, is_trusted, stored_by_calls
from lmprobe_zarr.extraction.models.tensor_bits import CHUNK, TensorBits
from lmprobe_zarr.model_files import CONFIG_NOISE

__all__ = ["ATTRIBUTES_VOLATILE", "CHUNK", "check_code", "foreign_code", "global_hooks", "model_fingerprint"]

# Settings of a configuration that are recorded elsewhere, or concern how a model is called, saved or placed, not what its blocks compute.
CONFIG_VOLATILE: Final = frozenset(
    {
        *CONFIG_NOISE,
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "architectures",
        "attn_implementation",
        "experts_implementation",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "use_cache",
    }
)
# Attributes of modules that change with use, device or library version, but do not change what is computed.
ATTRIBUTES_VOLATILE: Final = frozenset(
    {
        "_attn_implementation",
        "_cache",
        "_compiled_call",
        "_compiled_call_impl",
        "_gradient_checkpointing_func",
        "_hf_hook",
        "_is_full_backward_hook",
        "_is_hf_initialized",
        "_last_compile_config",
        "_is_torch_compile",
        "_old_forward",
        "_output_capturing_hooks_installed",
        "_require_grads_hook",
        "_require_grads_hooks",
        "_use_kernels",
        "_weight_conversions",
        "assistant_generation_config",
        "base_model_torch_dtype",
        "compute_dtype",
        "compute_type_is_set",
        "device_map",
        "extra_repr",
        "generation_config",
        "gradient_checkpointing",
        "hf_device_map",
        "hf_quantizer",
        "is_parallelizable",
        "model_parallel",
        "name_or_path",
        "peft_config",
        "training",
        "warnings_issued",
    }
)
# Methods that only print.
PRINTING: Final = ("__repr__", "_get_name", "extra_repr")
# State of rotary embeddings that depends on the length of the last batch. Its start values are in the configuration.
FOLLOWS_LENGTH: Final = ("long_inv_freq", "max_seq_len_cached")
LENGTH_ROPES: Final = ("dynamic", "longrope")

# ---------------------------------------------------------------- code


def _own_methods(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Methods that were replaced on this module object, by name."""
    for name, value in vars(part).items():
        inherited = getattr(type(part), name, None)
        if not callable(value) or isinstance(value, nn.Module) or not hasattr(inherited, "__globals__"):
            continue
        if name not in PRINTING and getattr(value, "__func__", None) is not inherited and not is_trusted(value):
            yield name, value
    before = vars(part).get("_old_forward")  # accelerate's own forward calls this one
    if before is not None and getattr(before, "__func__", None) is not type(part).forward and not is_trusted(before):
        yield "forward", before
    hook = vars(part).get("_hf_hook")
    for single in (hook, *getattr(hook, "hooks", ())):
        if single is not None and type(single).__module__.partition(".")[0] not in TRUSTED:
            yield "forward", single


def foreign_code(module: nn.Module) -> str | None:
    """A description of the first hook or replaced method that is the caller's own; None if there is none.

    Hooks and methods that accelerate, PEFT, torch and transformers install are not counted.
    """
    for name, part in module.named_modules():
        where = f"on {name!r}" if name else "on the model"
        for kind, hooks in (("forward hook", part._forward_hooks), ("forward pre-hook", part._forward_pre_hooks)):
            for hook in hooks.values():
                if not is_trusted(hook):
                    return f"a {kind} {where} ({code_name(hook)})"
        for method, code in _own_methods(part):
            return f"a replaced {method!r} {where} ({code_name(code)})"
    return None


def global_hooks() -> str | None:
    """A description of the caller's first forward hook that torch runs for every module; None if there is none."""
    hooks: tuple[Mapping[int, Callable[..., Any]], ...] = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    for hook in (hook for each in hooks for hook in each.values()):
        if not is_trusted(hook):
            return f"a forward hook on every module ({code_name(hook)})"
    return None


# ---------------------------------------------------------------- everything


def check_code(found: str | None, own: Mapping[str, Any]) -> None:
    """Check that the caller's own provenance fields describe code that the fingerprint does not.

    Raises
    ------
    InvalidArgumentError
        Such code was found, and there are no such fields.
    """
    if found is not None and not own:
        raise InvalidArgumentError(
            f"there is {found}, and what it does cannot be told from what another does: remove it, or name what it does, "
            "provenance={'steering': '…'}"
        )


def _config_settings(config: Any) -> Any:
    """The settings of a configuration, and of its nested ones, that change the computation."""
    if isinstance(config, Mapping):
        return {str(key): _config_settings(value) for key, value in config.items() if str(key) not in CONFIG_VOLATILE}
    return [_config_settings(value) for value in config] if isinstance(config, list | tuple) else config


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


class _Digest:
    """The digest of a model, updated module by module."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.tensors = TensorBits()
        # By `id`. The objects are kept, so that no id is used twice.
        self.seen: dict[int, tuple[Any, str]] = {}

    def add(self, *words: object) -> None:
        self.sha256.update(json.dumps(words, sort_keys=True).encode() + b"\n")

    def alias(self, value: Any, name: str) -> str | None:
        """The name under which the same object was seen before; None the first time."""
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        self.seen[id(value)] = (value, name)
        return None

    def tensor(self, name: str, tensor: torch.Tensor) -> list[Any]:
        """Shape, dtype and a digest of the raw bits; for a tensor seen before only its name."""
        before = self.alias(tensor, name)
        if before is not None:
            return ["same", before]
        return self.tensors.digest(name, tensor, self.plain)

    def plain(self, name: str, value: Any) -> Any:
        """A value as JSON; for an object that is no plain value its class, never an address."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes | complex):
            return repr(value)
        if isinstance(value, torch.Tensor):
            return self.tensor(name, value)
        if isinstance(value, np.ndarray | np.generic):
            return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, torch.dtype):
            return str(value)
        if _is_config(value):
            before = self.alias(value, name)
            return ["same", before] if before is not None else self.plain(name, _config_settings(value.to_dict()))
        if isinstance(value, Mapping):
            return {str(key): self.plain(f"{name}.{key}", held) for key, held in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(f"{name}.{number}", held) for number, held in enumerate(value)]
        if isinstance(value, set | frozenset):
            return sorted(json.dumps(self.plain(name, held), sort_keys=True) for held in value)
        return self.held(name, value)

    def held(self, name: str, value: Any) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, nn.Module):
            return kind
        if isinstance(value, functools.partial):
            return ["partial", code_name(value), self.plain(name, value.args), self.plain(name, value.keywords)]
        if dataclasses.is_dataclass(value) and not kind.startswith("bitsandbytes"):
            before = self.alias(value, name)
            fields = () if before is not None else dataclasses.fields(value)
            return [kind, before, {each.name: self.plain(f"{name}.{each.name}", getattr(value, each.name, None)) for each in fields}]
        return code_name(value) if callable(value) else kind

    def module(self, name: str, part: nn.Module) -> None:
        before = self.alias(part, name)
        self.add("module", name, before, f"{type(part).__module__}.{type(part).__qualname__}", code_name(type(part).forward))
        if before is not None:
            return
        rope = str(vars(part).get("rope_type"))
        follows = any(kind in rope for kind in LENGTH_ROPES)
        changed = stored_by_calls(type(part))
        for tensor_name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None or (follows and tensor_name.endswith("inv_freq") and not tensor_name.endswith("original_inv_freq")):
                continue
            path = f"{name}.{tensor_name}"
            self.add("tensor", path, self.tensor(path, tensor))
            self.quantised(path, part, tensor)
        for attribute, value in sorted(vars(part).items()):
            private = attribute.startswith("_") and isinstance(value, Mapping | set | frozenset)
            if private or attribute in ATTRIBUTES_VOLATILE or attribute.endswith(FOLLOWS_LENGTH) or is_placing(value):
                continue
            # transformers 4 leaves the class's own forward on a module that it has recorded the states of.
            if attribute == "forward" and getattr(value, "__func__", None) is type(part).forward and value.__self__ is part:
                continue
            value = changed.get(attribute, value)  # as it was before the first pass
            if value is dataclasses.MISSING:
                continue
            self.add("attribute", name, attribute, self.plain(f"{name}.{attribute}", value))

        before_hook = vars(part).get("_old_forward")
        if before_hook is not None and getattr(before_hook, "__func__", None) is not type(part).forward:
            self.add("forward", name, code_name(before_hook))

    def quantised(self, path: str, part: nn.Module, tensor: torch.Tensor) -> None:
        """Add the scales that bitsandbytes keeps beside packed bits: on the parameter, or after its first use in the state of the layer."""
        state: Any = getattr(tensor, "quant_state", None)
        if hasattr(state, "as_dict"):
            self.add("scales", path, self.plain(path, state.as_dict(packed=True)))
        scales = getattr(tensor, "SCB", None)
        scales = getattr(vars(part).get("state"), "SCB", None) if scales is None else scales
        if isinstance(scales, torch.Tensor):
            self.add("scales", path, self.tensor(f"{path}.SCB", scales))


def model_fingerprint(module: nn.Module) -> str:
    """``bits:…`` over everything that a model in memory computes with.

    The raw bits, name, shape and dtype of every parameter, buffer and other tensor; the class of every module and its plain attributes
    (scales, flags, names of activation functions, an adapter's state); the configuration without what is recorded elsewhere. Any edit of
    these changes it. The device of the weights, the mode, and whether the model has run do not. Needs memory for two chunks of 8 MiB, and
    for a copy of a tensor that is not contiguous.

    Raises
    ------
    InvalidArgumentError
        Weights that are not in memory (offloaded to disk or CPU by accelerate).
    """
    digest = _Digest()
    with torch.no_grad(), _as_before_a_pass(module):
        for name, part in module.named_modules(remove_duplicate=False):
            digest.module(name, part)
    return "bits:" + digest.sha256.hexdigest()


@contextmanager
def _as_before_a_pass(module: nn.Module) -> Iterator[None]:
    """The weights of RWKV as they were loaded: its first pass divides some of them by powers of two, which it can undo itself."""
    scaled: list[Any] = [
        part for part in module.modules() if getattr(part, "layers_are_rescaled", False) and hasattr(part, "_rescale_layers")
    ]

    def rescale(*, training: bool) -> None:
        for part in scaled:
            if all(weight.is_floating_point() for weight in part.parameters()):  # packed weights cannot be multiplied
                mode, part.training = part.training, training
                try:
                    part._rescale_layers()
                finally:
                    part.training = mode

    rescale(training=True)
    try:
        yield
    finally:
        rescale(training=False)
