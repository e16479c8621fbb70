"""Every public name says what it is, what it takes and what it gives, in numpydoc."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from paths import ROOT

import lmprobe_zarr as lz
from lmprobe_zarr import accessor, plots
from lmprobe_zarr.streaming import batches as streaming

REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
# What xarray and scikit-learn prescribe, and say themselves what it takes: one line of ours says what is special.
PRESCRIBED = ("TokenIndex.", "Probe.get_params", "Probe.set_params")
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)


def functions_of(name: str, kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for member, value in vars(kind).items():
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and not member.startswith("_"):
            yield f"{name}.{member}", function


def public() -> Iterator[tuple[str, Any]]:
    for name in lz.__all__:
        value = getattr(lz, name)
        if inspect.isclass(value):
            yield name, value
            yield from functions_of(name, value)
        elif inspect.ismodule(value):
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in value.__all__ if inspect.isroutine(getattr(value, inner)))
        else:
            yield name, value
    for kind in (accessor.ArrayAccessor, accessor.DatasetAccessor, streaming.Batches):
        yield kind.__name__, kind
        yield from functions_of(kind.__name__, kind)
    yield from ((f"plots.{name}", getattr(plots, name)) for name in plots.__all__)


def sections(doc: str) -> dict[str, str]:
    pieces = SECTION.split(inspect.cleandoc(doc))
    return {"": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


NAMES = dict(public())


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_documents_parameters_and_results(name: str) -> None:
    value = NAMES[name]
    assert value.__doc__, "it has no docstring"
    if inspect.isclass(value) or not inspect.isroutine(value) or name.startswith(PRESCRIBED):
        return
    documented = sections(value.__doc__)
    assert documented[""].strip(), "it begins without a sentence"
    signature = inspect.signature(value)
    taken = [parameter for parameter in signature.parameters if parameter not in ("self", "cls")]
    # A line of names, as "name, other : type" or "name, other".
    heads = [line.partition(" : ")[0] for line in documented.get("Parameters", "").splitlines() if line and not line.startswith(" ")]
    described = {piece.strip().lstrip("*") for head in heads for piece in head.split(",")}
    assert set(taken) <= described, f"Parameters say nothing of {sorted(set(taken) - described)}"
    assert described <= set(taken), f"Parameters describe what is not taken: {sorted(described - set(taken))}"
    gives = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    # Without arguments the first line says what comes back, which is all that there is to say.
    if taken and gives:
        assert "Returns" in documented or "Yields" in documented, "it does not say what it returns"


def test_the_reference_has_every_public_name() -> None:
    for name in lz.__all__:
        assert re.search(rf"^\.\. auto(function|class|module):: (lmprobe_zarr\.)?{name}$", REFERENCE, re.MULTILINE), name
