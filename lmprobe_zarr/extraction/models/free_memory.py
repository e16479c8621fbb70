"""How much memory a model may take on a device: of a GPU what is free, of the CPU what the system and the process's limits leave."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

__all__ = ["free_on"]

MEMINFO: Final = Path("/proc/meminfo")
STATUS: Final = Path("/proc/self/status")
GROUP: Final = Path("/sys/fs/cgroup")


def free_on(device: str) -> int | None:
    """Bytes that are free on a device, such as ``cpu`` or ``cuda:1``; None where that is not known."""
    if device.startswith("cuda"):
        torch: Any = sys.modules.get("torch")
        if torch is None:
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.partition(":")[0] != "cpu":
        return None
    limits = [limit for limit in (_available(), *_left_of_process(), _left_of_group()) if limit is not None]
    return min(limits) if limits else None


def _fields(path: Path) -> dict[str, int]:
    """Numbers by name, in the unit of the file."""
    found = {}
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0]] = int(words[1])
    return found


def _available() -> int | None:
    found = _fields(MEMINFO).get("MemAvailable")
    return None if found is None else found << 10


def _left_of_process() -> list[int]:
    """What the limits of this process leave: ``ulimit -v`` of its addresses, ``ulimit -d`` of the memory that it alone may write to."""
    try:
        import resource
    except ImportError:
        return []
    taken = _fields(STATUS)
    limits = {"VmSize": resource.getrlimit(resource.RLIMIT_AS)[0], "VmData": resource.getrlimit(resource.RLIMIT_DATA)[0]}
    return [max(0, limit - (taken[name] << 10)) for name, limit in limits.items() if limit != resource.RLIM_INFINITY and name in taken]


def _left_of_group() -> int | None:
    """What the limit of a container leaves; files that the kernel keeps in memory make room."""
    with suppress(OSError, ValueError):
        limit = int((GROUP / "memory.max").read_text(encoding="utf-8"))
        taken = int((GROUP / "memory.current").read_text(encoding="utf-8"))
        return max(0, limit - taken + _fields(GROUP / "memory.stat").get("inactive_file", 0))
    return None
