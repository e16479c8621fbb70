"""Reads prompts and their columns from text files. Knows no model and no store."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.errors import InvalidArgumentError

__all__ = ["FORMATS", "read_prompts"]

FORMATS: Final = ("txt", "jsonl", "csv")


def read_prompts(
    source: str, *, file_format: str | None = None, text_column: str = "text", columns: Sequence[str] = ()
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The prompts in a file, and the requested columns.

    Parameters
    ----------
    source : str
        Path of a ``.txt`` file (a prompt per line, without surrounding blanks; empty lines are skipped), a ``.jsonl`` file (an object or
        a text per line) or a ``.csv`` file (with a header); ``-`` is standard input.
    file_format : {"txt", "jsonl", "csv"}, optional
        By default the file's ending; ``txt`` for standard input.
    text_column : str
        Column, or key of an object, that holds the prompt. In ``.jsonl`` its value may also be a list of chat messages.
    columns : sequence of str
        Further columns to read. In ``.csv``, a column of numbers, or of true and false, is converted.

    Returns
    -------
    prompts : list of str or of chats
    columns : dict of str to list

    Raises
    ------
    InvalidArgumentError
        The file cannot be read or parsed, or a column or prompt is missing; the message names the line.
    """
    kind = file_format or ("txt" if source == "-" else Path(source).suffix.removeprefix(".").lower())
    if kind not in FORMATS:
        raise InvalidArgumentError(f"{source!r} does not end in .txt, .jsonl or .csv: give its format with --format")
    if kind == "txt" and columns:
        raise InvalidArgumentError(f"a .txt file has no columns ({', '.join(columns)}): use .jsonl or .csv")
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{source!r} cannot be read: {error}") from error
    if kind == "txt":
        return [line.strip() for line in text.split("\n") if line.strip()], {}
    records = _read_jsonl(source, text, text_column) if kind == "jsonl" else _read_csv(source, text)
    table: dict[str, list[Any]] = {}
    for name in dict.fromkeys((text_column, *columns)):
        for number, record in records:
            if name not in record:
                there = ", ".join(map(repr, sorted(record))) or "none"
                raise InvalidArgumentError(f"{source} line {number} has no {name!r}: its columns are {there}")
            if record[name] is None:
                raise InvalidArgumentError(f"{source} line {number}: {name!r} is null: give a value, or leave the line out")
        table[name] = [record[name] for _, record in records]
    prompts = table[text_column]
    return prompts, {name: table[name] if kind == "jsonl" else _numbers(table[name]) for name in columns}


def _read_jsonl(source: str, text: str, text_column: str) -> list[tuple[int, dict[str, Any]]]:
    records = []
    # Not splitlines(), which also splits at U+2028 and other characters that prompts may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{source} line {number} is not JSON: {error}") from error
        if not isinstance(value, (dict, str)):
            raise InvalidArgumentError(f"{source} line {number} is neither an object nor a text")
        records.append((number, {text_column: value} if isinstance(value, str) else value))
    return records


def _read_csv(source: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise InvalidArgumentError(f"{source} has a column twice in its header: {', '.join(header)}")
        records = []
        for fields in reader:
            if fields and len(fields) != len(header):
                raise InvalidArgumentError(
                    f"{source} line {reader.line_num} has {len(fields)} fields, and the header has {len(header)}: quote fields with commas"
                )
            records += [(reader.line_num, dict(zip(header, fields, strict=True)))] if fields else []
        return records
    except csv.Error as error:
        raise InvalidArgumentError(f"{source} line {reader.line_num} is not CSV: {error}") from error


def _numbers(values: list[str]) -> list[Any]:
    """The values as booleans, integers or floats if all can be read so, otherwise as texts.

    ``007`` is a text, not a number. In a column of floats, an empty cell is NaN.
    """
    words = {value.lower() for value in values}
    if words <= {"true", "false"}:
        return [value.lower() == "true" for value in values]
    if any(value.lstrip("+-").startswith("0") and value.lstrip("+-")[1:2].isdigit() for value in values):
        return values
    for number in (int, float):
        try:
            return [number(value) if value or number is int else float("nan") for value in values]
        except ValueError:
            continue
    return values
