"""The store: opening one, reading it as xarray datasets, writing activations into it.

Inner rooms, from the bottom up: ``format`` (names and bytes), ``parts`` (one part and the union of many), ``upkeep`` (removing,
merging, repairing and copying). Never models, probes or plots; of scores nothing but their charts, on the page of a published copy.
"""

from lmprobe_zarr.store.activations import as_array, write_activations
from lmprobe_zarr.store.choice import GivenProvenance, ambiguous, differences, parse_provenance
from lmprobe_zarr.store.contents import GroupContents, HeldArray, describe_view, measure_coverage
from lmprobe_zarr.store.datasets import Dtype, reads_stored, to_dataset, to_datatree
from lmprobe_zarr.store.ingest import PART_SECONDS, Ingest
from lmprobe_zarr.store.named import Model, NamedModel
from lmprobe_zarr.store.parts import PART_BYTES, part_bytes_within
from lmprobe_zarr.store.reopen import open_again
from lmprobe_zarr.store.requested import note_request
from lmprobe_zarr.store.roots import Mode
from lmprobe_zarr.store.store import Place, Store, open_store, open_to_read

__all__ = [
    "PART_BYTES",
    "PART_SECONDS",
    "Dtype",
    "GivenProvenance",
    "GroupContents",
    "HeldArray",
    "Ingest",
    "Mode",
    "Model",
    "NamedModel",
    "Place",
    "Store",
    "ambiguous",
    "as_array",
    "describe_view",
    "differences",
    "measure_coverage",
    "note_request",
    "open_again",
    "open_store",
    "open_to_read",
    "parse_provenance",
    "part_bytes_within",
    "reads_stored",
    "to_dataset",
    "to_datatree",
    "write_activations",
]
