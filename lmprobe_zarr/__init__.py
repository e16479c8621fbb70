"""Language-model activations in chunked Zarr v3 stores, sliced with xarray and probed with Dask.

>>> import lmprobe_zarr as lz
>>> store = lz.open_store("acts")  # doctest: +SKIP
>>> lz.extract("gpt2", prompts, store=store)  # doctest: +SKIP
>>> store.dataset("gpt2").resid_last_token.sel(layer=6)  # doctest: +SKIP
"""

from lmprobe_zarr import accessor as accessor  # registers ``.lz``
from lmprobe_zarr import config, errors
from lmprobe_zarr.activations import write_activations
from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.build import extract, plan_extract
from lmprobe_zarr.cache import (
    CachedPrompt,
    CachedPromptInfo,
    CacheInfo,
    ModelCacheInfo,
    cache_info,
    clear_cache,
    discover_cached,
    evict,
    list_cached_prompts,
)
from lmprobe_zarr.comparing import compare, confidence_intervals, selectivity
from lmprobe_zarr.config import set_cache_backend, set_cache_dtype, set_cache_limit
from lmprobe_zarr.directions import fit_directions
from lmprobe_zarr.index import TokenIndex
from lmprobe_zarr.log import enable_cache_logging
from lmprobe_zarr.plan import ExtractPlan, ExtractStats
from lmprobe_zarr.planning import SweepPlan, plan_sweep
from lmprobe_zarr.probe import LayerSweep, Probe
from lmprobe_zarr.report import Report, report
from lmprobe_zarr.store import Store, open_store
from lmprobe_zarr.summaries import ExportSummary, ImportSummary
from lmprobe_zarr.sweep import sweep
from lmprobe_zarr.token_masks import mask_tokens
from lmprobe_zarr.token_probes import fit_tokens, score_tokens, sweep_tokens
from lmprobe_zarr.transfer import (
    export_safetensors,
    import_npy,
    import_pt,
    import_safetensors,
    import_source,
    import_tensors,
    import_vllm,
    open_legacy,
)
from lmprobe_zarr.transferring import cosine_similarity, sweep_transfer

__version__ = "0.1.0"

__all__ = [
    "CacheInfo",
    "CachedPrompt",
    "CachedPromptInfo",
    "ExportSummary",
    "ExtractPlan",
    "ExtractStats",
    "ImportSummary",
    "LayerSweep",
    "ModelCacheInfo",
    "Probe",
    "Report",
    "Store",
    "SweepPlan",
    "TokenIndex",
    "cache_info",
    "clear_cache",
    "compare",
    "confidence_intervals",
    "config",
    "cosine_similarity",
    "discover_cached",
    "enable_cache_logging",
    "errors",
    "evict",
    "export_safetensors",
    "extract",
    "fit_directions",
    "fit_tokens",
    "import_npy",
    "import_pt",
    "import_safetensors",
    "import_source",
    "import_tensors",
    "import_vllm",
    "list_cached_prompts",
    "mask_tokens",
    "open_legacy",
    "open_store",
    "plan_extract",
    "plan_sweep",
    "prompt_hash",
    "report",
    "score_tokens",
    "selectivity",
    "set_cache_backend",
    "set_cache_dtype",
    "set_cache_limit",
    "sweep",
    "sweep_tokens",
    "sweep_transfer",
    "write_activations",
]
