"""What a function, a class or an object computes with, as JSON: bytecode, constants, defaults, closures, globals and attributes.

Code of installed packages is described by its name. Code of the caller is followed into every function, class and value that it uses, so
that two functions of one name, such as those of a notebook's cell that is run twice, have different descriptions if they differ.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.extraction.models.tensor_bits import TensorBits

__all__ = ["MODULE_INTERNALS", "Describer", "bare", "code_name", "is_named", "is_placing", "is_trusted", "origin", "stored_by_calls"]

# Hooks and methods of these packages belong to a plainly loaded model: they place it, run it or read from it.
TRUSTED: Final = ("accelerate", "peft", "torch", "transformers")
# The same of models that were quantised or compiled; the names of their classes and their numbers are in the fingerprint.
QUANTISERS: Final = (
    "aqlm", "auto_gptq", "auto_round", "awq", "bitsandbytes", "causal_conv1d", "compressed_tensors", "eetq", "fbgemm_gpu", "fla",
    "flash_attn", "gptqmodel", "hqq", "mamba_ssm", "optimum", "quanto", "torchao", "vptq",
)  # fmt: skip
# Methods that compute nothing: they print, make the object or copy it.
NOT_COMPUTING: Final = ("__init__", "__init_subclass__", "__repr__", "__str__", "extra_repr", "_get_name", "__reduce__", "__getstate__")
CLASS_NOISE: Final = (
    "__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__dict__", "__doc__",
    "__firstlineno__", "__match_args__", "__module__", "__orig_bases__", "__parameters__", "__qualname__", "__slots__",
    "__static_attributes__", "__weakref__", "_abc_impl",
)  # fmt: skip
INSTALLED_FOLDERS: Final = ("site-packages", "dist-packages")
MODULE_INTERNALS: Final = frozenset(vars(nn.Module()))


# ---------------------------------------------------------------- where code comes from


def bare(code: Any) -> Any:
    """The function that a bound method or a partial calls in the end."""
    while isinstance(code, functools.partial) or hasattr(code, "__func__"):
        code = code.func if isinstance(code, functools.partial) else code.__func__
    return code


def origin(code: Any) -> str:
    """The module in which a callable was written, even if ``functools.wraps`` gave it the name of another."""
    code = bare(code)
    if hasattr(code, "__globals__"):
        return str(code.__globals__.get("__name__"))
    return str(getattr(code, "__module__", None) or type(code).__module__)


def code_name(code: Any) -> str:
    """Module and qualified name of a callable."""
    code = bare(code)
    return f"{origin(code)}:{getattr(code, '__qualname__', type(code).__qualname__)}"


def is_trusted(code: Any) -> bool:
    """Whether a callable was written in one of the packages that run plainly loaded models."""
    return origin(code).partition(".")[0] in (*TRUSTED, *QUANTISERS)


def is_placing(value: Any) -> bool:
    """Whether it is a method of accelerate that replaces that of a module."""
    return callable(value) and origin(value).partition(".")[0] == "accelerate"


@functools.cache
def _is_standard(root: str) -> bool:
    if root not in sys.stdlib_module_names:
        return root == "builtins"
    file = getattr(sys.modules.get(root), "__file__", None)
    # A script of the user's may have the name of a module of Python.
    return file is None or Path(file).is_relative_to(sysconfig.get_paths()["stdlib"])


def is_named(module: str) -> bool:
    """Whether what a module holds is described by its name alone."""
    root = module.partition(".")[0]
    return root in TRUSTED or root in QUANTISERS or root == "numpy" or _is_standard(root)


def _installed_file(module: str, code: types.CodeType | None = None) -> str | None:
    """The file of a module that pip installed, or that came with a model; None for the caller's own, and for code from elsewhere."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module == "__main__" or (code is not None and Path(code.co_filename).name != Path(file).name):
        return None
    comes_with_a_model = module.partition(".")[0] == "transformers_modules"
    return str(file) if comes_with_a_model or any(folder in Path(file).parts for folder in INSTALLED_FOLDERS) else None


@functools.cache
def _file_digest(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError:
        return "unreadable"


# ---------------------------------------------------------------- what a call changes


def _functions(kind: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in kind.__mro__:
        if each in (nn.Module, object):
            continue
        for name, value in vars(each).items():
            function = getattr(value, "__func__", value)
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            if isinstance(function, types.FunctionType):
                found.setdefault(name, function)
    return found


_NO_CONSTANT: Final = object()


def _stores(function: types.FunctionType) -> tuple[dict[str, Any], set[str]]:
    """Attributes that a method stores on its object, with the constant where it is one, and the names of those that it reads."""
    instructions = [each for each in dis.get_instructions(function) if each.opname not in ("CACHE", "EXTENDED_ARG", "RESUME")]
    own = function.__code__.co_varnames[:1]
    stored: dict[str, Any] = {}
    read: set[str] = set()
    for place, each in enumerate(instructions[1:], 1):
        before = instructions[place - 1]
        loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)  # newer Pythons load two names at once
        if not before.opname.startswith("LOAD_FAST") or loaded[-1:] != own:
            continue
        if each.opname == "STORE_ATTR":
            value = instructions[place - 2] if place > 1 and len(loaded) == 1 else before
            constant = value.argval if value.opname in ("LOAD_CONST", "LOAD_SMALL_INT") else _NO_CONSTANT
            known = stored.setdefault(each.argval, constant)
            # Of several stores, which one ran is not known.
            stored[each.argval] = constant if type(known) is type(constant) and known == constant else _NO_CONSTANT
        elif each.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            read.add(each.argval)
    return stored, read


def stored_by_calls(kind: type) -> dict[str, Any]:
    """The attributes that a call of an object stores on it, with the value that they have before the first call.

    Parameters
    ----------
    kind : type
        A class with ``forward`` or ``__call__``.

    Returns
    -------
    dict of str to object
        The constant that ``__init__`` stores, or `dataclasses.MISSING` where it stores nothing: then the attribute is not there before
        the first call. Attributes that ``__init__`` computes are left out.
    """
    return {name: value for name, value in _stored(kind).items() if value is not _NO_CONSTANT}


# By class, with the method that was looked at.
_STORED: Final[WeakKeyDictionary[type, tuple[Any, dict[str, Any]]]] = WeakKeyDictionary()


def _stored(kind: type) -> dict[str, Any]:
    functions = _functions(kind)
    entry = functions.get("forward") or functions.get("__call__")
    known = _STORED.get(kind)
    if known is None or known[0] is not entry:
        known = _STORED[kind] = entry, _find_stored(kind, functions)
    return known[1]


def _find_stored(kind: type, functions: dict[str, Any]) -> dict[str, Any]:
    generating = [each for each in kind.__mro__ if each.__module__.startswith("transformers.generation.")]
    queue, seen, stored = ["forward", "__call__", *(name for each in generating for name in vars(each))], {"__init__"}, set[str]()
    while queue:
        name = queue.pop()
        if name in functions and name not in seen:
            seen.add(name)
            written, read = _stores(functions[name])
            stored |= set(written)
            queue += read
    if not stored:
        return {}
    first: dict[str, Any] = {}
    for each in kind.__mro__:
        init = vars(each).get("__init__")
        while hasattr(init, "__wrapped__"):
            init = init.__wrapped__  # type: ignore[union-attr]
        if isinstance(init, types.FunctionType):
            made: list[types.FunctionType] = [init]
            for function in made:  # grows
                written, read = _stores(function)
                for name, value in written.items():
                    first.setdefault(name, value)
                made += [functions[name] for name in sorted(read) if name in functions and functions[name] not in made]
    declared = {name for each in kind.__mro__ for name in vars(each)}
    return {name: first.get(name, dataclasses.MISSING) for name in stored if name in first or name not in declared}


# ---------------------------------------------------------------- descriptions


class Describer:
    """Descriptions as JSON, the same in every process for what computes the same.

    Parameters
    ----------
    tensors : TensorBits
    places : mapping of int to str
        By `id`, the name of every module of the model; such a module is described by that name.
    """

    def __init__(self, tensors: TensorBits, places: Mapping[int, str] | None = None) -> None:
        self.tensors = tensors
        self.places = places or {}
        # By `id`. The objects are kept, so that no id is used twice.
        self.known: dict[int, tuple[Any, Any]] = {}
        self.inside: list[int] = []

    def once(self, value: Any, describe: Callable[[Any], Any]) -> Any:
        """The description of a value that may be met again, or inside itself; a long one as its digest."""
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.inside:
            return ["around", len(self.inside) - self.inside.index(id(value))]
        self.inside.append(id(value))
        found = describe(value)
        self.inside.pop()
        text = json.dumps(found, sort_keys=True)
        if len(text) > 200:
            found = ["digest", hashlib.sha256(text.encode()).hexdigest()]
        self.known[id(value)] = value, found
        return found

    def value(self, value: Any) -> Any:
        """Any value. Two values of one description compute the same."""
        if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, enum.Enum):
            return [code_name(type(value)), value.name]
        if isinstance(value, bytes | complex | range | slice | torch.dtype | torch.device | type(...)):
            return repr(value)
        if isinstance(value, torch.Tensor):
            return self.once(value, self.tensor)
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return ["array", list(value.shape), self.value(value.ravel().tolist())]
        if isinstance(value, np.ndarray | np.generic):
            return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        return self.once(value, self.container if isinstance(value, Mapping | list | tuple | set | frozenset) else self.code)

    def tensor(self, value: torch.Tensor) -> Any:
        return self.tensors.digest("of the caller's code", value, lambda _, settings: self.value(settings))

    def container(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return ["mapping", [[str(key), self.value(held)] for key, held in sorted(value.items(), key=lambda item: str(item[0]))]]
        if isinstance(value, set | frozenset):
            return ["set", sorted(json.dumps(self.value(held), sort_keys=True) for held in sorted(value, key=str))]
        return [self.value(held) for held in value]

    def code(self, value: Any) -> Any:
        """A callable, a class or an object."""
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, types.MethodType):
            return ["method", self.value(value.__func__), self.value(value.__self__)]
        if isinstance(value, staticmethod | classmethod):
            return self.value(value.__func__)
        if isinstance(value, property):
            return ["property", self.value(value.fget)]
        if isinstance(value, functools.cached_property):
            return ["property", self.value(value.func)]
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, type):
            return self.kind(value)
        if isinstance(value, nn.Module):
            return self.network(value)
        if callable(value) and not hasattr(value, "__dict__"):
            return code_name(value)  # a function written in C, an operator of torch
        return self.object(value)

    def function(self, function: types.FunctionType) -> Any:
        module = origin(function)
        inside = ["empty" if _is_empty(cell) else self.value(cell.cell_contents) for cell in function.__closure__ or ()]
        if is_named(module):
            return [code_name(function), inside]
        given = [self.value(function.__defaults__), self.value(function.__kwdefaults__)]
        file = _installed_file(module, function.__code__)
        if file is not None:
            return [code_name(function), _file_digest(file), given, inside]
        return ["function", self.bytecode(function.__code__, function.__doc__), given, inside, self.used(function)]

    def bytecode(self, code: types.CodeType, doc: object = None) -> Any:
        constants = [
            self.bytecode(each) if isinstance(each, types.CodeType) else self.value(each)
            for place, each in enumerate(code.co_consts)
            if not (place == 0 and doc is not None and each == doc)
        ]
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        return [hashlib.sha256(code.co_code).hexdigest(), constants, list(code.co_names), list(arguments), counts]

    def used(self, function: types.FunctionType) -> Any:
        """The values of the globals that a function uses; of a module of the caller's only those attributes that it uses."""
        found: dict[str, Any] = {}
        for code in _nested(function.__code__):
            instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL")]
            for place, each in enumerate(instructions):
                if each.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or each.argval not in function.__globals__:
                    continue
                value = function.__globals__[each.argval]
                if not isinstance(value, types.ModuleType):
                    found[each.argval] = value
                elif place + 1 < len(instructions) and not is_named(value.__name__) and _installed_file(value.__name__) is None:
                    after = instructions[place + 1]
                    if after.opname in ("LOAD_ATTR", "LOAD_METHOD") and hasattr(value, after.argval):
                        found[f"{each.argval}.{after.argval}"] = getattr(value, after.argval)
        return [[name, self.value(found[name])] for name in sorted(found)]

    def kind(self, kind: type) -> Any:
        name = f"{kind.__module__}:{kind.__qualname__}"
        if is_named(kind.__module__):
            return name
        file = _installed_file(kind.__module__)
        if file is not None:
            return [name, _file_digest(file)]
        members = [
            [each, self.value(value)] for each, value in sorted(vars(kind).items()) if each not in NOT_COMPUTING and each not in CLASS_NOISE
        ]
        return ["class", kind.__qualname__, [self.value(base) for base in kind.__bases__], members]

    def network(self, module: nn.Module) -> Any:
        if id(module) in self.places:
            return ["of the model", self.places[id(module)]]
        parts: list[Any] = []
        for name, part in module.named_modules():
            tensors = [
                [each, self.value(tensor)] for each, tensor in (*part._parameters.items(), *part._buffers.items()) if tensor is not None
            ]
            parts.append([name, self.value(type(part)), tensors, self.state(part)])
        return ["network", parts]

    def object(self, value: Any) -> Any:
        kind = type(value)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return [code_name(kind), self.value(value.to_dict())]
        if is_named(kind.__module__) and kind.__module__ not in ("types", "argparse", "collections"):
            return ["object", code_name(kind), repr(value) if kind.__module__ in ("decimal", "fractions", "datetime", "pathlib") else None]
        return ["object", self.value(kind), self.state(value)]

    def state(self, value: Any) -> Any:
        """The attributes of an object, without those that its own calls change."""
        held = dict(vars(value)) if hasattr(value, "__dict__") else {}
        slots = (name for each in type(value).__mro__ for name in (vars(each).get("__slots__") or ()) if hasattr(value, name))
        held |= {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__")}
        changed = _stored(type(value))
        skipped = MODULE_INTERNALS if isinstance(value, nn.Module) else frozenset[str]()
        if _installed_file(type(value).__module__) is not None:
            # What an object of a package holds beside numbers may be anything, such as a cache or a connection.
            held = {name: each for name, each in held.items() if isinstance(each, bool | int | float | str | torch.Tensor | np.ndarray)}
        return [[name, self.value(held[name])] for name in sorted(held) if name not in skipped and name not in changed]


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - a cell that was not filled yet says so only this way
    except ValueError:
        return True
    return False


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _nested(each)
