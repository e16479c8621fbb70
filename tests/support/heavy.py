"""What ``import lmprobe_zarr`` must not import: packages that take long, or that are optional."""

from __future__ import annotations

from typing import Final

import xarray

_XARRAY: Final = tuple(int(part) for part in xarray.__version__.split(".")[:2])

HEAVY: Final = tuple(
    name
    for name in (
        "torch", "transformers", "distributed", "matplotlib", "sklearn", "scipy", "s3fs", "gcsfs", "google.cloud.storage", "adlfs",
        "azure.storage.blob", "huggingface_hub", "obstore", "shtab", "gguf", "accelerate", "tqdm",
    )
    if name != "scipy" or _XARRAY >= (2026, 4)  # before, xarray imported scipy itself
)  # fmt: skip
