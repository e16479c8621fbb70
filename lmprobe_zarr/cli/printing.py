"""Results as text or as one JSON document."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

__all__ = ["as_json", "plain", "print_json"]


def as_json(record: Any) -> dict[str, Any]:
    return dataclasses.asdict(record)


def plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def print_json(document: Any) -> None:
    # JSON has no NaN; an undefined score is null.
    text = json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate is allowed in JSON, but cannot be written to a terminal or file.
    print(text.encode("utf-8", "backslashreplace").decode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
