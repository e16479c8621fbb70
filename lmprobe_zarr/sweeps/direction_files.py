"""Directions in files: as safetensors, whole, and as control vectors in GGUF, which llama.cpp and others apply. Never fits, and no model.

A safetensors file holds the tensors ``coef``, ``intercept`` and so on, and in its metadata what they are: JSON of dims, coordinates and
attributes. It is read without unpickling anything.

Source of the layout of control vectors: llama.cpp, ``common_control_vector_load``: float32 tensors ``direction.<layer>``, from layer 1
on, whose values are added to the output of that layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr import safetensors_file
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.tokens import find_inner_dim
from lmprobe_zarr.typing import Array, Floats

__all__ = ["load_directions", "save_directions"]

_FORMAT: Final = "lmprobe-zarr directions"
_VERSION: Final = "1"
_ENDINGS: Final = (".safetensors", ".gguf")
_UNITS: Final = ("activations", "mean_norm")


def save_directions(directions: xr.Dataset, path: str | os.PathLike[str], *, unit: str = "activations") -> None:
    """Write directions to a file; see :meth:`lmprobe_zarr.accessor.DatasetAccessor.save`."""
    if not isinstance(directions, xr.Dataset) or "coef" not in directions or find_inner_dim(directions["coef"].dims) is None:
        raise InvalidTypeError(
            "only directions can be saved, which have 'coef' over layer and hidden: those of fit_directions or fit_tokens"
        )
    if unit not in _UNITS:
        raise InvalidArgumentError(f"unit={unit!r} is unknown: use {' or '.join(map(repr, _UNITS))}")
    place = Path(path)
    if place.suffix not in _ENDINGS:
        raise InvalidArgumentError(f"{place.name!r} ends in no known format: use {' or '.join(_ENDINGS)}")
    if place.is_dir():
        raise InvalidArgumentError(f"{place} is a folder: name a file")
    # Whole or not at all: written beside its place, then moved there.
    staged = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        if place.suffix == ".gguf":
            _write_gguf(directions, staged, unit)
        else:
            if unit != "activations":
                raise InvalidArgumentError("unit= is how long the vectors of a GGUF file are: safetensors holds coefficients as they are")
            _write_safetensors(directions, staged)
        staged.replace(place)
    finally:
        staged.unlink(missing_ok=True)


def load_directions(path: str | os.PathLike[str]) -> xr.Dataset:
    """The directions of a file that ``directions.lz.save(path)`` wrote, or of another control vector in GGUF.

    Parameters
    ----------
    path : str or path
        Ends in ``.safetensors`` or ``.gguf``.

    Returns
    -------
    Dataset
        Of a safetensors file what was saved. Of a control vector ``coef`` (layer, hidden), rounded to float32: of one that was saved here,
        in its original length, with ``intercept``, ``mean_norm`` and the attributes that the file holds; of another one as it is.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CorruptFileError
        The file is damaged, or holds no directions.
    InvalidArgumentError
        Another ending.
    MissingDependencyError
        A GGUF file without the package gguf.
    """
    place = Path(path)
    if place.suffix not in _ENDINGS:
        raise InvalidArgumentError(f"{place.name!r} ends in no known format: use {' or '.join(_ENDINGS)}")
    if not place.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    try:
        return to_interchange(_read_gguf(place) if place.suffix == ".gguf" else _read_safetensors(place))
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError) as error:
        raise CorruptFileError(f"{place} holds no directions that can be read ({error}): save them again") from error


# -- safetensors ---------------------------------------------------------------------------------------------------------------


def _write_safetensors(directions: xr.Dataset, place: Path) -> None:
    tensors = {}
    for name, held in directions.data_vars.items():
        values = np.asarray(held.values)
        if values.dtype.kind not in "fbiu":
            raise InvalidTypeError(f"variable {str(name)!r} holds {values.dtype}, and a file of directions numbers: leave it out")
        tensors[str(name)] = (values, values.dtype.name)
    described = {
        "dims": {str(name): list(map(str, held.dims)) for name, held in directions.data_vars.items()},
        "coords": {
            str(name): {"dims": list(map(str, held.dims)), "values": _plain(held.values), "attrs": _plain(dict(held.attrs))}
            for name, held in directions.coords.items()
        },
        "variable_attrs": {str(name): _plain(dict(held.attrs)) for name, held in directions.data_vars.items()},
        "attrs": _plain(dict(directions.attrs)),
    }
    metadata = {"format": _FORMAT, "version": _VERSION, **_facts(directions), "xarray": json.dumps(described)}
    with place.open("wb") as file:
        file.writelines(safetensors_file.encode(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())


def _read_safetensors(place: Path) -> xr.Dataset:
    raw = place.read_bytes()
    start = safetensors_file.header_length(raw[:8])
    header = safetensors_file.parse_header(raw[:start])
    if header.metadata.get("format") != _FORMAT:
        raise ValueError("it was not written by directions.lz.save")
    if header.metadata.get("version") != _VERSION:
        raise ValueError(f"it has version {header.metadata.get('version')!r}, and this release reads {_VERSION}")
    described = json.loads(header.metadata["xarray"])
    variables = {}
    for name, tensor in header.tensors.items():
        if tensor.stop > len(raw):
            raise ValueError(f"it ends at {len(raw)} bytes, before tensor {name!r} does")
        values = np.frombuffer(raw[tensor.start : tensor.stop], np.dtype(tensor.dtype)).reshape(tensor.shape)
        variables[name] = (described["dims"][name], values.copy(), described["variable_attrs"][name])
    coords = {name: (held["dims"], np.asarray(held["values"]), held["attrs"]) for name, held in described["coords"].items()}
    found = xr.Dataset(variables, coords, described["attrs"])
    if "coef" not in found:
        raise ValueError("it holds no 'coef'")
    return found


def _plain(value: Any) -> Any:
    """Numpy's numbers, arrays and texts as those of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return value


def _facts(directions: xr.Dataset) -> dict[str, str]:
    """What other tools want to know, as texts."""
    classes = _plain(directions.attrs.get("classes", []))
    classes = json.loads(classes) if isinstance(classes, str) else classes
    layers = np.atleast_1d(directions["layer"].values).tolist() if "layer" in directions.coords else []
    points = f"towards {classes[1]!r}, away from {classes[0]!r}" if len(classes) == 2 else "towards larger predictions"
    return {
        "model": str(directions.coords["model"].item()) if "model" in directions.coords else str(directions.attrs.get("model", "")),
        "site": str(directions.attrs.get("variable", "")),
        "layers": json.dumps(layers),
        "sign": points if len(classes) <= 2 else "towards each class",
        "scale": "coefficients: score per unit of activation",
        "labels": str(directions.attrs.get("labels", "")),
    }


# -- GGUF ----------------------------------------------------------------------------------------------------------------------


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("control vectors need gguf, which is not installed: pip install 'lmprobe-zarr[gguf]'") from error
    return gguf


def _write_gguf(directions: xr.Dataset, place: Path, unit: str) -> None:
    gguf = _gguf()
    coef = directions["coef"]
    inner = find_inner_dim(coef.dims)
    if "class" in coef.dims:
        raise InvalidArgumentError("a control vector is one direction for each layer: choose a class, as directions.sel({'class': …})")
    if "layer" not in coef.coords or set(coef.dims) - {"layer", inner}:
        raise InvalidArgumentError(f"a control vector has the dims layer and hidden, and the directions have {coef.dims}")
    layers = [int(layer) for layer in np.atleast_1d(coef["layer"].values)]
    if min(layers) < 1:
        raise InvalidArgumentError(
            f"a control vector has no direction of layer {min(layers)}, which llama.cpp cannot steer: "
            "leave it out, as directions.sel(layer=slice(1, None))"
        )
    rows = np.atleast_2d(np.asarray(coef.transpose(..., inner).values, np.float64))
    lengths = np.linalg.norm(rows, axis=1)
    bad = [layer for layer, length in zip(layers, lengths, strict=True) if not np.isfinite(length) or length == 0]
    if bad:
        raise InvalidArgumentError(f"the direction of layer {bad[0]} is zero, NaN or infinite: leave the layer out")
    norms = np.ones(len(layers))
    if unit == "mean_norm":
        if "mean_norm" not in directions:
            raise InvalidArgumentError("unit='mean_norm' needs the variable 'mean_norm' of the directions, which fit_directions gives")
        norms = np.atleast_1d(np.asarray(directions["mean_norm"].values, np.float64))
    facts = _facts(directions)
    writer = gguf.GGUFWriter(place, "controlvector")
    writer.add_string("controlvector.model_hint", facts["model"])
    writer.add_uint32("controlvector.layer_count", len(layers))
    told = {**facts, "scale": f"1 {unit}: " + ("length 1" if unit == "activations" else "the mean norm of the rows that were fitted")}
    for name, text in told.items():
        writer.add_string(f"lmprobe_zarr.{name}", text)
    writer.add_string("lmprobe_zarr.format", _FORMAT)
    writer.add_string("lmprobe_zarr.attrs", json.dumps(_plain(dict(directions.attrs))))
    # What the coefficients were multiplied by.
    writer.add_array("lmprobe_zarr.factors", (norms / lengths).tolist())
    for name in ("intercept", "mean_norm"):
        if name in directions:
            writer.add_array(f"lmprobe_zarr.{name}", np.atleast_1d(np.asarray(directions[name].values, np.float64)).tolist())
    for layer, row, factor in zip(layers, rows, norms / lengths, strict=True):
        writer.add_tensor(f"direction.{layer}", (row * factor).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(place: Path) -> xr.Dataset:
    gguf = _gguf()
    reader = gguf.GGUFReader(place)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.architecture") != "controlvector":
        raise ValueError(f"it is a GGUF file of {facts.get('general.architecture')!r}, and no control vector")
    rows: dict[int, Array] = {}
    for tensor in reader.tensors:
        prefix, _, number = str(tensor.name).partition(".")
        if prefix != "direction" or not number.isdigit():
            raise ValueError(f"tensor {tensor.name!r} is no direction of a layer")
        rows[int(number)] = np.array(tensor.data, np.float64).ravel()
    if not rows or len({len(row) for row in rows.values()}) > 1:
        raise ValueError("its directions have several widths" if rows else "it has no directions")
    layers = sorted(rows)
    coef: Floats = np.stack([rows[layer] for layer in layers])
    variables: dict[str, Any] = {}
    attrs: dict[str, Any] = {}
    if facts.get("lmprobe_zarr.format") == _FORMAT:
        attrs = json.loads(facts["lmprobe_zarr.attrs"])
        coef = coef / np.asarray(facts["lmprobe_zarr.factors"], np.float64)[:, None]
        for name in ("intercept", "mean_norm"):
            if f"lmprobe_zarr.{name}" in facts:
                variables[name] = ("layer", np.asarray(facts[f"lmprobe_zarr.{name}"], np.float64))
    variables = {"coef": (("layer", "hidden"), coef), **variables}
    found = xr.Dataset(variables, {"layer": layers}, attrs)
    model = str(facts.get("controlvector.model_hint", ""))
    return found.assign_coords(model=model) if model else found
