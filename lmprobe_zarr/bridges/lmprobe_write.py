"""Writes lmprobe's safetensors cache, format v2: one prompt at a time, each file complete or not at all.

Existing files are replaced only with ``overwrite=True``. Nothing is ever deleted, and the manifest only grows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lmprobe_zarr.batch import POOLINGS, prompt_hash
from lmprobe_zarr.bridges.lmprobe_folders import SUFFIXES, model_hash
from lmprobe_zarr.bridges.lmprobe_v2 import OF_EVERY, OF_LAST, UNPADDED
from lmprobe_zarr.errors import AlreadyCommittedError, InvalidArgumentError
from lmprobe_zarr.safetensors_file import encode
from lmprobe_zarr.storage import LocalStorage, Storage
from lmprobe_zarr.typing import Array

__all__ = ["Rows", "append_manifest", "has_place", "prompt_files", "write_file", "write_model_name"]
# Variable and layer (None without layers) to the rows of one prompt, and the dtype to write.
Rows = Mapping[tuple[str, int | None], tuple[Array, str]]

PER_TOKEN: Final = ("resid", "router", "logits", "logits_top_k_values", "logits_top_k_indices", "token_perplexity", "token_id")
PER_PROMPT: Final = ("perplexity", "logits_last_token", "logits_last_token_top_k_values", "logits_last_token_top_k_indices")


def has_place(variable: str) -> bool:
    """Whether lmprobe's format can hold a variable."""
    return variable in PER_TOKEN or variable in PER_PROMPT or variable in {f"resid_{pooling}" for pooling in POOLINGS}


def prompt_files(rows: Rows, n_tokens: int | None) -> dict[str, bytes]:
    """The contents of the files of one prompt, by suffix: activations, perplexity, logits.

    Parameters
    ----------
    rows : mapping of (str, int or None) to (ndarray, str)
        Values per token with shape (token, …); values per prompt without an axis for the prompt.
    n_tokens : int, optional
        Tokens of the prompt, without padding; needed for values per token.

    Raises
    ------
    InvalidArgumentError
        The format cannot hold a variable.
    """
    main: dict[str, tuple[Array, str]] = {}
    perplexity: dict[str, tuple[Array, str]] = {}
    logits: dict[str, tuple[Array, str]] = {}
    last: dict[str, tuple[Array, str]] = {}
    for (variable, layer), (values, dtype) in rows.items():
        if not has_place(variable):
            raise InvalidArgumentError(f"lmprobe's format has no place for {variable!r}: leave it out")
        if variable == "resid":
            main[f"layer_{layer}"] = values[None], dtype
        elif variable == "router":
            main[f"router_layer_{layer}"] = values, dtype
        elif variable == "token_id":
            perplexity["token_ids"] = values, dtype
        elif variable == "token_perplexity":
            perplexity["token_perplexity"] = values[1:], dtype  # lmprobe has none for the first token
        elif variable == "perplexity":
            perplexity["perplexity"] = values, dtype
        elif variable.startswith("logits_last_token"):
            last[variable.replace("_last_token", "")] = values[None, None], dtype
        elif variable.startswith("logits"):
            logits[variable] = values[None], dtype
        else:
            main[f"pooled_{variable.removeprefix('resid_')}_layer_{layer}"] = values[None], dtype
    if any(name.startswith("layer_") for name in main):
        main["attention_mask"] = np.ones((1, n_tokens or 0), np.int64), "int64"
    if "perplexity" not in perplexity:
        # lmprobe takes the existence of the file for a perplexity. Without a perplexity, token ids and values go into the main file.
        main |= perplexity
        perplexity = {}
    # The format holds the logits of every token or of the last one; those of every token contain those of the last.
    metadata = (UNPADDED, UNPADDED, {**UNPADDED, "logits": OF_EVERY if logits else OF_LAST})
    files = zip(SUFFIXES, (main, perplexity, logits or last), metadata, strict=True)
    return {suffix: b"".join(encode(tensors, marks)) for suffix, tensors, marks in files if tensors}


def write_file(storage: Storage, key: str, data: bytes, *, overwrite: bool) -> bool:
    """Write a file completely or not at all; False if it exists already and is left as it is.

    Without `overwrite`, no other writer's file is replaced, not even one that appears meanwhile: a local file is linked into place,
    and an object is put on condition that it does not exist. File systems without such a condition only check beforehand.

    Raises
    ------
    NoSpaceError, ReadOnlyError
    """
    # Checked first, so that an existing file with the same bytes counts as present, not as written.
    if not overwrite and storage.is_file(key):
        return False
    try:
        storage.commit(key, data, durable=False, replace=overwrite)
    except AlreadyCommittedError:
        return False
    return True


def write_model_name(storage: Storage, model: str) -> str:
    """Write the file with a model's name, unless it exists; returns the model's folder."""
    folder = model_hash(model)
    write_file(storage, f"{folder}/_model_name.txt", model.encode("utf-8", "surrogatepass"), overwrite=False)
    return folder


def append_manifest(storage: Storage, folder: str, prompts: Sequence[tuple[str, int | None]]) -> None:
    """Add lines for prompts to a model's manifest.

    In a local folder this is one append, so that lines that others append stay. On an object store the file is read and written again.

    Parameters
    ----------
    storage : Storage
        The cache.
    folder : str
        The model's folder.
    prompts : sequence of (str, int or None)
        Texts and their numbers of tokens.
    """
    if not prompts:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    # ASCII only: lmprobe takes U+2028 and similar characters, which prompts may contain, for ends of lines.
    lines = [
        json.dumps({"hash": prompt_hash(text), "prompt": text, "num_tokens": tokens, "cached_at": now}) + "\n" for text, tokens in prompts
    ]
    data, key = "".join(lines).encode(), f"{folder}/_manifest.jsonl"
    if isinstance(storage, LocalStorage):
        descriptor = os.open(f"{storage.root}/{key}", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            view = memoryview(b"\n" + data if torn else data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        return
    before = storage.read(key) if storage.is_file(key) else b""
    storage.commit(key, before + (b"\n" if before and not before.endswith(b"\n") else b"") + data, durable=False)
