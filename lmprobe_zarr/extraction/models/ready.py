"""A model that is ready to run, whoever runs it: transformers in this process, or an engine. What to do is handed to the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from lmprobe_zarr.batch import NO_OUTPUTS, LayerSpec, Outputs, Sites, TokenBatch
from lmprobe_zarr.extraction.models import capture
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.batching import Windows
from lmprobe_zarr.extraction.models.continuing import StoredRows
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.places import places_of
from lmprobe_zarr.extraction.models.scratch import ScratchPlace
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts
from lmprobe_zarr.extraction.models.vllm_engine import EngineModel, EngineSite

__all__ = ["ReadyModel", "run_ready", "where_sites_are"]

ReadyModel: TypeAlias = LoadedModel | EngineModel


def where_sites_are(model: ReadyModel, sites: Sites, layers: Sequence[int]) -> Mapping[str, Place | EngineSite]:
    """Where each site of a model is; raises as `places.places_of` and `vllm_engine.EngineModel.sites_of`."""
    return model.sites_of(sites, layers) if isinstance(model, EngineModel) else places_of(model, sites, layers)


def run_ready(
    model: ReadyModel,
    tokenized: TokenizedPrompts,
    *,
    layers: LayerSpec,
    sites: Sites,
    poolings: tuple[str, ...],
    parts: Mapping[str, str],
    keep_tokens: bool,
    outputs: Outputs = NO_OUTPUTS,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    windows: Windows | None = None,
    after_window: Callable[[], None] | None = None,
    start: StoredRows | None = None,
    scratch: ScratchPlace | None = None,
) -> Iterator[TokenBatch]:
    """The activations of every prompt, batch by batch; see `capture.run`.

    An engine has no `outputs`, which `Engine.check_request` refuses. It has its own order and its own memory, so no `windows` and no
    `scratch`, and it always runs whole passes.
    """
    if isinstance(model, EngineModel):
        return model.run(
            tokenized, layers=layers, sites=sites, poolings=poolings, parts=parts, keep_tokens=keep_tokens, batch_tokens=batch_tokens,
            batch_prompts=batch_prompts, progress=progress, after_window=after_window,
        )  # fmt: skip
    return capture.run(
        model, tokenized, layers=layers, sites=sites, poolings=poolings, parts=parts, keep_tokens=keep_tokens, outputs=outputs,
        batch_tokens=batch_tokens, batch_prompts=batch_prompts, progress=progress, windows=windows, after_window=after_window, start=start,
        scratch=scratch,
    )  # fmt: skip
