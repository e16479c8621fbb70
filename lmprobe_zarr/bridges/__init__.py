"""Other people's files: read into `TokenBatch`, imported into a store, exported from one.

The modules of one format each know no store: ``lmprobe_v1``, ``lmprobe_v2``, ``lmprobe_write`` and ``arrays``. The calls do: ``imports``,
``exports`` and ``lmprobe_lazy``. Others import from here, from ``entry`` or from ``files``. Never models, never probes.
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
