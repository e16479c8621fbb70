"""Which functions and classes of installed modules were replaced since they were imported, by comparing them with the modules' own files.

Nothing is compared but code objects, and where a name was imported from; both are read from the compiled file that Python itself runs.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from lmprobe_zarr.extraction.models.described import bare, is_named, origin

__all__ = ["has_file", "layers_of", "reached", "replaced_in"]

# The modules of transformers that compute something, by a part of their names. The others configure, tokenize, load, save and generate.
COMPUTING: Final = re.compile(
    r"\.modeling_(?!auto|utils|outputs|tf|flax|gguf)\w+$|\.(activations|masking_utils|pytorch_utils|modeling_utils)$"
    r"|\.integrations\.(?!integration|deepspeed|fsdp|peft|ggml)\w+$"
)
# Members of a class that compute nothing.
NOT_COMPUTING: Final = (
    "__init__",
    "__init_subclass__",
    "__new__",
    "__repr__",
    "__str__",
    "extra_repr",
    "_init_weights",
    "reset_parameters",
)
# Modules of torch that every model runs through.
TORCH: Final = (
    "torch.functional", "torch.nn.functional", "torch.nn.modules.activation", "torch.nn.modules.container", "torch.nn.modules.conv",
    "torch.nn.modules.dropout", "torch.nn.modules.linear", "torch.nn.modules.module", "torch.nn.modules.normalization",
    "torch.nn.modules.sparse",
)  # fmt: skip
# Wrappers inside one another, at most.
DEPTH: Final = 8


@dataclass(frozen=True, slots=True)
class _Written:
    """What a module's file says.

    Parameters
    ----------
    codes : dict of str to set of code
        By qualified name, the code of every function and class; several where it is written in branches.
    imports : dict of str to set of tuple of str
        By the name in the module, where it was imported from: module and name.
    """

    codes: dict[str, set[types.CodeType]]
    imports: dict[str, set[tuple[str, str]]]


@functools.cache
def _written(name: str) -> _Written | None:
    """What the file of an imported module says; None where it has no file of Python code."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    read = getattr(getattr(spec, "loader", None), "get_code", None)
    try:
        code = None if read is None else read(name)
    except (OSError, ImportError, SyntaxError, ValueError, TypeError):
        return None
    if code is None or spec is None:
        return None
    codes: dict[str, set[types.CodeType]] = {}
    _collect(code, codes)
    return _Written(codes, _imports(code, spec.parent or ""))


def _collect(code: types.CodeType, codes: dict[str, set[types.CodeType]]) -> None:
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            codes.setdefault(each.co_qualname, set()).add(each)
            _collect(each, codes)


def _imports(code: types.CodeType, package: str) -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = {}
    constants: list[Any] = []
    module = name = ""
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants.append(each.argval)
        elif each.opname == "IMPORT_NAME":
            level = constants[-2] if len(constants) > 1 and isinstance(constants[-2], int) else 0
            above = package.rsplit(".", level - 1)[0] if level > 1 else package
            module = f"{above}.{each.argval}".rstrip(".") if level else str(each.argval)
        elif each.opname == "IMPORT_FROM":
            name = str(each.argval)
        elif each.opname in ("STORE_NAME", "STORE_GLOBAL") and name:
            found.setdefault(str(each.argval), set()).add((module, name))
            name = ""
    return found


def _layers(function: Any, depth: int = DEPTH) -> Iterator[types.FunctionType]:
    """A function, and those inside it that decorators wrapped."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        inner = getattr(function, "__wrapped__", None)
        if inner is not None and depth:
            yield from _layers(inner, depth - 1)
        return
    yield function
    if not depth:
        return
    held = [getattr(function, "__wrapped__", None)]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:
            continue
    for inner in held:
        if isinstance(inner, types.FunctionType) and inner is not function:
            yield from _layers(inner, depth - 1)


def _is_code_of(code: types.CodeType, module: str, qualname: str) -> bool:
    """Whether a module's file has this code under this name."""
    known = _COMPARED.get((id(code), module, qualname))
    if known is None or known[0] is not code:
        written = _written(module)
        known = code, written is not None and code in written.codes.get(qualname, ())
        _COMPARED[id(code), module, qualname] = known
    return known[1]


# Comparing code takes longer than everything else here. The code is kept, so that no id is used twice.
_COMPARED: Final[dict[tuple[int, str, str], tuple[types.CodeType, bool]]] = {}


def _is_written(function: Any, module: str, qualname: str) -> bool:
    """Whether a function is the one that a module's file has under this name, in wrappers that are written in files too."""
    layers = list(_layers(function))
    return any(_is_code_of(each.__code__, module, qualname) for each in layers) and all(map(has_file, layers))


def has_file(function: types.FunctionType) -> bool:
    """Whether a function's code is that of the file of the module in which it runs."""
    return _is_code_of(function.__code__, origin(function), function.__code__.co_qualname)


def layers_of(function: Any) -> list[types.FunctionType]:
    """The function that a callable runs, and those that decorators wrapped in it; none if it is not written in Python."""
    return list(_layers(bare(function)))


def _parts(value: Any) -> Iterator[Any]:
    """The functions of a member of a class."""
    if isinstance(value, property):
        yield from (each for each in (value.fget, value.fset) if each is not None)
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif isinstance(value, types.FunctionType | staticmethod | classmethod):
        yield getattr(value, "__func__", value)


def _is_made_by(root: str, value: Any) -> bool:
    """Whether a function that is not written in a file was made by the package itself, or by a decorator of Python."""
    module = origin(value).partition(".")[0]
    return module == root or module == "typing_extensions" or module.startswith("namedtuple_") or is_named(module)


def _replaced_members(kind: type, module: str) -> Iterator[tuple[str, Any]]:
    written = _written(module)
    codes = {} if written is None else written.codes
    for name, value in vars(kind).items():
        qualname = f"{kind.__qualname__}.{name}"
        if name in NOT_COMPUTING:
            continue
        for function in _parts(value):
            if qualname in codes:
                replaced = not _is_written(function, module, qualname)
            else:
                replaced = not _is_made_by(module.partition(".")[0], function)
            if replaced:
                yield qualname, function
        if qualname in codes and not isinstance(value, type) and not any(True for _ in _parts(value)) and _differs(value, module):
            yield qualname, value


def _differs(value: Any, module: str) -> bool:
    """Whether something that is no plain function, where a file has one, was put there by somebody else."""
    layers = layers_of(value)
    if layers:
        return isinstance(value, functools.partial) or not all(map(has_file, layers))
    return type(value).__module__.partition(".")[0] not in (module.partition(".")[0], "torch", "functools", "builtins")


def _replaced(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Names of a module whose functions, or whose methods, are not those of its file; with what they are now."""
    name = module.__name__
    written = _written(name)
    if written is None:
        return
    root = name.partition(".")[0]
    for own, value in list(vars(module).items()):
        if own in written.codes:
            if isinstance(value, type):
                if value.__module__ == name and value.__qualname__ == own:
                    yield from _replaced_members(value, name)
                elif not _was_imported(written, own, value):
                    yield own, value
            elif isinstance(value, types.FunctionType):
                if not _is_written(value, name, own) and not _was_imported(written, own, value):
                    yield own, value
            elif not _was_imported(written, own, value) and _differs(value, name):
                yield own, value
        elif own in written.imports:
            if isinstance(value, types.FunctionType | type) and origin(value) != "builtins" and not _was_imported(written, own, value):
                yield own, value
        elif isinstance(value, types.FunctionType) and not _is_made_by(root, value):
            yield own, value


def _was_imported(written: _Written, own: str, value: Any) -> bool:
    """Whether a value is what the module that a name was imported from has under that name; also where that module is gone."""
    places = written.imports.get(own, set())
    for module, name in places:
        source = sys.modules.get(module)
        if source is None or getattr(source, name, None) is value:
            return True
        if f"{module}.{name}" in sys.modules:
            return True
    return False


def reached(names: Iterable[str]) -> list[str]:
    """These modules, and those of transformers that compute and that they import from, directly or not. Only what is imported."""
    queue, seen = list(names), dict[str, None]()
    while queue:
        name = queue.pop()
        if name in seen or name not in sys.modules:
            continue
        written = _written(name)
        seen[name] = None
        for places in () if written is None else written.imports.values():
            for module, inner in places:
                queue += [each for each in (module, f"{module}.{inner}") if each.startswith("transformers.") and COMPUTING.search(each)]
    return sorted(seen)


def _foreign_in(name: str, holder: Any) -> Iterator[tuple[str, Any]]:
    """Functions that somebody put into a module or class which is not written in Python."""
    for own, value in list(vars(holder).items()):
        if isinstance(value, types.FunctionType | functools.partial) and not _is_made_by("torch", value):
            yield f"{name}.{own}", value


def replaced_in(modules: Iterable[str]) -> dict[str, Any]:
    """What was replaced in modules and in the classes that they define, and in torch's functions.

    Parameters
    ----------
    modules : iterable of str
        Names of modules, such as `reached` gives. Those that are not imported are passed over.

    Returns
    -------
    dict of str to object
        What is there now, by module and qualified name.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*modules, *TORCH]):
        module = sys.modules.get(name)
        if module is not None:
            for own, value in _replaced(module):
                found[f"{name}.{own}"] = value
    torch = sys.modules.get("torch")
    if torch is not None:
        for name, holder in (("torch", torch), ("torch.Tensor", torch.Tensor), ("torch._C._nn", torch._C._nn)):
            found |= dict(_foreign_in(name, holder))
    return found
