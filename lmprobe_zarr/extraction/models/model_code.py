"""The provenance field ``model_code``: which code of a model is not that of the installed packages. None for a plain model.

Three things are looked at: functions and classes of transformers and torch that were replaced; attention, mask and expert functions that
were registered; and, in a model object, classes, functions and objects that the caller wrote. Hooks and replaced methods of single modules
are refused elsewhere, because they are mostly meant for a while.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.extraction.models.described import MODULE_INTERNALS, Describer, bare, is_named, is_placing, origin, stored_by_calls
from lmprobe_zarr.extraction.models.installed import has_file, layers_of, reached, replaced_in
from lmprobe_zarr.extraction.models.tensor_bits import TensorBits

__all__ = ["code_of_named", "code_of_object"]

# Modules of transformers that every model may run through, whether or not its own module is imported yet.
SHARED: Final = (
    "transformers.activations", "transformers.masking_utils", "transformers.modeling_attn_mask_utils", "transformers.modeling_layers",
    "transformers.modeling_rope_utils", "transformers.modeling_utils", "transformers.pytorch_utils",
    "transformers.integrations.eager_attention", "transformers.integrations.flash_attention", "transformers.integrations.flex_attention",
    "transformers.integrations.moe", "transformers.integrations.sdpa_attention",
)  # fmt: skip
# What a model that is loaded here may be given; an object's configuration names its own.
IMPLEMENTATIONS: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm")
# Names that a text of the field shows.
SHOWN: Final = 3


def _field(found: Mapping[str, Any], describer: Describer) -> str | None:
    """The field: what differs in words, and a digest of how."""
    if not found:
        return None
    described = [[name, describer.value(value)] for name, value in sorted(found.items())]
    names = [name.removeprefix("transformers.models.") for name in sorted(found)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return f"{', '.join(names[:SHOWN])}{more}: {digest}"


def _is_installed(value: Any) -> bool:
    """Whether a registered function is one of the packages' own."""
    layers = layers_of(value)
    return all(is_named(origin(each)) and has_file(each) for each in layers) if layers else is_named(origin(bare(value)))


def _registered(modules: Iterable[str], used: Iterable[str]) -> dict[str, Any]:
    """Functions in the registries of these modules that are the caller's: of attention and experts those that are used."""
    names, found = set(used), dict[str, Any]()
    for module in modules:
        for own, registry in list(vars(sys.modules[module]).items()):
            if not isinstance(registry, Mapping) or not registry or (not own.isupper() and not hasattr(registry, "_global_mapping")):
                continue
            chosen = hasattr(registry, "_global_mapping")
            for key in list(dict.keys(registry) if isinstance(registry, dict) else registry):
                value = dict.get(registry, key) if isinstance(registry, dict) else registry[key]
                if callable(value) and not isinstance(value, type) and (not chosen or key in names) and not _is_installed(value):
                    found[f"{own}[{key!r}]"] = value
    return found


def _modes() -> dict[str, Any]:
    """Modes of the caller's within which every function of torch is called."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    functions: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    active = [*functions, *_get_current_dispatch_mode_stack()]
    return {f"mode {number} ({type(mode).__qualname__})": mode for number, mode in enumerate(active) if not is_named(type(mode).__module__)}


# ---------------------------------------------------------------- a model that is loaded by name


def _types(config: Mapping[str, Any]) -> set[str]:
    found = {str(config["model_type"])} if config.get("model_type") else set[str]()
    return found.union(*(_types(part) for name, part in config.items() if str(name).endswith("_config") and isinstance(part, Mapping)))


def code_of_named(config: Mapping[str, Any]) -> str | None:
    """The field of a model that is, or would be, loaded from its files, from what is imported now.

    Parameters
    ----------
    config : mapping
        Content of ``config.json``.
    """
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    names = list(SHARED)
    for kind in _types(config) if auto is not None else ():
        folder = f"transformers.models.{auto.model_type_to_module_name(kind)}.modeling_"  # type: ignore[union-attr]
        names += [name for name in list(sys.modules) if name.startswith(folder)]
    modules = reached(names)
    used = {*IMPLEMENTATIONS, *(str(config[key]) for key in ("_attn_implementation", "attn_implementation") if config.get(key))}
    found = {**replaced_in(modules), **_registered(modules, used), **_modes()}
    return _field(found, Describer(TensorBits()))


# ---------------------------------------------------------------- a model object


def _is_own(kind: type) -> bool:
    return not is_named(kind.__module__) and not _is_fixed_by_its_name(kind.__module__)


def _is_fixed_by_its_name(module: str) -> bool:
    """Whether a module came with a model of the hub: its name, which is in the fingerprint, holds the commit."""
    parts = module.split(".")
    return parts[0] == "transformers_modules" and any(len(part) == 40 and set(part) <= set("0123456789abcdef") for part in parts)


def _holds_code(value: Any, depth: int = 4) -> bool:
    """Whether a value is or holds code of the caller's, or an object whose content the fingerprint does not hold."""
    if isinstance(value, nn.Module | torch.Tensor) or value is None or isinstance(value, str | int | float | bool | bytes):
        return False
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return depth > 0 and any(_holds_code(held, depth - 1) for held in (value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        arguments = (*value.args, *value.keywords.values()) if isinstance(value, functools.partial) else ()
        return any(not is_named(origin(each)) for each in layers_of(value)) or any(_holds_code(each, depth - 1) for each in arguments)
    if isinstance(value, type):
        return _is_own(value)
    return isinstance(value, types.SimpleNamespace | argparse.Namespace) or _is_own(type(value))


def _own_attributes(name: str, part: nn.Module, skipped: frozenset[str]) -> dict[str, Any]:
    found = {}
    changed = stored_by_calls(type(part))
    for attribute, value in vars(part).items():
        inherited = getattr(type(part), attribute, None)
        is_method = hasattr(inherited, "__globals__") and callable(value)
        if attribute in MODULE_INTERNALS or attribute in skipped or attribute in changed or is_method or is_placing(value):
            continue
        if _holds_code(value):
            found[f"{name}.{attribute}".lstrip(".")] = value
    return found


def _implementations(module: nn.Module) -> set[str]:
    found: set[str] = set()
    for part in module.modules():
        config = getattr(part, "config", None)
        for holder in (part, config):
            for name in ("_attn_implementation", "_experts_implementation"):
                value = getattr(holder, name, None)
                if isinstance(value, str):
                    found.add(value)
    return found


def code_of_object(module: nn.Module, *, skipped: frozenset[str] = frozenset()) -> str | None:
    """The field of a model object.

    Parameters
    ----------
    module : Module
    skipped : frozenset of str
        Attributes of its modules that do not compute.
    """
    parts = list(module.named_modules(remove_duplicate=False))
    kinds = {each for _, part in parts for each in type(part).__mro__}
    tensors = {type(tensor) for _, part in parts for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None}
    found: dict[str, Any] = {f"class {kind.__qualname__}": kind for kind in {*kinds, *tensors} if _is_own(kind)}
    for name, part in parts:
        found |= _own_attributes(name, part, skipped)
    own = (kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] in ("torch", "transformers", "peft"))
    modules = reached([*SHARED, *own])
    found |= {**replaced_in(modules), **_registered(modules, _implementations(module)), **_modes()}
    return _field(found, Describer(TensorBits(), {id(part): name for name, part in parts}))
