"""Several saved probes in one file, without pickle: each as the bytes of its own file, the rest in JSON. Never a path or a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import NotAProbeError, UnsupportedVersionError
from lmprobe_zarr.probes.container import pack_tensors, parse_json, unpack_tensors

__all__ = ["dump_ensemble", "parse_ensemble"]

_FORMAT: Final = "lmprobe-zarr-probe-ensemble"
_VERSION: Final = 1


def dump_ensemble(members: Sequence[bytes], settings: Mapping[str, Any]) -> bytes:
    """One safetensors file of saved probes, each a tensor of bytes.

    Parameters
    ----------
    members : sequence of bytes
        As :func:`~lmprobe_zarr.probes.dump_probe` gives them.
    settings : mapping of str to JSON value
        The caller's own.
    """
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "members": len(members), "settings": dict(settings)}, allow_nan=False)
    tensors = {f"member_{number:06d}": np.frombuffer(data, np.uint8) for number, data in enumerate(members)}
    return pack_tensors(tensors, {"ensemble": text, "sha256": _digest(text, members)})


def parse_ensemble(data: bytes, where: str) -> tuple[list[bytes], dict[str, Any]]:
    """The saved probes and the settings that :func:`dump_ensemble` was given.

    Parameters
    ----------
    data : bytes
    where : str
        What the file is called in messages.

    Raises
    ------
    NotAProbeError
        No saved ensemble, or a damaged one.
    UnsupportedVersionError
        One that a newer release has written.
    """
    tensors, metadata = unpack_tensors(data, where)
    text = metadata.get("ensemble")
    document = parse_json(text, where) if text is not None else None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        remedy = "load a single probe with Probe.load" if "probe" in metadata else "give a file that ProbeEnsemble.save wrote"
        raise NotAProbeError(f"{where} is a safetensors file, but no saved ensemble: {remedy}")
    written, settings, number = document.get("version"), document.get("settings"), document.get("members")
    if type(written) is not int or written < 1:
        raise NotAProbeError(f"{where} is damaged: its version is {written!r}"[:300])
    if written > _VERSION:
        raise UnsupportedVersionError(
            f"{where} has version {written} of the format of saved ensembles, this release reads up to {_VERSION}: "
            "install a newer lmprobe-zarr"
        )
    names = [f"member_{place:06d}" for place in range(len(tensors))]
    whole = type(number) is int and number == len(tensors) > 0 and sorted(tensors) == names
    if not whole or not isinstance(settings, dict) or any(array.dtype != np.uint8 or array.ndim != 1 for array in tensors.values()):
        raise NotAProbeError(f"{where} is damaged: its members or settings are missing")
    members = [tensors[name].tobytes() for name in names]
    if metadata.get("sha256") != _digest(str(text), members):
        raise NotAProbeError(f"{where} is damaged: its digest is not that of its values; copy it again from where it was saved")
    return members, dict(settings)


def _digest(text: str, members: Sequence[bytes]) -> str:
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for member in members:
        found.update(hashlib.sha256(member).digest())
    return found.hexdigest()
