"""The page of the architecture says what the code is: rooms, imports, and walks whose every step is called by one before it."""

from __future__ import annotations

import ast
import re

import architecture_page
import pytest
from architecture_page import ORDER, PAGE, PICTURE, modules, page, picture, walks

TEXT = PAGE.read_text(encoding="utf-8")


def without_counts(text: str) -> str:
    """The page without its counts of lines, which every change of the code changes."""
    return re.sub(r"(`[\w.]+` \|) [\d,]+ \|", r"\1", text)


def test_the_table_of_rooms_is_that_of_the_imports() -> None:
    assert without_counts(page(TEXT)) == without_counts(TEXT), "run `make pages`"


def test_the_picture_is_that_of_the_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run `make pages`"


def test_the_page_gives_the_order_as_it_is_tested() -> None:
    for rooms in ORDER:
        assert rooms in TEXT, rooms


def body_of(step: str) -> ast.AST:
    """The definition that a step of a walk names: a function, a class or a method."""
    known = modules()
    parts = step.split(".")
    module = next(".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known)
    node: ast.AST = ast.parse(known[module].read_text())
    for name in step.removeprefix(module).strip(".").split("."):
        node = next(n for n in getattr(node, "body", ()) if getattr(n, "name", None) == name)
    return node


def names_in(node: ast.AST) -> set[str]:
    """Every name that a definition uses."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return names | {alias.name for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for alias in n.names}


@pytest.mark.parametrize("walk", walks(TEXT))
def test_every_step_of_a_walk_is_called_by_one_before_it(walk: str) -> None:
    steps = walks(TEXT)[walk]
    assert len(steps) > 2
    used = names_in(body_of(steps[0]))
    for step in steps[1:]:
        # A method is called on an object, so either the method's name or its class's is in the code.
        wanted = {part for part in step.split(".")[-2:] if part.strip("_")[:1].isupper() or part == step.split(".")[-1]}
        assert used & wanted, f"no step before {step} calls it"
        used |= names_in(body_of(step))


def test_there_are_five_walks() -> None:
    assert len(walks(TEXT)) == 5
    assert architecture_page.arrows()
