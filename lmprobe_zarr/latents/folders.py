"""`load_sae`: autoencoders from the folders that SAELens and dictionary_learning write. Reads files, and runs nothing that is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmprobe_zarr import safetensors_file
from lmprobe_zarr.batch import site_of_hook
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.latents.sae import Normalisation, SparseAutoencoder
from lmprobe_zarr.store import as_array
from lmprobe_zarr.typing import Array

__all__ = ["load_sae"]

_Json = Mapping[str, Any]
_SUBMODULES: Final = {"resid_post": "resid", "attention_out": "attn", "mlp_out": "mlp"}
_NORMALISATIONS: Final[Mapping[str, Normalisation]] = {"none": "none", "constant_norm_rescale": "constant_norm", "layer_norm": "layer_norm"}
_BY_AVERAGE: Final = "expected_average_only_in"


def load_sae(folder: str | os.PathLike[str], *, input_scale: float | None = None) -> SparseAutoencoder:
    """An autoencoder from a folder that SAELens or dictionary_learning wrote.

    Parameters
    ----------
    folder : str or path
        With ``cfg.json`` and ``sae_weights.safetensors`` (SAELens: standard, topk, jumprelu and gated), or with ``config.json`` and
        ``ae.pt`` (dictionary_learning: AutoEncoder, AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE,
        MatryoshkaBatchTopKSAE and JumpReluAutoEncoder; needs torch).
    input_scale : float, optional
        What rows are multiplied by, where SAELens has recorded that they were divided by their average norm, and not by how much.

    Returns
    -------
    SparseAutoencoder
        Where it was trained, if the folder says so, in the terms of this package. `dataclasses.replace` changes a field.

    Raises
    ------
    InvalidTypeError
        No path.
    InvalidArgumentError
        Neither kind of folder; an architecture, a normalisation or a reshaping that this package does not compute.
    CorruptFileError
        A file is missing, damaged, or contradicts the other.
    MissingDependencyError
        ``ae.pt`` is read with torch.

    Notes
    -----
    The layouts, and what the weights mean, were read from the sources of SAELens 6.54 (``sae_lens/saes``, and
    ``handle_pre_6_0_config`` for earlier folders; https://github.com/decoderesearch/SAELens) and of dictionary_learning 0.1
    (``dictionary.py``, ``trainers`` and ``load_dictionary``; https://github.com/saprmarks/dictionary_learning).

    SAELens: a decoder norm that its TopK is rescaled by goes into the weights. A training of which ``model_from_pretrained_kwargs`` has
    ``center_writing_weights`` saw centred rows, as TransformerLens makes them of models with layer norms, and has
    ``normalisation="centred"`` here. dictionary_learning: ``AutoEncoder`` is scaled by the norms of its decoder, as its ``load_dictionary``
    does.

    Examples
    --------
    >>> sae = lz.load_sae("sae-folder")  # doctest: +SKIP
    >>> lz.encode(store.tokens().resid, sae)  # doctest: +SKIP
    """
    if not isinstance(folder, str | os.PathLike):
        raise InvalidTypeError(f"folder is a {type(folder).__name__}: give the path of a folder, or lz.SparseAutoencoder(encoder=…, …)")
    path = Path(folder)
    if (path / "cfg.json").is_file():
        return _from_saelens(path, _document(path / "cfg.json"), input_scale)
    if (path / "config.json").is_file() and (path / "ae.pt").is_file():
        if input_scale is not None:
            raise InvalidArgumentError("input_scale is for folders of SAELens: dictionary_learning puts the scale into the biases")
        return _from_dictionary_learning(path, _document(path / "config.json"))
    raise InvalidArgumentError(
        f"{path} is no folder of an autoencoder: it has neither cfg.json, as SAELens writes it, nor config.json and ae.pt, as "
        "dictionary_learning does. Download it first, or give lz.SparseAutoencoder(encoder=…, …)"
    )


# -- SAELens ---------------------------------------------------------------------------------------------------------------


def _from_saelens(path: Path, config: _Json, input_scale: float | None) -> SparseAutoencoder:
    where = path / "cfg.json"
    config = _of_version_6(config)
    noted = config.get("metadata") or {}
    if not isinstance(noted, Mapping):
        raise CorruptFileError(f"{where} is damaged: its metadata is a {type(noted).__name__}")
    architecture = config.get("architecture")
    if architecture not in ("standard", "topk", "jumprelu", "gated"):
        raise InvalidArgumentError(
            f"{where} has architecture {architecture!r:.60}: this package encodes standard, topk, jumprelu and gated"
        )
    if noted.get("hook_head_index") is not None:
        raise InvalidArgumentError(f"{where} is of one attention head: give its rows, and lz.SparseAutoencoder(encoder=…, …)")
    weights = _safetensors(path / "sae_weights.safetensors")
    encoder = _weight(weights, "W_enc", path)
    given: dict[str, Any] = {"encoder": encoder}
    if architecture == "gated":
        given |= {
            "architecture": "gated", "encoder_bias": _weight(weights, "b_mag", path), "gate_bias": _weight(weights, "b_gate", path),
            "log_magnitude": _weight(weights, "r_mag", path),
        }  # fmt: skip
    else:
        given |= {"architecture": "relu" if architecture == "standard" else architecture, "encoder_bias": _weight(weights, "b_enc", path)}
    if architecture == "jumprelu":
        given["threshold"] = _weight(weights, "threshold", path)
    if architecture == "topk":
        given["k"] = _whole(config.get("k"), "k", where)
        if config.get("rescale_acts_by_decoder_norm"):
            norms = np.linalg.norm(_weight(weights, "W_dec", path).astype(np.float64), axis=1)
            given |= {"encoder": encoder * norms, "encoder_bias": given["encoder_bias"] * norms}
    if config.get("apply_b_dec_to_input", True):
        given["input_bias"] = _weight(weights, "b_dec", path)
    given |= _normalisation(config, noted, where, input_scale)
    given |= _place(noted) | {"model": noted.get("model_name") if isinstance(noted.get("model_name"), str) else None}
    return _made(given, path)


def _of_version_6(config: _Json) -> _Json:
    """The configuration as version 6 writes it, also of an earlier one."""
    if isinstance(config.get("metadata"), Mapping):
        return config
    hook = config.get("hook_name", config.get("hook_point"))
    options = config.get("activation_fn_kwargs") or {}
    is_top_k = config.get("activation_fn", config.get("activation_fn_str")) == "topk"
    normalised = config.get("normalize_activations")
    noted = {
        "hook_name": hook, "hook_head_index": config.get("hook_head_index", config.get("hook_point_head_index")),
        "model_name": config.get("model_name"), "model_from_pretrained_kwargs": config.get("model_from_pretrained_kwargs"),
    }  # fmt: skip
    return {
        **config,
        "architecture": "topk" if is_top_k else config.get("architecture", "standard"),
        "k": options.get("k") if isinstance(options, Mapping) else None,
        "normalize_activations": {None: "none", False: "none", True: _BY_AVERAGE}.get(normalised, normalised),
        "metadata": noted,
    }


def _normalisation(config: _Json, noted: _Json, where: Path, input_scale: float | None) -> dict[str, Any]:
    """What rows go through first."""
    kind = config.get("normalize_activations") or "none"
    options = noted.get("model_from_pretrained_kwargs")
    centred = isinstance(options, Mapping) and bool(options.get("center_writing_weights"))
    if kind == _BY_AVERAGE:
        if input_scale is None:
            raise InvalidArgumentError(
                f"{where} has normalize_activations={kind!r}: its rows were multiplied by √hidden over their average norm, which is not in "
                "the folder. Give load_sae(…, input_scale=…), or put it into the weights with SAELens, fold_activation_norm_scaling_factor"
            )
        return {"normalisation": "centred" if centred else "none", "input_scale": input_scale}
    if input_scale is not None:
        raise InvalidArgumentError(f"{where} has normalize_activations={kind!r}, which takes no input_scale: leave it out")
    if kind not in _NORMALISATIONS or (centred and kind == "constant_norm_rescale"):
        what = f"{kind!r} of centred rows" if centred else repr(kind)
        raise InvalidArgumentError(f"{where} has normalize_activations={what:.80}: this package computes {', '.join(_NORMALISATIONS)}")
    return {"normalisation": "centred" if centred and kind == "none" else _NORMALISATIONS[kind]}


def _place(noted: _Json) -> dict[str, Any]:
    """Site and layer of a hook of TransformerLens; nothing of one that is no site of this package."""
    site, layer = site_of_hook(noted.get("hook_name"))
    return ({} if site is None else {"site": site}) | ({} if layer is None else {"layer": layer})


# -- dictionary_learning ---------------------------------------------------------------------------------------------------


def _from_dictionary_learning(path: Path, config: _Json) -> SparseAutoencoder:
    where = path / "config.json"
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        raise CorruptFileError(f"{where} is damaged: it has no trainer, as dictionary_learning writes it")
    kind = trainer.get("dict_class")
    weights = _torch_weights(path / "ae.pt")

    def of(name: str) -> Array:
        return _weight(weights, name, path)

    if kind in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):
        given: dict[str, Any] = {"encoder": of("encoder.weight").T}
        if kind != "GatedAutoEncoder":
            given["encoder_bias"] = of("encoder.bias")
        bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias", "AutoEncoderNew": None}.get(kind, "b_dec")
    elif kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        given, bias = {"encoder": of("W_enc"), "encoder_bias": of("b_enc")}, "b_dec" if kind.startswith("M") else None
    else:
        raise InvalidArgumentError(f"{where} has dict_class {kind!r:.60}, which this package does not encode: give lz.SparseAutoencoder(…)")
    given["input_bias"] = None if bias is None else of(bias)
    if kind == "AutoEncoder":
        norms = np.linalg.norm(of("decoder.weight").astype(np.float64), axis=0)
        if not np.allclose(norms, 1):  # as load_dictionary decides it
            given |= {"encoder": given["encoder"] * norms, "encoder_bias": given["encoder_bias"] * norms}
    elif kind == "GatedAutoEncoder":
        given |= {"architecture": "gated", "gate_bias": of("gate_bias"), "log_magnitude": of("r_mag"), "encoder_bias": of("mag_bias")}
    elif kind == "AutoEncoderTopK":
        given |= {"architecture": "topk", "k": _whole(trainer.get("k"), "k", where)}
    elif kind != "AutoEncoderNew":
        given |= {"architecture": "jumprelu", "threshold": of("threshold")}
    submodule, layer = trainer.get("submodule_name"), trainer.get("layer")
    site = next((site for begin, site in _SUBMODULES.items() if str(submodule).startswith(begin)), None)
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        given["layer"] = layer
    given |= {"site": site, "model": trainer.get("lm_name") if isinstance(trainer.get("lm_name"), str) else None}
    return _made(given, path)


# -- files -----------------------------------------------------------------------------------------------------------------


def _made(given: Mapping[str, Any], path: Path) -> SparseAutoencoder:
    try:
        return SparseAutoencoder(**given)
    except (InvalidArgumentError, InvalidTypeError) as error:
        raise CorruptFileError(f"{path} holds no autoencoder: {error}") from error


def _document(path: Path) -> _Json:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no JSON: download it again") from error
    if not isinstance(document, Mapping):
        raise CorruptFileError(f"{path} is a JSON {type(document).__name__}, not an object: download it again")
    return document


def _whole(value: Any, name: str, where: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CorruptFileError(f"{where} has {name}={value!r:.40}, which is no whole number: download it again")
    return value


def _weight(weights: Mapping[str, Array], name: str, path: Path) -> Array:
    if name not in weights:
        raise CorruptFileError(f"the weights in {path} lack {name!r}: they have {', '.join(sorted(weights))[:200]}")
    return weights[name]


def _safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a file, bfloat16 widened."""
    try:
        raw = path.read_bytes()
        header = safetensors_file.parse_header(raw[: safetensors_file.header_length(raw[:8])])
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} is missing, which belongs to its cfg.json: download it too") from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from error
    if header.size != len(raw):
        raise CorruptFileError(f"{path} is damaged: it has {len(raw)} bytes, and its header tells of {header.size}")
    found: dict[str, Array] = {}
    for name, tensor in header.tensors.items():
        data = raw[tensor.start : tensor.stop]
        if tensor.dtype == "bfloat16":
            found[name] = safetensors_file.widen_bfloat16(np.frombuffer(data, "<u2")).reshape(tensor.shape)
        elif safetensors_file.itemsize_of(tensor.dtype) is not None:
            found[name] = np.frombuffer(data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)
    return found


def _torch_weights(path: Path) -> dict[str, Array]:
    """The tensors of a file of torch, of which nothing is run."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f'{path} is read with torch: pip install "lmprobe-zarr[models]"') from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CorruptFileError(f"{path} is damaged, or holds more than tensors ({type(error).__name__}): download it again") from error
    if isinstance(held, Mapping) and "ae" in held:
        raise InvalidArgumentError(f"{path} is a backup from the middle of a training: give the folder of one that has ended")
    if not isinstance(held, Mapping) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise CorruptFileError(f"{path} holds no weights by name: download it again")
    return {str(name): as_array(value)[0] if value.is_floating_point() else np.asarray(value) for name, value in held.items()}
