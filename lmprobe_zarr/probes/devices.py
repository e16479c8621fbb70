"""The device on which torch fits probes."""

from __future__ import annotations

from typing import Any

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError

__all__ = ["parse_device"]


def parse_device(device: Any, *, needed_by: str, double: bool = False) -> str:
    """The device that a fit runs on, as torch names it; ``"auto"`` takes CUDA, then the CPU.

    Parameters
    ----------
    device : str or torch.device
    needed_by : str
        What needs torch, for the message where it is not installed.
    double : bool
        Whether the fit needs float64, which MPS lacks.

    Raises
    ------
    InvalidArgumentError
        There is no such device here, or it lacks float64.
    MissingDependencyError
        torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"{needed_by} needs torch, which is not installed: pip install 'lmprobe-zarr[models]'") from error
    if isinstance(device, str) and device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        # Only using it shows whether it is there.
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() and not double else []
        raise InvalidArgumentError(f"device={str(device)!r:.60} cannot be used here: there is {', '.join(there)}, or 'auto'") from error
    if double and found.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device={str(device)!r:.60} cannot be used here, since {needed_by} needs float64: use 'cpu' or 'cuda'")
    return str(found)
