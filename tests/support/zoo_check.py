"""What `lmprobe_zarr` makes of a tiny model of the zoo, compared with plain transformers, one prompt at a time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import zoo
from tiny_models import tiny_tokenizer

from lmprobe_zarr.batch import parse_prompts
from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models.check import check_model

# Largest difference from transformers, relative to the largest value of a layer.
TOLERANCE: Final = 1e-5
LENGTHS: Final = (9, 3, 12, 1, 5)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One row of the page of models."""

    mapping: str
    type: str
    state: str  # found, by hand, refused, wrong, not built
    name: str = ""
    paths: dict[str, str] = field(default_factory=dict)
    padding: str = ""
    causal: bool | None = None
    layers: int = 0
    difference: float = 0.0
    from_states: float | None = None
    why: str = ""


def prompts() -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(5)
    return [generator.integers(5, 250, length) for length in LENGTHS]


def _first(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    found = output[0] if isinstance(output, tuple | list) else next(iter(output.values()))
    assert isinstance(found, torch.Tensor)
    return found


def _rows(hidden: torch.Tensor, length: int, stream: int | None) -> torch.Tensor:
    """(token, hidden) of one prompt, however the model lays it out."""
    if hidden.ndim == 4:
        assert stream is not None
        hidden = hidden[stream]
    if hidden.ndim == 3:
        hidden = hidden[:, 0] if hidden.shape[0] == length and hidden.shape[1] == 1 and length > 1 else hidden[0]
    return hidden


def alone(model: Any, blocks: list[Any], ids: np.ndarray[Any, Any], options: dict[str, Any], leading: int, stream: int | None) -> Any:
    """The output of every block, (layer, token, hidden), and the hidden states, as transformers gives them for one prompt."""
    heard: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, output: heard.append(_first(output).detach().clone()))
        for block in {id(block): block for block in blocks}.values()
    ]
    try:
        with torch.no_grad():
            given = {"input_ids": torch.from_numpy(ids)[None], "output_hidden_states": True}
            try:
                output = model(**given)  # as its users call it
            except Exception:  # noqa: BLE001 — some do not run with their own cache
                heard.clear()
                output = model(**given, **options)
    finally:
        for handle in handles:
            handle.remove()
    rows = [_rows(hidden, len(ids), stream)[leading : leading + len(ids)] for hidden in heard]
    states = getattr(output, "hidden_states", None)
    return torch.stack(rows).double().numpy(), states


def _against_states(rows: Any, states: Any) -> float | None:
    """The least largest difference of the middle layers from ``hidden_states``, whichever of its entries is the output of block 0."""
    if not states:
        return None
    best = None
    for first in (1, 0):
        worst = 0.0
        for layer in range(len(rows) - 1):
            state = states[layer + first][0] if layer + first < len(states) and states[layer + first] is not None else None
            if state is None or tuple(state.shape) != rows[layer].shape:
                worst = float("inf")
                break
            worst = max(worst, float(np.abs(state.double().numpy() - rows[layer]).max() / np.abs(rows[layer]).max()))
        best = worst if best is None else min(best, worst)
    return None if best is None or not np.isfinite(best) else best


def examine(mapping: str, model_type: str, modules: dict[str, str] | None = None) -> Outcome:
    """Build a tiny model of a type, extract it in several compositions of batches, and compare.

    A difference above `TOLERANCE` is examined once more in float64, where rounding is smaller (some models compute
    their softmax in float32 all the same) and a mistake is as large as before.
    """
    try:
        built = zoo.build(mapping, model_type)
    except zoo.NotBuiltError as error:
        return Outcome(mapping=mapping, type=model_type, state="not built", why=str(error))
    row = _compared(built, mapping, model_type, modules)
    if row.state == "wrong" and row.difference and _compared(_double(built), mapping, model_type, modules).difference <= TOLERANCE / 10:
        row.state, row.why = "by hand" if modules else "found", ""
    return row


def _double(built: zoo.Built) -> zoo.Built:
    return zoo.Built(model=built.model.double(), options=built.options)


def _compared(built: zoo.Built, mapping: str, model_type: str, modules: dict[str, str] | None) -> Outcome:
    row = Outcome(mapping=mapping, type=model_type, state="by hand" if modules else "found", name=type(built.model).__name__)
    tokenizer = tiny_tokenizer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = extraction.load_model(
                built.model, name=model_type, tokenizer=tokenizer, prompts_kind="ids", modules=modules, provenance={"zoo": True}
            )
            conduct = check_model(loaded)
    except LmprobeZarrError as error:
        row.state, row.why = "refused", str(error)
        return row
    row.paths, row.padding, row.causal, row.layers = dict(loaded.located.paths), conduct.padding, conduct.causal, loaded.num_layers
    ids = prompts()
    tokenized = extraction.tokenize(parse_prompts(ids, tokenizer=tokenizer), tokenizer)
    body = loaded.located.body
    model = body if getattr(getattr(built.model, "config", None), "is_encoder_decoder", False) else built.model
    options = {name: value for name, value in built.options.items() if name == "use_cache"} if model is built.model else {}
    truth, states = {}, []
    for number, prompt in enumerate(ids):
        rows, given = alone(model, list(loaded.located.blocks), prompt, options, conduct.layout.leading, conduct.layout.stream)
        truth[tokenized.sha256[list(tokenized.first).index(number)]] = rows
        states.append(_against_states(rows, given))
    row.from_states = None if None in states else max(s for s in states if s is not None)
    for batch_tokens in (4096, 26, 1):
        for batch in extraction.run(
            loaded, tokenized, layers=list(conduct.layers), poolings=("last_token",), keep_tokens=True, batch_tokens=batch_tokens
        ):
            counts = np.asarray(batch.n_tokens)
            ends = np.cumsum(counts)
            for place, digest in enumerate(batch.sha256):
                found = batch.tokens["resid"][:, ends[place] - counts[place] : ends[place]].astype(np.float64)
                right = truth[digest]
                if found.shape != right.shape:
                    row.state, row.why = "wrong", f"shape {found.shape} instead of {right.shape}"
                    return row
                scale = np.abs(right).max(axis=(1, 2), keepdims=True) + 1e-12
                row.difference = max(row.difference, float((np.abs(found - right) / scale).max()))
                assert np.array_equal(batch.prompts["resid_last_token"][:, place], found[:, -1].astype(batch.tokens["resid"].dtype))
    if not row.difference <= TOLERANCE:
        row.state, row.why = "wrong", f"differs by {row.difference:.2g}"
    return row
