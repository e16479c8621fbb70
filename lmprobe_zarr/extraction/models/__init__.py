"""The model side of an extraction: prompts to an iterator of `TokenBatch`. Never a store.

``identity``, ``engines``, ``own_generation``, ``tokenizing``, ``weight_files`` and ``window`` need no torch. ``loading``, ``ready``,
``generating``, ``lens``, ``steering`` and ``watching`` need torch and transformers, so their names are imported when they are first
used; behind the last two is ``passing``. Behind ``ready`` are ``capture``, which runs transformers, and
``vllm_engine``, which has vLLM run a model. Behind ``capture`` are ``captured``,
``hooks``, ``forward``, ``head``, ``batching``, ``passes``, ``outputs``, ``continuing`` and, for models whose weights are streamed,
``by_block`` and ``scratch``, with ``streamed`` and ``checkpoint`` behind ``loading``; behind ``vllm_engine`` are ``vllm_worker`` and
``gathered``; behind ``lens`` and ``continuing`` is ``standing_in``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lmprobe_zarr.batch import PROMPT_KINDS, PromptKind, Prompts, parse_prompts, prompts_kind
from lmprobe_zarr.errors import MissingDependencyError
from lmprobe_zarr.extraction.models.chat_roles import have_same_roles
from lmprobe_zarr.extraction.models.engines import ENGINES, Engine, parse_engine
from lmprobe_zarr.extraction.models.free_memory import free_on
from lmprobe_zarr.extraction.models.identity import (
    DTYPES,
    FIXED_FIELDS,
    PROVENANCE_FIELDS,
    ModelIdentity,
    Provenance,
    cached_snapshot,
    identify,
    model_name,
    modules_field,
)
from lmprobe_zarr.extraction.models.numerics import device_types
from lmprobe_zarr.extraction.models.own_generation import own_generation
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts, length_limit, no_room, tokenize, with_answers
from lmprobe_zarr.extraction.models.weight_files import weight_files
from lmprobe_zarr.extraction.models.window import Window

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models.batching import Windows, default_batch_tokens
    from lmprobe_zarr.extraction.models.capture import Progress, run
    from lmprobe_zarr.extraction.models.continuing import StoredRows
    from lmprobe_zarr.extraction.models.generating import generate_answers
    from lmprobe_zarr.extraction.models.lens import Lens, load_lens
    from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
    from lmprobe_zarr.extraction.models.loading import load_model, load_tokenizer
    from lmprobe_zarr.extraction.models.ready import ReadyModel, run_ready, where_sites_are
    from lmprobe_zarr.extraction.models.scratch import ScratchPlace
    from lmprobe_zarr.extraction.models.site_table import SiteRow, site_rows
    from lmprobe_zarr.extraction.models.vllm_engine import start_engine

__all__ = [
    "DTYPES",
    "ENGINES",
    "FIXED_FIELDS",
    "PROMPT_KINDS",
    "PROVENANCE_FIELDS",
    "Engine",
    "Lens",
    "LoadedModel",
    "ModelIdentity",
    "Progress",
    "PromptKind",
    "Prompts",
    "Provenance",
    "ReadyModel",
    "ScratchPlace",
    "SiteRow",
    "StoredRows",
    "TokenizedPrompts",
    "Window",
    "Windows",
    "cached_snapshot",
    "default_batch_tokens",
    "device_types",
    "free_on",
    "generate_answers",
    "have_same_roles",
    "identify",
    "length_limit",
    "load_lens",
    "load_model",
    "load_tokenizer",
    "model_name",
    "modules_field",
    "no_room",
    "own_generation",
    "parse_engine",
    "parse_prompts",
    "prompts_kind",
    "run",
    "run_ready",
    "site_rows",
    "start_engine",
    "tokenize",
    "weight_files",
    "where_sites_are",
    "with_answers",
]

_NEEDS_TORCH: Final = {
    "Lens": "lens",
    "LoadedModel": "loading",
    "Progress": "capture",
    "ScratchPlace": "scratch",
    "Windows": "batching",
    "default_batch_tokens": "batching",
    "generate_answers": "generating",
    "load_lens": "lens",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "SiteRow": "site_table",
    "StoredRows": "continuing",
    "ReadyModel": "ready",
    "run": "capture",
    "run_ready": "ready",
    "site_rows": "site_table",
    "start_engine": "vllm_engine",
    "where_sites_are": "ready",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"running a model needs {error.name}, which is not installed: pip install 'lmprobe-zarr[models]'"
        ) from error
