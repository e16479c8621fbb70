"""What is known of a model from its files alone: its provenance fields and its size. Never torch, weights in memory, or the network.

The fields, the same whether they come from here or from a loaded model:

``revision``
    The hub's commit; None for a folder or a model object.
``weights``
    ``sha256:…`` over a local folder's weight files and its configuration. For a model object ``bits:…``, a fingerprint of every tensor,
    module and setting. None for a hub model, which its commit identifies.
``compute_dtype``
    ``float32``, ``float16``, ``bfloat16`` or ``float64``.
``quantization``
    None, or the method and a digest of its settings.
``adapter``
    None, or the active PEFT adapters' names and a digest of their settings.
``tokenizer``
    ``sha256:…`` over the tokenizer's files, or over a tokenizer object's content; None for the one that a hub model's commit holds.
``special_tokens``
    True for texts, False for rendered chats (which have them already), None for token ids.
``chat_template``
    ``sha256:…`` of the template for chats, otherwise None.
``truncation``
    The limit in tokens where truncation was allowed, otherwise None.
``modules``
    None, or as JSON the names that the caller gave for the modules of the model.

A caller may add fields, such as ``provenance={"steering": "…"}``, for what these do not show.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.batch import PROMPT_KINDS, PromptKind
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, ModelNotFoundError
from lmprobe_zarr.extraction.models.tokenizing import length_limit

__all__ = ["DTYPES", "PROVENANCE_FIELDS", "ModelIdentity", "Provenance", "identify", "model_name"]

Provenance = dict[str, str | int | float | bool | None]
Config = Mapping[str, Any]

DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
PROVENANCE_FIELDS: Final = (
    "revision",
    "weights",
    "compute_dtype",
    "quantization",
    "adapter",
    "tokenizer",
    "special_tokens",
    "chat_template",
    "truncation",
    "modules",
)
TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# They tell who wrote the configuration, not what the model computes. The dtype is a field of its own.
CONFIG_NOISE: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# Their position ids begin after the id of the padding token, which shortens the window.
OFFSET_POSITIONS: Final = ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
# A file changed more recently may change again within the same tick of the file system's clock.
SETTLED_SECONDS: Final = 2.0
READ_BYTES: Final = 1 << 22
WEIGHT_ENDINGS: Final = (".bin", ".safetensors")
# Settings of a tokenizer object that change its tokens and are not in its backend.
TOKENIZER_SETTINGS: Final = ("truncation_side", "split_special_tokens", "add_bos_token", "add_eos_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What is known of a model before it is loaded.

    Parameters
    ----------
    name : str
        Its name in a store.
    provenance : dict
        Only the known fields.
    num_layers, hidden_size, context_length, vocab_size : int or None
        From ``config.json``; None where unknown.
    num_experts : int or None
        Of every layer that has experts, from ``config.json``; None where it names none.
    model_type : str or None
        The architecture's name in ``config.json``.
    """

    name: str
    provenance: Provenance = field(default_factory=dict)
    num_layers: int | None = None
    hidden_size: int | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    num_experts: int | None = None
    model_type: str | None = None


# ---------------------------------------------------------------- configuration


def text_config(config: Config) -> Config:
    """The language model's part of a configuration: itself, or the ``text_config`` of a multimodal one."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def first_int(config: Config, names: Iterable[str]) -> int | None:
    """The first of these settings that is a positive number."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def num_layers_of(config: Config) -> int | None:
    return first_int(text_config(config), ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))


def hidden_size_of(config: Config) -> int | None:
    return first_int(text_config(config), ("hidden_size", "n_embd", "d_model", "dim"))


def num_experts_of(config: Config) -> int | None:
    return first_int(text_config(config), ("num_local_experts", "num_experts", "n_routed_experts"))


def context_length_of(config: Config) -> int | None:
    """The most tokens that the model takes at once, or None where its configuration does not say."""
    part = text_config(config)
    window = first_int(part, ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"))
    if window is not None and part.get("model_type") in OFFSET_POSITIONS:
        padding = part.get("pad_token_id")
        window -= (1 if padding is None else int(padding)) + 1
    return window


def _dtype_name(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidArgumentError(f"dtype={dtype!r} is none that activations are kept in: use 'auto', {', '.join(map(repr, DTYPES))}")
    return name


def resolve_dtype(config: Config | None, dtype: object = "auto") -> str | None:
    """The dtype that a model is to be computed in.

    Parameters
    ----------
    config : mapping or None
        Content of ``config.json``; None where it is unknown.
    dtype : str or torch.dtype
        ``"auto"``: what the configuration names, float32 where it names none.

    Raises
    ------
    InvalidArgumentError
        Not a floating dtype that numpy, or float32, can hold.
    """
    if dtype != "auto":
        return _dtype_name(dtype)
    if config is None:
        return None
    for part in (config, text_config(config)):
        for key in ("dtype", "torch_dtype"):
            named = part.get(key)
            if named is not None and str(named) != "auto":
                return _dtype_name(named)
    return "float32"


def settings_digest(settings: object) -> str:
    """A short digest of plain settings, the same for the same values."""

    def plain(value: object) -> object:
        # The order of a set of strings differs from process to process.
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)

    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def quantization_of(config: Config) -> str | None:
    """The quantisation that a configuration names: its method and a digest of its settings."""
    settings = config.get("quantization_config")
    if settings is None:
        return None
    plain = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
    return f"{str(plain.get('quant_method', 'unknown')).rpartition('.')[2].lower()}:{settings_digest(plain)}"


# ---------------------------------------------------------------- files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    ModelNotFoundError
        The file is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(path)!r} cannot be read as JSON ({error}): download the model again") from error
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{str(path)!r} holds a {type(content).__name__}, not a JSON object: download the model again")
    return content


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_memory(memory: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8")) if memory is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_memory(memory: Path, learned: Mapping[str, Any]) -> None:
    """Remember digests, if the file can be written; otherwise they are computed again."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        # Read again, because another process may have added digests.
        content = {**_read_memory(memory), **learned}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=memory.parent, prefix=memory.name, suffix=".tmp", delete=False) as file:
            json.dump(content, file)
        try:
            Path(file.name).replace(memory)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
    except OSError:
        return


def _file_digests(files: list[Path], memory: Path | None) -> list[str]:
    """The sha256 of every file; for files that have not changed since, the remembered one."""
    known = _read_memory(memory)
    stats = [os.stat(path.resolve()) for path in files]  # noqa: PTH116 - one call for size and time, links followed
    keys = [str(path.resolve()) for path in files]

    def remembered(number: int) -> str | None:
        entry = known.get(keys[number])
        wanted = {"size": stats[number].st_size, "mtime_ns": stats[number].st_mtime_ns}
        if isinstance(entry, dict) and {k: entry.get(k) for k in wanted} == wanted and isinstance(entry.get("sha256"), str):
            return str(entry["sha256"])
        return None

    digests = [remembered(n) for n in range(len(files))]
    unknown = [n for n, digest in enumerate(digests) if digest is None]
    with ThreadPoolExecutor(max(1, min(4, len(unknown)))) as pool:
        for n, digest in zip(unknown, pool.map(lambda n: _file_sha256(files[n]), unknown), strict=True):
            digests[n] = digest
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    learned = {
        keys[n]: {"size": stats[n].st_size, "mtime_ns": stats[n].st_mtime_ns, "sha256": digests[n]}
        for n in unknown
        if stats[n].st_mtime_ns < settled
    }
    if memory is not None and learned:
        _write_memory(memory, learned)
    return [str(digest) for digest in digests]


def weights_digest(folder: Path, memory: Path | None = None) -> str | None:
    """``sha256:…`` over a model folder's weights, configuration and own code; None where it holds no weights.

    Covers every file that transformers might load, and those settings of the configuration that change the computation.
    """
    weights = sorted(path for ending in WEIGHT_ENDINGS for path in folder.glob(f"*{ending}"))
    if not weights:
        return None
    files = weights + sorted(folder.glob("*.index.json")) + sorted(folder.glob("*.py"))
    digest = hashlib.sha256()
    for path, content in zip(files, _file_digests(files, memory), strict=True):
        digest.update(f"{path.name}\0{content}\n".encode())
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in CONFIG_NOISE}
    digest.update(json.dumps(config, sort_keys=True).encode())
    return "sha256:" + digest.hexdigest()


def tokenizer_digest(folder: Path) -> str | None:
    """``sha256:…`` over the tokenizer's files in a folder; None where there are none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{_file_sha256(path)}\n".encode())
    return "sha256:" + digest.hexdigest()


def tokenizer_object_digest(tokenizer: Any) -> str:
    """``sha256:…`` over the content of a loaded tokenizer, without its current padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is not None:
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None
    else:
        special = getattr(tokenizer, "special_tokens_map", {})
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "special": special}
        settings = getattr(tokenizer, "init_kwargs", {})
        # The paths of its files do not matter.
        content["init"] = {str(k): v for k, v in settings.items() if not str(k).endswith(("_file", "name_or_path", "chat_template"))}
    content["settings"] = {name: getattr(tokenizer, name, None) for name in TOKENIZER_SETTINGS}
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def template_digest(template: object) -> str | None:
    """``sha256:…`` of a chat template; for several named templates, of the one called ``default``."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        template = template.get("default")
    return None if not isinstance(template, str) else "sha256:" + hashlib.sha256(template.encode()).hexdigest()


def _template_in(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return template_digest((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    settings = folder / "tokenizer_config.json"
    return template_digest(read_json(settings).get("chat_template")) if settings.is_file() else None


# ---------------------------------------------------------------- where a model is


def local_folder(model: str | os.PathLike[str]) -> Path | None:
    """The model's folder, or None for a hub id.

    Raises
    ------
    ModelNotFoundError
        A path where there is nothing, a file, a folder without ``config.json``, or one with an adapter.
    InvalidTypeError
        Neither a text nor a path.
    """
    if not isinstance(model, str | os.PathLike):
        raise InvalidTypeError(f"model is a {type(model).__name__}: give a folder, a hub id, or a loaded model with name='…'")
    given = os.fspath(model)
    path = Path(given).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            # Also an error beside a whole model, because transformers would apply the adapter silently.
            raise ModelNotFoundError(
                f"model {given!r} holds an adapter (adapter_config.json): load it onto its base model with peft, and pass that object with "
                "name='…'; or move that file away to use the model without it"
            )
        if (path / "config.json").is_file():
            return path.resolve()
        raise ModelNotFoundError(f"model {given!r} is a folder without config.json: give the folder that save_pretrained wrote")
    if path.exists():
        raise ModelNotFoundError(f"model {given!r} is a file: give the folder that contains it")
    if isinstance(model, os.PathLike) or not HUB_ID.fullmatch(given):
        raise ModelNotFoundError(
            f"model {given!r} does not exist: tried the folder {str(path.absolute())!r}, and it is no hub id (owner/name)"
        )
    return None


def model_name(model: str | os.PathLike[str], name: str | None = None) -> str:
    """The name under which a model is stored: `name`, a hub id as it is, or the last part of a folder's path.

    Only the last part, so that a dataset can be shared between machines that keep the model in different places. Two models of the same
    name differ in their content (``weights``). A snapshot in the hub's local cache is named by its hub id.
    """
    if name is not None:
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError(f"name={name!r} is no name: give a text of at least one character")
        return name
    folder = local_folder(model)
    if folder is None:
        return os.fspath(model)
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return folder.name


def cached_snapshot(model: str, revision: str | None) -> tuple[str | None, Path | None]:
    """The commit of a hub model, and its folder in the hub's local cache; None for either that the cache lacks."""
    commit = revision if revision is not None and COMMIT.fullmatch(revision) else None
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return commit, None
    found = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(found, str):
        return Path(found).parent.name, Path(found).parent
    reference = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "refs" / (revision or "main")
    if commit is None and reference.is_file():
        written = reference.read_text(encoding="utf-8").strip()
        commit = written if COMMIT.fullmatch(written) else None
    return commit, None


def tokenizer_field(tokenizer: object, folder: Path | None) -> str | None:
    """The provenance field ``tokenizer``.

    Parameters
    ----------
    tokenizer : None, str, path or object
        As the caller gave it; None for the model's own.
    folder : Path or None
        The model's folder; None for a hub model.
    """
    if tokenizer is None:
        return None if folder is None else tokenizer_digest(folder)
    if not isinstance(tokenizer, str | os.PathLike):
        return tokenizer_object_digest(tokenizer)
    path = Path(tokenizer).expanduser()
    return tokenizer_digest(path) if path.is_dir() else f"hub:{os.fspath(tokenizer)}"


def modules_field(modules: Mapping[str, str] | None) -> str | None:
    """The provenance field ``modules``: the caller's names as JSON, the same for the same names."""
    if modules is None:
        return None
    if not isinstance(modules, Mapping):
        raise InvalidTypeError(f"modules is a {type(modules).__name__}: give a mapping, {{'layers': 'model.layers', …}}")
    return json.dumps({str(key): str(value) for key, value in modules.items()}, sort_keys=True)


def own_fields(provenance: Mapping[str, Any] | None) -> Provenance:
    """The caller's own provenance fields, checked.

    Raises
    ------
    InvalidTypeError
        Not a mapping.
    InvalidArgumentError
        The name of one of `PROVENANCE_FIELDS`, a name that is no text, or a value that is no text, number, truth value or None.
    """
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise InvalidTypeError(f"provenance is a {type(provenance).__name__}: give a mapping, {{'steering': '…'}}")
    clashes = sorted(set(provenance) & set(PROVENANCE_FIELDS))
    if clashes:
        raise InvalidArgumentError(
            f"provenance names {', '.join(map(repr, clashes))}, which come from the model itself: choose another name, such as 'steering'"
        )
    for name, value in provenance.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str | int | float | bool)):
            raise InvalidArgumentError(f"provenance field {name!r}={value!r}: use a string name and a string, number, truth value or None")
    return dict(provenance)


def prompt_fields(
    kind: PromptKind, *, template: str | None, truncation: bool, max_length: int | None, context_length: int | None, tokenizer: Any = None
) -> Provenance:
    """The provenance fields that depend on how the prompts become tokens."""
    limit = length_limit(context_length, max_length, tokenizer)
    return {
        "special_tokens": {"text": True, "chat": False, "ids": None}[kind],
        "chat_template": template if kind == "chat" else None,
        "truncation": limit if truncation else None,
    }


def identify(
    model: str | os.PathLike[str],
    *,
    name: str | None = None,
    tokenizer: object = None,
    revision: str | None = None,
    dtype: object = "auto",
    prompts_kind: PromptKind = "text",
    add_special_tokens: bool = True,
    max_length: int | None = None,
    truncation: bool = False,
    modules: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    memory: Path | None = None,
) -> ModelIdentity:
    """What is known of a model without loading it and without the network.

    Every field has the value that the loaded model gives it. For a hub id the commit is the one that the local cache names for `revision`.
    If the cache lacks it, the commit and everything from the configuration are unknown. That is no error, because activations that were
    extracted elsewhere can be read without the model.

    Parameters
    ----------
    model : str or path
        A folder that ``save_pretrained`` wrote, or a hub id.
    name : str, optional
        Its name in the store, see :func:`model_name`.
    tokenizer : str, path or transformers tokenizer, optional
        If it is not the model's own.
    revision : str, optional
        Branch, tag or commit of a hub model.
    dtype : str or torch.dtype
        As for :func:`~lmprobe_zarr.extraction.load_model`.
    prompts_kind : {"text", "chat", "ids"}
    add_special_tokens : bool
    max_length : int, optional
        Tokens.
    truncation : bool
    modules : mapping of str to str, optional
        As for :func:`~lmprobe_zarr.extraction.load_model`.
    provenance : mapping, optional
        The caller's own fields.
    memory : Path, optional
        A JSON file that keeps the digests of weight files by path, size and modification time. Best effort.

    Raises
    ------
    ModelNotFoundError
        A path without a model.
    InvalidArgumentError
        Unknown dtype or kind, a bad `max_length`, or a caller's field with the name of one of `PROVENANCE_FIELDS`.
    """
    own = own_fields(provenance)
    if prompts_kind not in PROMPT_KINDS:
        raise InvalidArgumentError(f"prompts_kind={prompts_kind!r} is unknown: use one of {', '.join(map(repr, PROMPT_KINDS))}")
    folder = local_folder(model)
    known: Provenance = {"adapter": None, "modules": modules_field(modules), **own}
    if folder is not None:
        files: Path | None = folder
        known["revision"] = None
        weights = weights_digest(folder, memory)
        if weights is not None:
            known["weights"] = weights
    else:
        commit, files = cached_snapshot(os.fspath(model), revision)
        known["weights"] = None
        if commit is not None:
            known["revision"] = commit
    known["tokenizer"] = tokenizer_field(tokenizer, folder)
    config = None if files is None else read_json(files / "config.json")
    computed = resolve_dtype(config, dtype)
    if computed is not None:
        known["compute_dtype"] = computed
    if config is not None:
        known["quantization"] = quantization_of(config)
    window = None if config is None else context_length_of(config)
    known |= _prompt_fields_known(prompts_kind, files, tokenizer, truncation=truncation, max_length=max_length, window=window)
    known |= {"special_tokens": add_special_tokens} if prompts_kind == "text" else {}
    return ModelIdentity(
        name=model_name(model, name),
        provenance=known,
        num_layers=None if config is None else num_layers_of(config),
        hidden_size=None if config is None else hidden_size_of(config),
        context_length=window,
        vocab_size=None if config is None else first_int(text_config(config), ("vocab_size",)),
        num_experts=None if config is None else num_experts_of(config),
        model_type=None if config is None else text_config(config).get("model_type"),
    )


def _prompt_fields_known(
    kind: PromptKind, files: Path | None, tokenizer: object, *, truncation: bool, max_length: int | None, window: int | None
) -> Provenance:
    template: str | None = None
    if kind == "chat":
        if tokenizer is None:
            template = None if files is None else _template_in(files)
        elif isinstance(tokenizer, str | os.PathLike):
            template = _template_in(Path(tokenizer).expanduser()) if Path(tokenizer).expanduser().is_dir() else None
        else:
            template = template_digest(getattr(tokenizer, "chat_template", None))
    fields = prompt_fields(kind, template=template, truncation=truncation, max_length=max_length, context_length=window)
    if kind == "chat" and template is None:
        del fields["chat_template"]
    # Without the window the limit is unknown: it may be smaller than max_length.
    if truncation and window is None:
        del fields["truncation"]
    return fields
