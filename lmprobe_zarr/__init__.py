"""Language-model activations in chunked Zarr v3 stores, sliced with xarray and probed with Dask.

Examples
--------
>>> import lmprobe_zarr as lz
>>> store = lz.open_store("acts")  # doctest: +SKIP
>>> lz.extract("gpt2", prompts, store=store)  # doctest: +SKIP
>>> store.dataset("gpt2").resid_last_token.sel(layer=6)  # doctest: +SKIP
"""

from __future__ import annotations

# Imported for what it does: it registers ``.lz`` with xarray.
import lmprobe_zarr.accessor  # noqa: F401
from lmprobe_zarr.batch import Generate, prompt_hash
from lmprobe_zarr.bridges import (
    ExportSummary,
    ImportSummary,
    export_safetensors,
    import_activault,
    import_hallulens,
    import_lmprobe_dataset,
    import_npy,
    import_probelab,
    import_pt,
    import_saelens,
    import_safetensors,
    import_source,
    import_tensors,
    import_vllm,
    open_legacy,
)
from lmprobe_zarr.cache import (
    CachedPrompt,
    CachedPromptInfo,
    CacheInfo,
    ModelCacheInfo,
    cache_info,
    clear_cache,
    clear_read_cache,
    discover_cached,
    evict,
    list_cached_prompts,
)
from lmprobe_zarr.config import set_cache_backend, set_cache_dtype, set_cache_limit
from lmprobe_zarr.extraction import ExtractPlan, ExtractStats, Watch, extract, list_sites, logit_lens, plan_extract, steer, watch
from lmprobe_zarr.latents import SparseAutoencoder, encode, load_sae, pool_latents, top_tokens
from lmprobe_zarr.log import enable_cache_logging
from lmprobe_zarr.probe import LayerSweep, Probe
from lmprobe_zarr.probe_ensemble import ProbeEnsemble
from lmprobe_zarr.reports import Report, report
from lmprobe_zarr.store import Store, open_store, write_activations
from lmprobe_zarr.streaming import compare_groups
from lmprobe_zarr.sweeps import (
    SweepPlan,
    compare,
    confidence_intervals,
    cosine_similarity,
    fit_directions,
    fit_tokens,
    load_directions,
    plan_sweep,
    pooling_weights,
    score_tokens,
    selectivity,
    sweep,
    sweep_tokens,
    sweep_transfer,
)
from lmprobe_zarr.tokens import TokenIndex, mask_tokens
from lmprobe_zarr.version import __version__ as __version__

__all__ = [
    "CacheInfo",
    "CachedPrompt",
    "CachedPromptInfo",
    "ExportSummary",
    "ExtractPlan",
    "ExtractStats",
    "Generate",
    "ImportSummary",
    "LayerSweep",
    "ModelCacheInfo",
    "Probe",
    "ProbeEnsemble",
    "Report",
    "SparseAutoencoder",
    "Store",
    "SweepPlan",
    "TokenIndex",
    "Watch",
    "cache_info",
    "clear_cache",
    "clear_read_cache",
    "compare",
    "compare_groups",
    "confidence_intervals",
    "config",
    "cosine_similarity",
    "discover_cached",
    "enable_cache_logging",
    "encode",
    "errors",
    "evict",
    "export_safetensors",
    "extract",
    "fit_directions",
    "fit_tokens",
    "import_activault",
    "import_hallulens",
    "import_lmprobe_dataset",
    "import_npy",
    "import_probelab",
    "import_pt",
    "import_saelens",
    "import_safetensors",
    "import_source",
    "import_tensors",
    "import_vllm",
    "list_cached_prompts",
    "list_sites",
    "load_directions",
    "load_sae",
    "logit_lens",
    "mask_tokens",
    "open_legacy",
    "open_store",
    "plan_extract",
    "plan_sweep",
    "pool_latents",
    "pooling_weights",
    "prompt_hash",
    "report",
    "score_tokens",
    "selectivity",
    "set_cache_backend",
    "set_cache_dtype",
    "set_cache_limit",
    "steer",
    "sweep",
    "sweep_tokens",
    "sweep_transfer",
    "top_tokens",
    "watch",
    "write_activations",
]
