"""Results as text or as one JSON document."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import numpy as np

from lmprobe_zarr.cli.advice import for_shell

__all__ = ["as_json", "plain", "print_json", "print_text"]


def as_json(record: Any) -> dict[str, Any]:
    return dataclasses.asdict(record)


def plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def print_text(record: Any, options: argparse.Namespace) -> None:
    """Print a plan or a summary as text, with options of the command in place of arguments of Python."""
    print(for_shell(str(record), options.parser))


def print_json(document: Any) -> None:
    # JSON has no NaN; an undefined score is null.
    text = json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        # The escapes of JSON itself can be read back, unlike those of the stream. So it is for lone surrogates in UTF-8, too.
        text = json.dumps(_without_nan(document), indent=2, allow_nan=False)
    print(text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
