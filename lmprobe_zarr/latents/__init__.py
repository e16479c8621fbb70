"""Latents of sparse autoencoders: encoded from stored tokens, stored beside them, and read as sparse arrays.

``sae`` is the record of an autoencoder, ``folders`` reads those of other packages, ``encoder`` computes, ``encoding`` writes, ``lists`` and
``prompt_lists`` say which latents a prompt has, ``top`` and ``sparse_rows`` read. Never trains an autoencoder, never fits a probe.
"""

from lmprobe_zarr.latents.encoding import encode
from lmprobe_zarr.latents.folders import load_sae
from lmprobe_zarr.latents.sae import SparseAutoencoder
from lmprobe_zarr.latents.sparse_rows import pool_latents, to_sparse
from lmprobe_zarr.latents.top import top_tokens

__all__ = ["SparseAutoencoder", "encode", "load_sae", "pool_latents", "to_sparse", "top_tokens"]
