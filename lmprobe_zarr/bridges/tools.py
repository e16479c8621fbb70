"""Imports of what other tools for activations write, one call per tool: SAELens, activault, HalluLens and probelab.

Each module of a tool knows its files; here its source is made, for an import and for reading in place, and given the provenance of
the tool, so that its values are never mixed with those of another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.bridges.activault import ActivaultRun
from lmprobe_zarr.bridges.entry import Entry
from lmprobe_zarr.bridges.files import open_source
from lmprobe_zarr.bridges.hallulens import HallulensCapture, HallulensZarr, open_hallulens
from lmprobe_zarr.bridges.import_plan import ImportOptions, run_import, write_columns
from lmprobe_zarr.bridges.probelab import open_probelab
from lmprobe_zarr.bridges.row_source import RowSource
from lmprobe_zarr.bridges.saelens import SaelensActivations
from lmprobe_zarr.bridges.summaries import ImportSummary, Tally
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import PART_BYTES, Model, Place, Store, open_store
from lmprobe_zarr.store.format import Provenance

__all__ = ["OPTIONS", "import_activault", "import_hallulens", "import_probelab", "import_saelens", "open_tool"]

#: What the source of each tool can be told.
OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "activault": frozenset({"mapping"}),
    "hallulens": frozenset({"responses"}),
    "probelab": frozenset({"prompts", "variable", "layers"}),
    "saelens": frozenset({"variable", "layer"}),
}


def open_tool(
    name: str,
    path: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    model: Model | None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[RowSource, str]:
    """The source of a tool's files, and the name of the model: the given one, else the one that the files name.

    Parameters
    ----------
    name : str
        A key of `OPTIONS`.
    path : path or URL
    options : mapping
        Arguments of the tool's import.
    model : str or path, optional
    storage_options : mapping, optional
        Passed to the file system.

    Raises
    ------
    InvalidArgumentError
        The model is neither given nor in the files, or an option is none of the tool's.
    others
        As for the tool's import.
    """
    unknown = sorted(set(options) - OPTIONS[name])
    if unknown:
        raise InvalidArgumentError(f"{unknown[0]!r} is no option of {name!r}: it has {', '.join(sorted(OPTIONS[name]))}")
    given = None if model is None else os.fspath(model)
    found: str | None = None
    source: RowSource
    if name == "activault":
        source = run = ActivaultRun(open_source(path, storage_options), options.get("mapping"))
        found = run.model
    elif name == "hallulens":
        source = capture = open_hallulens(open_source(path, storage_options), model=given, responses=options.get("responses", True))
        found = capture.model
    elif name == "probelab":
        source = open_probelab(path, prompts=options.get("prompts"), storage_options=storage_options, **_without(options, "prompts"))
    else:
        source = SaelensActivations(Path(path), **options)
    chosen = given if given is not None else found
    if chosen is None:
        raise InvalidArgumentError(f"{source.url} does not say which model computed it: give model=")
    return source, chosen


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def import_saelens(
    folder: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model,
    variable: str | None = None,
    layer: int | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import the activations that SAELens' ``CacheActivationsRunner`` cached into a store.

    Each context becomes a prompt, which its token ids identify. The hook is found by its name: ``blocks.3.hook_resid_post`` is `resid` of
    layer 3, and so is ``blocks.4.hook_resid_pre``.

    Parameters
    ----------
    folder : path
        A folder of this machine, as ``datasets.load_from_disk`` takes it. Its files are mapped into memory, not read as a whole.
    model : str or path
        Name of the model; SAELens does not write it into the folder.
    variable : str, optional
        What a hook is called that is no site of this package: a site, with one row per token.
    layer : int, optional
        With `variable`: its layer; None for a site without layers.
    store, dry_run, strict, provenance, progress, part_bytes
        As for `import_safetensors`. The provenance has ``engine="transformer_lens"`` unless you say otherwise.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    NotAStoreError
        There is no such dataset.
    InvalidArgumentError
        The hook is no site of this package and has no `variable`; or there are no token ids.
    CorruptFileError
        A file is damaged; or as for `import_safetensors`.
    MissingDependencyError
        pyarrow, which reads Arrow files, is not installed.

    Notes
    -----
    TransformerLens changes weights at loading unless it is told not to (``from_pretrained_no_processing``), and its residual stream then
    differs from that of transformers. So these activations are a group of their own. SAELens may keep a slice of each context
    (``seqpos_slice``), which its folder does not say: then a prompt is that slice, though more was before it when it was computed.
    """
    source, name = open_tool("saelens", folder, {"variable": variable, "layer": layer}, model=model)
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance={"engine": "transformer_lens", **(provenance or {})}, progress=progress,
        part_bytes=part_bytes,
    )  # fmt: skip
    return run_import([(name, source)], store, source.url, Tally(), options)


def import_activault(
    folder: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model | None = None,
    mapping: Mapping[str, str | Mapping[int, str]] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import a run of activault, or one of its hooks, into a store.

    Each row of ``input_ids`` becomes a prompt, which its token ids identify. Files of one uuid hold the same rows in every hook.

    Parameters
    ----------
    folder : path or URL
        The run, with ``cfg.json`` and a folder for each hook; or the folder of one hook. activault writes to S3: ``"s3://bucket/run"`` is
        read where it is, by ranges.
    model : str or path, optional
        Name of the model; None for the one that ``cfg.json`` names.
    mapping : mapping of str to (str or mapping of int to str), optional
        What hooks hold, instead of what their names say: a variable to ``{layer: hook}``, or to a name that contains ``{layer}``, as for
        `import_tensors`. Then only these hooks are read.
    store, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`. The provenance has ``engine="activault"`` unless you say otherwise.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    NotAStoreError
        It is no such folder.
    InvalidArgumentError
        Nobody says what the hooks hold, or which model it was.
    CorruptFileError
        ``cfg.json`` or a ``metadata.json`` is damaged; or as for `import_safetensors`.

    Notes
    -----
    Without `mapping`, ``blocks.3.hook_resid_post`` is `resid` of layer 3, except for the highest layer of a run: activault cuts the model
    off after it, so its states have gone through the final norm. ``models.layers.3.mlp.pre`` and ``.post`` are `mlp_input` and
    `mlp_output` of layer 3, what the module was given and returned, and ``self_attn.post`` is `attn_output`. In models that add the output
    as it is, these are the sites `mlp` and `attn`: say so with ``mapping={"mlp": "models.layers.{layer}.mlp.post"}``. Other hooks are
    skipped and named, ``self_attn.pre`` among them: by how a model calls its attention, it holds what the attention was given or the
    output of the block before.

    activault packs several texts into a row, runs them without seeing each other, and leaves special tokens out of what it writes. So a
    prompt is a row as it is stored, though more was there when it was computed.

    The files of torch are not unpickled: the description of the tensors in them is only disassembled, so torch is not needed either. A
    file that is damaged or names anything but tensors is skipped and named.

    Source: https://www.tilderesearch.com/blog/activault, ``pipeline/vault/hook_uploader.py``.
    """
    source, name = open_tool("activault", folder, {"mapping": mapping}, model=model, storage_options=storage_options)
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance={"engine": "activault", **(provenance or {})}, progress=progress, part_bytes=part_bytes
    )
    return run_import([(name, source)], store, source.url, Tally(), options)


def import_hallulens(
    folder: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model | None = None,
    responses: bool = True,
    columns: bool = True,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import what HalluLens captured into a store: a folder of memory-mapped arrays, or a Zarr group.

    Parameters
    ----------
    folder : path or URL
        The folder with ``config.json`` of an inference capture; or an ``activations.zarr``, or the folder that holds one.
    model : str or path, optional
        Name of the model; None for the one that the files name. Chooses where a Zarr group names several.
    responses : bool
        Whether the rows of the answer's tokens follow those of the prompt. They are marked by the column of tokens ``generated``.
    columns : bool
        Whether ``hallucinated`` and HalluLens' ``key`` become columns of the prompts.
    store, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`. The provenance has ``engine="hallulens"`` unless you say otherwise, and without answers
        ``responses=False``.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    NotAStoreError, UnsupportedVersionError
        It is nothing that HalluLens wrote, or of another version.
    InvalidArgumentError
        Nobody says which model it was.
    CorruptFileError
        A document or an array is damaged or missing, or has another size than the documents say; or as for `import_safetensors`.

    Notes
    -----
    Hidden state 0 is `embed`, and hidden state n `resid` of layer n − 1. The last is `last_hidden_state`, without a layer: in most models
    of transformers it has gone through the final norm, so it is not the output of the last block.

    The row of an answer's token is the one at which the model read that token, as in every other import, in both layouts. The folder
    stores with each token the row that gave it, which is one earlier; so the last token of an answer has no row. There, a prompt is known
    by its token ids, with those of the answer. In the Zarr group there are no token ids of prompts: a prompt is known by its text, with
    and without an answer.

    Prompts that were cut off, lines that contradict the arrays, and layers that were not stored are left out and named. A chunk that is
    missing is never taken for zeros.

    Source: https://github.com/hyang0129/HalluLens, ``activation_logging/``.
    """
    source, name = open_tool("hallulens", folder, {"responses": responses}, model=model, storage_options=storage_options)
    # In a Zarr group a prompt has the same name with its answer and without it, so that the two need groups of their own.
    known: Provenance = {"engine": "hallulens"} if responses else {"engine": "hallulens", "responses": False}
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance={**known, **(provenance or {})}, progress=progress, part_bytes=part_bytes
    )
    target = store if isinstance(store, Store) else open_store(store)
    summary = run_import([(name, source)], target, source.url, Tally(), options)
    if columns and not dry_run:
        assert isinstance(source, HallulensCapture | HallulensZarr)  # noqa: S101 — what that name opens
        write_columns(target, summary, source.columns_of(entry for entry in source.entries() if isinstance(entry, Entry)))
    return summary


def import_probelab(
    path: str | os.PathLike[str],
    store: Place = None,
    *,
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    variable: str | None = None,
    layers: Sequence[int] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Import activations that probelab saved into a store: a folder of memory-mapped layers, or an HDF5 file.

    Parameters
    ----------
    path : path or URL
        The folder; or the HDF5 file, of this machine.
    model : str or path
        Name of the model; probelab does not write it.
    prompts : sequence of str or of token ids
        In the order in which they were run; probelab does not write them either. Of token ids, the number is compared.
    variable : str, optional
        What was collected: None for the outputs of blocks, `resid`, which is probelab's default. For pooled activations it has to be given,
        such as ``"resid_mean"``, because the file does not say how they were pooled.
    layers : sequence of int, optional
        The blocks, from 0, that the layers of the file are, in their order. A file of one layer without an axis for it does not say
        which: then it has to be given. None for the numbers in the file.
    store, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`. The provenance has ``engine="probelab"`` unless you say otherwise.

    Returns
    -------
    ImportSummary
        What was imported, what was stored already, and what was skipped and why.

    Raises
    ------
    NotAStoreError, UnsupportedVersionError
        It is nothing that probelab saved, or of another version.
    InvalidArgumentError
        `prompts` are not as many as there are, or the layer or the pooling is nowhere said.
    CorruptFileError
        A file is damaged, missing or of another size than ``meta.json`` says; or an HDF5 file leads to other files.
    MissingDependencyError
        It is an HDF5 file, and h5py is not installed.

    Notes
    -----
    probelab rounds to bfloat16 unless it is told otherwise; these values are kept as they are. Detection masks are left out.

    Source: https://github.com/serteal/probelab, ``probelab/storage``.
    """
    given = {"prompts": prompts, "variable": variable, "layers": layers}
    source, name = open_tool("probelab", path, given, model=model, storage_options=storage_options)
    options = ImportOptions(
        dry_run=dry_run, strict=strict, provenance={"engine": "probelab", **(provenance or {})}, progress=progress, part_bytes=part_bytes
    )
    return run_import([(name, source)], store, source.url, Tally(), options)
