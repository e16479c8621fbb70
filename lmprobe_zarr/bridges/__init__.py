"""Other people's files: read into `TokenBatch`, imported into a store, exported from one.

A module of one format knows its files and no store: ``lmprobe_v1``, ``lmprobe_v2``, ``lmprobe_dataset``, ``lmprobe_write``, ``arrays``,
``vllm_files``, ``saelens``, ``activault``, ``hallulens``, ``probelab``; ``raw_arrays`` and ``torch_archive`` read values in them, and
``row_source`` and ``lazy`` are what those share that can be read in place. The calls know both: ``imports``, ``tools``, ``exports``,
``legacy``; ``import_plan`` does what all imports share. ``lmprobe_cache`` is lmprobe's cache around the default store.
Other rooms import from here, from ``entry`` or ``files``. Never models, never probes.
"""

from lmprobe_zarr.bridges.exports import export_safetensors
from lmprobe_zarr.bridges.imports import (
    import_lmprobe_dataset,
    import_npy,
    import_pt,
    import_safetensors,
    import_source,
    import_tensors,
    import_vllm,
    list_models,
)
from lmprobe_zarr.bridges.legacy import open_legacy
from lmprobe_zarr.bridges.lmprobe_cache import LegacyCache, LegacyModel, beside
from lmprobe_zarr.bridges.summaries import ExportSummary, ImportSummary
from lmprobe_zarr.bridges.tools import import_activault, import_hallulens, import_probelab, import_saelens

__all__ = [
    "ExportSummary",
    "ImportSummary",
    "LegacyCache",
    "LegacyModel",
    "beside",
    "export_safetensors",
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
    "list_models",
    "open_legacy",
]
