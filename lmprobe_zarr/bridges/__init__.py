"""Other people's files: read into `TokenBatch`, imported into a store, exported from one.

A module of one format (``lmprobe_v1``, ``lmprobe_v2``, ``lmprobe_write``, ``arrays``) knows its files and no store; ``imports`` and
``exports`` hold the calls and know both. Other rooms import from here, from ``entry`` or ``files``.
Never models, never probes.
"""

from lmprobe_zarr.bridges.exports import export_safetensors
from lmprobe_zarr.bridges.imports import import_npy, import_pt, import_safetensors, import_source, import_tensors, import_vllm
from lmprobe_zarr.bridges.lmprobe_cache import LegacyCache, LegacyModel, beside
from lmprobe_zarr.bridges.lmprobe_lazy import open_legacy
from lmprobe_zarr.bridges.summaries import ExportSummary, ImportSummary

__all__ = [
    "ExportSummary",
    "ImportSummary",
    "LegacyCache",
    "LegacyModel",
    "beside",
    "export_safetensors",
    "import_npy",
    "import_pt",
    "import_safetensors",
    "import_source",
    "import_tensors",
    "import_vllm",
    "open_legacy",
]
