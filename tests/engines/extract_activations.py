"""Extractions in an environment that has vLLM: reads the calls as JSON from standard input, and prints what each returned, or its error.

Run with the Python of that environment. A call is an object of the arguments of `lmprobe_zarr.extract`, with ``model``, ``prompts`` and
``store``; positions of ``over`` are pairs, for slices. ``forced`` has settings that vLLM is started with although the package refuses
them, and without the check of what it started with. ``stop_after`` ends the process, as ``kill -9`` does, when so many parts are committed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def force(settings: dict[str, Any]) -> None:
    """Start vLLM with other settings than the package does, and leave the check of them out."""
    import vllm

    from lmprobe_zarr.extraction.models import vllm_engine

    start = vllm.LLM
    vllm.LLM = lambda *args, **options: start(*args, **options | settings)
    vllm_engine._check_started = lambda *_: None


def kill_after(parts: int) -> None:
    """End this process as soon as so many parts are committed."""
    from lmprobe_zarr.store.parts.writer import PartWriter

    commit, done = PartWriter.commit, []

    def committing(self: PartWriter, *args: Any, **options: Any) -> Any:
        result = commit(self, *args, **options)
        done.append(1)
        if len(done) == parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    PartWriter.commit = committing  # type: ignore[method-assign]


def call(arguments: dict[str, Any]) -> dict[str, Any]:
    """What one extraction returns, or the kind of its error and its message."""
    import lmprobe_zarr as lz

    for criteria in arguments.get("over", {}).values():
        if isinstance(criteria, dict):
            criteria["position"] = slice(*criteria["position"])
    if settings := arguments.pop("forced", None):
        force(settings)
    if parts := arguments.pop("stop_after", 0):
        kill_after(parts)
    try:
        stats = lz.extract(arguments.pop("model"), arguments.pop("prompts"), progress=False, **arguments)
    except lz.errors.LmprobeZarrError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"found": stats.found, "extracted": stats.extracted, "tokens": stats.tokens, "group": stats.group}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps([call(arguments) for arguments in json.load(sys.stdin)]) + "\n")
