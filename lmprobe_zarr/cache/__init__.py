"""The default store as a cache: what it holds (``contents``, as records of ``info``), and what is removed from it (``removing``).

``place`` finds the store and lmprobe's own entries for both. Other rooms import from this face alone. Reads metadata only, never
activations.
"""

from lmprobe_zarr.cache.contents import cache_info, discover_cached, list_cached_prompts
from lmprobe_zarr.cache.info import CachedPrompt, CachedPromptInfo, CacheInfo, ClearSummary, ModelCacheInfo, ReadsInfo
from lmprobe_zarr.cache.removing import MIN_AGE, check_is_stored, clear_cache, clear_read_cache, evict, why_nothing_to_evict

__all__ = [
    "MIN_AGE",
    "CacheInfo",
    "CachedPrompt",
    "CachedPromptInfo",
    "ClearSummary",
    "ModelCacheInfo",
    "ReadsInfo",
    "cache_info",
    "check_is_stored",
    "clear_cache",
    "clear_read_cache",
    "discover_cached",
    "evict",
    "list_cached_prompts",
    "why_nothing_to_evict",
]
