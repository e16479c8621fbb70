"""Settings of the process that change what a model computes: autocast, the precision of float32 products, the default dtype.

Each is a provenance field of its own, which is there only where the setting is not PyTorch's default. Never imports torch: where it is not
imported yet, nobody has changed anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Final

from lmprobe_zarr.extraction.models.turns import between_loads

__all__ = ["device_types", "settings_fields"]

LOWER: Final = ("tf32", "bf16")


def _torch() -> ModuleType | None:
    return sys.modules.get("torch")


def device_types(device: object = "auto", device_map: object = None) -> tuple[str, ...]:
    """The types of the devices that a model will run on, such as ``("cuda",)``; those that are known where torch is not imported.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"``: CUDA, then MPS, then the CPU.
    device_map : optional
        Where it is given, the CPU may hold a part too.
    """
    torch: Any = _torch()
    kind = str(device).partition(":")[0]
    if kind == "auto":
        kind = "cpu"
        if torch is not None:
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return (kind,) if device_map is None or kind == "cpu" else (kind, "cpu")


def _autocast(torch: Any, kinds: Iterable[str]) -> str | None:
    found = []
    for kind in kinds:
        try:
            if torch.is_autocast_enabled(kind):
                found.append(str(torch.get_autocast_dtype(kind)).removeprefix("torch."))
        except (RuntimeError, TypeError):  # a device without autocast
            continue
    return ", ".join(dict.fromkeys(found)) or None


def _read(holder: Any, *names: str) -> Any:
    """An attribute of an attribute; None where this release of torch has none, or cannot say."""
    try:
        for name in names:
            holder = getattr(holder, name)
    except (AttributeError, RuntimeError):
        return None
    return holder


def _precision(torch: Any, kinds: Iterable[str]) -> str | None:
    """What is lower than PyTorch's default, or higher, in words."""
    found = []
    for kind in kinds:
        names = {"cuda": ("cuda", "cudnn"), "cpu": ("mkldnn", "mkldnn"), "xpu": ("mkldnn", "mkldnn")}.get(kind)
        if names is None:
            continue
        products = _read(torch.backends, names[0], "matmul", "fp32_precision")
        convolutions = _read(torch.backends, names[1], "conv", "fp32_precision")
        if products is None:  # before PyTorch 2.9
            products = {"high": "tf32", "medium": "tf32" if kind == "cuda" else "bf16"}.get(torch.get_float32_matmul_precision(), "ieee")
            convolutions = "tf32" if kind == "cuda" and _read(torch.backends, "cudnn", "allow_tf32") else "ieee"
        if products in LOWER:
            found.append(f"products in {products}")
        if (kind == "cuda" and convolutions not in ("tf32", "none", None)) or (kind != "cuda" and convolutions in LOWER):
            found.append(f"convolutions in {convolutions}")
        if kind == "cuda" and _read(torch.backends, "cuda", "matmul", "allow_fp16_accumulation"):
            found.append("sums in float16")
    return ", ".join(dict.fromkeys(found)) or None


def settings_fields(kinds: Iterable[str]) -> dict[str, str]:
    """The provenance fields ``autocast``, ``float32_precision`` and ``default_dtype``, those that are not at PyTorch's default.

    Parameters
    ----------
    kinds : iterable of str
        Types of devices.
    """
    torch: Any = _torch()
    if torch is None:
        return {}
    kinds = tuple(kinds)
    default = torch.get_default_dtype()
    if default != torch.float32:
        with between_loads():  # another thread may be loading a model, for which transformers sets it
            default = torch.get_default_dtype()
    fields = {
        "autocast": _autocast(torch, kinds),
        "float32_precision": _precision(torch, kinds),
        "default_dtype": None if default == torch.float32 else str(default).removeprefix("torch."),
    }
    return {name: value for name, value in fields.items() if value is not None}
