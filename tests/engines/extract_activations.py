"""Extractions in an environment that has vLLM: reads the calls as JSON from standard input, and prints what each returned, or its error.

Run with the Python of that environment. A call is an object of the arguments of `lmprobe_zarr.extract`, with ``model``, ``prompts`` and
``store``; ``skip_rows`` has the worker leave out the rows of some passes, as a cache of prefixes would.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def call(arguments: dict[str, Any]) -> dict[str, Any]:
    """What one extraction returns, or the kind of its error and its message."""
    import lmprobe_zarr as lz

    try:
        stats = lz.extract(arguments.pop("model"), arguments.pop("prompts"), progress=False, **arguments)
    except lz.errors.LmprobeZarrError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"found": stats.found, "extracted": stats.extracted, "tokens": stats.tokens, "group": stats.group}


if __name__ == "__main__":
    print("\n" + json.dumps([call(arguments) for arguments in json.load(sys.stdin)]))
