"""The default store as a cache: what it holds (``looking``, as records of ``info``), and what is removed from it (``removing``).

Others import from this face alone. It reads metadata only, never activations.
"""

from lmprobe_zarr.cache.info import CachedPrompt, CachedPromptInfo, CacheInfo, ModelCacheInfo
from lmprobe_zarr.cache.looking import cache_info, discover_cached, list_cached_prompts
from lmprobe_zarr.cache.removing import clear_cache, evict

__all__ = [
    "CacheInfo",
    "CachedPrompt",
    "CachedPromptInfo",
    "ModelCacheInfo",
    "cache_info",
    "clear_cache",
    "discover_cached",
    "evict",
    "list_cached_prompts",
]
