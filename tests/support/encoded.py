"""Stores with rows to encode, autoencoders of random weights, and what plain numpy in float64 makes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lmprobe_zarr as lz

WIDTH, LATENTS, LAYERS = 16, 40, (3, 5)
Floats = npt.NDArray[np.float64]


def write_rows(
    place: Path | str, *, n: int = 30, seed: int = 0, dtype: Any = np.float32, site: str = "resid", longest: int = 12
) -> tuple[lz.Store, dict[int, Floats]]:
    """A store of prompts of 1 to `longest` tokens, and its rows by layer in float64."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest + 1, n)
    rows = {layer: [rng.normal(0.3, 1, (count, WIDTH)).astype(dtype) for count in counts] for layer in LAYERS}
    store = lz.open_store(place)
    texts = [f"prompt {seed} {number}" for number in range(n)]
    ids = [list(range(count)) for count in counts]
    lz.write_activations(store, model="acme/toy", prompts=texts, activations={site: rows}, token_ids=ids, num_layers=6)
    return store, {layer: np.concatenate(arrays).astype(np.float64) for layer, arrays in rows.items()}


def random_sae(architecture: str = "relu", seed: int = 0, **given: Any) -> lz.SparseAutoencoder:
    """An autoencoder of random weights in float32."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    parts: dict[str, Any] = {"encoder": draw(WIDTH, LATENTS), "encoder_bias": draw(LATENTS) - 1, "input_bias": draw(WIDTH), "layer": 5}
    own: dict[str, dict[str, Any]] = {
        "relu": {}, "topk": {"k": 6}, "jumprelu": {"threshold": np.abs(draw(LATENTS)) * 3},
        "gated": {"gate_bias": draw(LATENTS), "log_magnitude": draw(LATENTS) / 2},
    }  # fmt: skip
    parts |= own[architecture]
    return lz.SparseAutoencoder(architecture=architecture, **(parts | given))  # type: ignore[arg-type]


def encoded_by_hand(sae: lz.SparseAutoencoder, rows: Floats) -> Floats:
    """All latents of each row, row by row, as the docstring of `SparseAutoencoder` says it."""
    found = np.zeros((len(rows), sae.num_latents))
    weights = sae.encoder.astype(np.float64)
    bias = np.zeros(sae.num_latents) if sae.encoder_bias is None else sae.encoder_bias.astype(np.float64)
    for number, row in enumerate(rows):
        x = row.copy()
        if sae.normalisation == "centred":
            x -= x.mean()
        elif sae.normalisation == "constant_norm":
            x *= np.sqrt(len(x)) / np.linalg.norm(x)
        elif sae.normalisation == "layer_norm":
            x = (x - x.mean()) / (np.sqrt(((x - x.mean()) ** 2).sum() / (len(x) - 1)) + 1e-5)
        x *= sae.input_scale
        if sae.input_bias is not None:
            x -= sae.input_bias
        q = weights.T @ x
        p = q + bias
        if sae.architecture == "gated":
            p = np.where(q + sae.gate_bias > 0, np.exp(sae.log_magnitude.astype(np.float64)) * q + bias, 0)
        if sae.architecture == "jumprelu":
            p = np.where(p > sae.threshold, p, 0)
        p = np.maximum(p, 0)
        if sae.k is not None:
            p[np.argsort(-p, kind="stable")[sae.k :]] = 0
        found[number] = p
    return found


def largest_by_hand(latents: Floats, k: int, threshold: float = 0.0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Values and indices of the `k` largest latents above a threshold of each row, by sorting."""
    values, indices = np.zeros((len(latents), k), np.float32), np.full((len(latents), k), -1, np.int32)
    for row, all_of_row in enumerate(latents):
        chosen = [latent for latent in np.argsort(-all_of_row, kind="stable")[:k] if all_of_row[latent] > threshold]
        values[row, : len(chosen)], indices[row, : len(chosen)] = all_of_row[chosen], chosen
    return values, indices


def dense_of(values: Any, indices: Any, num_latents: int = LATENTS) -> npt.NDArray[np.float32]:
    """Values and indices as a dense array."""
    found = np.zeros((len(values), num_latents), np.float32)
    for number in range(indices.shape[1]):
        there = indices[:, number] >= 0
        found[np.flatnonzero(there), indices[there, number]] = values[there, number]
    return found
