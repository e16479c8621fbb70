"""Reads prompts and their columns from text files. Knows no model and no store."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.batch import has_utf8
from lmprobe_zarr.display import nearest
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
        Further columns to read. In ``.csv``, a column of numbers, or of true and false, is converted, and an empty cell of any column is a
        missing value, quoted or not; in ``.jsonl``, null is, and ``""`` is an empty text.

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
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        broken = next((number for number, line in lines if not has_utf8(line)), None)  # standard input may hold what is no UTF-8
        if broken is not None:
            raise InvalidArgumentError(f"{source} line {broken} is no UTF-8: convert the file, such as with iconv")
        return [line for _, line in lines], {}
    records = _read_jsonl(source, text, text_column) if kind == "jsonl" else _read_csv(source, text)
    table: dict[str, list[Any]] = {}
    for name in dict.fromkeys((text_column, *columns)):
        for number, record in records:
            if name not in record:
                there = ", ".join(map(repr, sorted(record))) or "none"
                hint = "; --text-column names the column of the prompts" if name == text_column else ""
                near = nearest(name, record)
                raise InvalidArgumentError(f"{source} line {number} has no {name!r}{near}: its columns are {there}{hint}")
            if record[name] is None and name == text_column:
                raise InvalidArgumentError(f"{source} line {number}: {name!r} is null: give a value, or leave the line out")
            if isinstance(record[name], str) and not has_utf8(record[name]):
                raise InvalidArgumentError(
                    f"{source} line {number}: {name!r} is {record[name][:40]!a}, which has a lone surrogate that no UTF-8 can "
                    "hold: mend the text, or leave the line out"
                )
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


# Not what int() and float() take, which is also 1_000, digits of other scripts, and blanks.
_INTEGER: Final = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


def _numbers(values: list[str]) -> list[Any]:
    """The values as truth values, integers or floats if all but empty cells can be read so, otherwise as texts.

    ``007`` is a text, and so are all values of a column with an integer beyond 64 bits or a number beyond the largest float: they would not
    stay the same. An empty cell is missing: NaN among floats, None among all others.
    """
    given = [value for value in values if value]
    texts = [value or None for value in values]
    words = {value.lower() for value in given}
    if given and words <= {"true", "false"}:
        return [value.lower() == "true" if value else None for value in values]
    if given and all(map(_INTEGER.fullmatch, given)):
        numbers = [int(value) if value else None for value in values]
        return texts if any(number is not None and not -(2**63) <= number < 2**63 for number in numbers) else numbers
    if given and all(map(_FLOAT.fullmatch, given)):
        floats = [float(value or "nan") for value in values]
        changed = any(math.isinf(number) and "inf" not in value.lower() for number, value in zip(floats, values, strict=True) if number)
        changed |= any(_INTEGER.fullmatch(value) is not None and abs(int(value)) > 2**53 for value in given)
        return texts if changed else floats
    return texts
