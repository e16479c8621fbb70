"""Imports activations from other formats into a store: one call per format.

Each call makes a source of its format; ``import_plan`` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmprobe_zarr.bridges import arrays, lmprobe_dataset, lmprobe_v1, lmprobe_v2, vllm_files
from lmprobe_zarr.bridges.entry import Skipped, Source
from lmprobe_zarr.bridges.files import open_source
from lmprobe_zarr.bridges.import_plan import ImportOptions, prompt_list, run_import, write_columns
from lmprobe_zarr.bridges.lmprobe_cache import known_name
from lmprobe_zarr.bridges.lmprobe_folders import model_hash, scan_models
from lmprobe_zarr.bridges.same_model import group_as_extracted
from lmprobe_zarr.bridges.summaries import ImportSummary, Tally
from lmprobe_zarr.errors import InvalidArgumentError, ModelNotStoredError
from lmprobe_zarr.store import PART_BYTES, Model, NamedModel, Place, Store, open_store
from lmprobe_zarr.store.format import Provenance

__all__ = [
    "import_lmprobe_dataset",
    "import_npy",
    "import_pt",
    "import_safetensors",
    "import_source",
    "import_tensors",
    "import_vllm",
]


def import_safetensors(
    cache_dir: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model | None = None,
    prompts: Iterable[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    as_model: Model | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import the entries of an lmprobe cache (safetensors, format v2) into a store.

    Parameters
    ----------
    cache_dir : path or URL
        The cache: a folder, or any URL that fsspec knows. It is only read.
    store : Store, path or URL, or a sequence of these, optional
        The store to write to; None for the default store.
    model : str or path, optional
        Only this model, as lmprobe was given it, or another path of the same folder. Also finds a folder whose file with the model's name
        is missing. None for every model of the cache.
    prompts : iterable of str, optional
        Only these, by text or by hash. Texts that the cache's manifest does not list are taken from here.
    dry_run : bool
        Only report what would be done: headers are read, nothing is written.
    strict : bool
        Raise before anything is written if anything of what is requested would be skipped.
    provenance : mapping, optional
        What is known about how the activations were computed. Activations of different provenance go into different groups.
    as_model : str or path, optional
        The folder or hub id of the model that computed them, as `extract` takes it: they then go into the group of that model as it is
        now, run in float32 on whole texts, which is how lmprobe runs one, and `extract` and `Probe` find them. `provenance` says what was
        otherwise, as ``{"compute_dtype": "bfloat16"}``. lmprobe records nothing of this, so it is taken on your word; only widths and
        numbers of layers are compared.
    storage_options : mapping, optional
        Passed to the file system of `cache_dir`.
    progress : bool
        Show a progress bar on terminals and in notebooks.
    part_bytes : int
        Bytes of activations after which a part is committed.

    Returns
    -------
    ImportSummary
        What was imported, and what was skipped and why.

    Raises
    ------
    CorruptFileError
        ``strict=True`` and something would be skipped; nothing was written.
    ModelNotStoredError
        The cache holds nothing of `model`, or no model at all.
    InvalidArgumentError
        The activations do not fit `as_model`, or not everything is known of it on this machine; nothing was written.
    ReadOnlyError, NoSpaceError
        What was committed before the error stays.

    Notes
    -----
    The attention mask says which rows are padding; they are left out. A prompt is not read again if the store holds all that the
    cache holds of it, so an interrupted import continues when it is run again. lmprobe's ``first_token`` pooling may have pooled
    padding: it is computed again from the raw layers, or left out if they are missing. A prompt of unknown text has no text in the
    store and is found by its hash; its digest is the hash and 48 zeros.
    """
    files = open_source(cache_dir, storage_options)
    wanted = None if prompts is None else prompt_list(prompts)
    tally = Tally()
    names = [] if model is None else [known_name(files, model)]
    for found in [] if model is not None else scan_models(files):
        if isinstance(found, Skipped):
            tally.add(found.reason, found.name, found.detail)
        else:
            names.append(found.model)
    if model is not None and not files.list(model_hash(names[0])):
        raise ModelNotStoredError(f"{files.url} holds nothing of {names[0]!r} (no folder {model_hash(names[0])}): check the name")
    if not names and not len(tally):
        raise ModelNotStoredError(f"{files.url} is not an lmprobe cache: it holds no folder that is named after a model's hash")
    if as_model is not None and len(names) > 1:
        names = _names_of(as_model, names)
    sources: list[tuple[str, Source]] = [(name, lmprobe_v2.LmprobeV2(files, name, prompts=wanted)) for name in names]
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance=provenance or {}, progress=progress, part_bytes=part_bytes,
        group=None if as_model is None else group_as_extracted(as_model, provenance or {}),
    )  # fmt: skip
    return run_import(sources, store, files.url, tally, options)


def list_models(cache_dir: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """The models of an lmprobe cache whose names are recorded, sorted."""
    return sorted(found.model for found in scan_models(open_source(cache_dir, storage_options)) if not isinstance(found, Skipped))


def _names_of(as_model: Model, names: Sequence[str]) -> list[str]:
    """Of the models of a cache, the one that is `as_model`."""
    named = NamedModel(as_model)
    found = [name for name in names if name == named.name or named.is_path_of(name)]
    if len(found) != 1:
        raise InvalidArgumentError(
            f"the cache holds {', '.join(map(repr, names))}: say with model= which of them was computed by as_model={named.given!r}"
        )
    return found


def import_pt(
    cache_dir: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model,
    prompts: Sequence[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    as_model: Model | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import the entries of an old lmprobe cache (``.pt`` files, format v1) into a store. The cache is only read.

    Parameters
    ----------
    cache_dir : path or URL
        The cache.
    model : str or path
        The model as lmprobe was given it: the cache does not hold its name.
    prompts : sequence of str, optional
        Texts: the cache does not hold them either. Folders of lmprobe 0.2 and 0.3 hold a whole list of prompts and are found only
        by that list, in its order; give one list per call. None for every folder of a single prompt, which is known by its hash.
    store, dry_run, strict, provenance, as_model, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    MissingDependencyError
        torch is not installed.
    ModelNotStoredError, CorruptFileError, ReadOnlyError, NoSpaceError
        As for `import_safetensors`.

    Notes
    -----
    A file that holds anything but a tensor, such as a pickle that would run code, is not loaded; the rest is imported.
    """
    files = open_source(cache_dir, storage_options)
    wanted = None if prompts is None else prompt_list(prompts)
    name = known_name(files, model)
    if not files.list(model_hash(name)):
        raise ModelNotStoredError(
            f"{files.url} holds nothing of {name!r} as lmprobe 0.2 to 0.5.5 stored it (no folder {model_hash(name)}): check the name; "
            "tensors of your own are stored by write_activations(…, pooled={'resid_mean': {layer: tensor}})"
        )
    source = lmprobe_v1.LmprobeV1(files, name, prompts=wanted)
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance=provenance or {}, progress=progress, part_bytes=part_bytes,
        group=None if as_model is None else group_as_extracted(as_model, provenance or {}),
    )  # fmt: skip
    return run_import([(name, source)], store, source.url, Tally(), options)


def import_vllm(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: Place = None,
    *,
    model: Model,
    layers: Sequence[int] | None = None,
    layer_ids: Sequence[int] | None = None,
    prompts: Mapping[int, str | Sequence[int]] | Sequence[str | Sequence[int]] | None = None,
    n_prompt: int | Mapping[int, int] | Sequence[int] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import hidden states that vLLM or speculators wrote, one safetensors file per prompt, into a store.

    The files are ``hs_<number>.safetensors`` or ``<number>-<8 hex digits>.safetensors``, with tensors ``hidden_states`` and ``token_ids``.
    Values of 8 bits (float8 e4m3fn with ``hidden_states_scales``) are stored as the float32 that they stand for.

    Parameters
    ----------
    folder : path or URL, or sequence of these
        The folder of the files, or several, of which the first wins where two hold the same prompt.
    layers : sequence of int, optional
        For each slot the block whose output it holds, counted from 0, ascending: one less than vLLM's layer ids.
    layer_ids : sequence of int, optional
        Instead of these vLLM's own layer ids, in any order: id 0 is the embeddings (``embed``), id n the output of block n − 1.
    prompts : mapping of int to (str or sequence of int), or sequence of these, optional
        Texts, or token ids without those that were generated, by the numbers of the files; a prompt without a text is identified by the
        token ids of its file.
    n_prompt : int, or mapping of int to int, or sequence of int, optional
        How many tokens of every file, or of each by its number, are the prompt's: for files with ``include_output_tokens``. Token ids in
        `prompts` say that too. Then there is a column of tokens ``generated``, 0 for the prompt's and 1 for those that were generated,
        and a file with any is identified by the token ids of both. vLLM writes no row for the last token that it generates.
    store, model, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`. The provenance has ``engine="vllm"`` unless you say otherwise.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    InvalidArgumentError
        `layers` that do not ascend, since the slots always do; or neither `layers` nor `layer_ids`, or both; or no folder; or `n_prompt`
        beside token ids in `prompts`.

    Notes
    -----
    Files that are still being written (another process holds their lock), that are empty or that end too early are passed by and named;
    import again when they are done. An engine rounds in other ways than transformers does, so its values are in a group of their own. A
    folder of which an earlier version of this package imported something, without that field, is continued in that version's group.
    """
    given = [folder] if isinstance(folder, str | os.PathLike) or not isinstance(folder, Sequence) else folder
    if not given:
        raise InvalidArgumentError("folder=[] names no folder: give the folder of the files, or a list of them")
    files = [open_source(each, storage_options) for each in given]
    source = vllm_files.VllmFiles(files, layers, layer_ids=layer_ids, prompts=prompts, n_prompt=n_prompt)
    before = provenance or {}
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance={"engine": "vllm", **before}, progress=progress, part_bytes=part_bytes, before=before
    )
    return run_import([(os.fspath(model), source)], store, source.url, Tally(), options)


def import_lmprobe_dataset(
    dataset: str | os.PathLike[str],
    store: Place = None,
    *,
    prompts: Iterable[str] | None = None,
    columns: bool = True,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    as_model: Model | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import a dataset that lmprobe's ``push_dataset`` shared (format 2) into a store.

    Activations of every token or pooled ones, the largest logits, router logits and perplexities are imported; labels and other values
    of the index become columns.

    Parameters
    ----------
    dataset : path or URL
        A folder that holds the dataset, or its repository: ``"hf://datasets/org/name"``, also with a revision,
        ``"hf://datasets/org/name@v1"``. It is only read.
    prompts : iterable of str, optional
        Only these, by text or by hash. Of the tensor files, only their rows are read.
    columns : bool
        Whether labels and other values of the prompts are imported too.
    store, dry_run, strict, provenance, as_model, storage_options, progress, part_bytes
        As for `import_safetensors`. The model's commit, where the dataset names it, is recorded as ``revision``.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    NotAStoreError
        There is no such dataset.
    UnsupportedVersionError
        It is of a later format.
    MissingDependencyError
        pyarrow, which reads its index, is not installed.
    InvalidArgumentError
        A column has the name of something that the store keeps itself; `columns=False` leaves them out.
    others
        As for `import_safetensors`.

    Notes
    -----
    Columns of lists, such as texts of tokens, are left out. A column that the store holds with other values for the same prompts is
    given those of the dataset.
    """
    files = open_source(dataset, storage_options)
    source = lmprobe_dataset.LmprobeDataset(files, None if prompts is None else prompt_list(prompts))
    known = {} if source.revision is None or as_model is not None else {"revision": source.revision}
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance={**known, **(provenance or {})}, progress=progress, part_bytes=part_bytes,
        group=None if as_model is None else group_as_extracted(as_model, provenance or {}),
    )  # fmt: skip
    target = store if isinstance(store, Store) else open_store(store)
    summary = run_import([(source.model, source)], target, source.url, Tally(), options)
    if columns and not dry_run:
        write_columns(target, summary, source.columns())
    return summary


def import_npy(
    folder: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    variable: str = "resid",
    name: str = "layer_{layer}.npy",
    offsets: str = "offsets.npy",
    dtype: str | None = None,
    hidden_size: int | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import a folder with one ``.npy`` or memory-mapped array per layer into a store.

    Parameters
    ----------
    folder : path or URL
        The folder of the files.
    prompts : sequence of str or of token ids
        The prompts, in the order of the rows.
    variable : str
        What the arrays hold: a site, such as ``resid``, with one row per token; or ``<site>_<pooling>``, such as ``resid_mean``, with one
        row per prompt, which needs no offsets.
    name : str
        The name of the files, with ``{layer}`` in the place of the number.
    offsets : str
        A ``.npy`` file of integers in the folder: where each prompt's rows begin and the last one's end, or how many rows each has.
    dtype, hidden_size : optional
        For memory-mapped files without a header, dtype and values per row; ``dtype="bfloat16"`` also for ``.npy`` files of uint16.
    store, model, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.
    """
    source = arrays.npy_layers(
        open_source(folder, storage_options), prompts, variable=variable, name=name, offsets=offsets, dtype=dtype, hidden_size=hidden_size
    )
    options = ImportOptions(dry_run=dry_run, strict=strict, provenance=provenance or {}, progress=progress, part_bytes=part_bytes)
    return run_import([(os.fspath(model), source)], store, source.url, Tally(), options)


def import_tensors(
    path: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    mapping: Mapping[str, str | Mapping[int, str]],
    offsets: str | None = None,
    mask: str | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import tensors of one safetensors file into a store.

    Parameters
    ----------
    path : path or URL
        The file.
    prompts, mapping, offsets, mask
        See `bridges.arrays.tensor_file`.
    store, model, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.
    """
    folder, _, key = os.fspath(path).rpartition("/")
    source = arrays.tensor_file(open_source(folder or ".", storage_options), key, prompts, mapping, offsets=offsets, mask=mask)
    options = ImportOptions(dry_run=dry_run, strict=strict, provenance=provenance or {}, progress=progress, part_bytes=part_bytes)
    return run_import([(os.fspath(model), source)], store, source.url, Tally(), options)


def import_source(
    source: Source,
    store: Place = None,
    *,
    model: Model,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import activations of any format into a store, from an object with the methods of `bridges.entry.Source`.

    Parameters
    ----------
    source : Source
        The foreign format in its place.
    model : str or path
        Name of the model.
    store, dry_run, strict, provenance, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.
    """
    options = ImportOptions(dry_run=dry_run, strict=strict, provenance=provenance or {}, progress=progress, part_bytes=part_bytes)
    return run_import([(os.fspath(model), source)], store, source.url, Tally(), options)
