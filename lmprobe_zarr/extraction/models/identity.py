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

Eight more fields are there only where something is not as it is for a plain model:

``stack``
    ``decoder``: prompts are pairs, and values are those of the decoder of an encoder-decoder.
``engine``, ``engine_settings``
    What ran the model in the place of transformers, such as ``vllm``, and as JSON those of its settings that change what is computed.
``model_code``
    Names of functions and classes that were replaced, registered or written by the caller, and a digest of what they compute.
``remote_code``
    The classes that come with a model and that run because ``trust_remote_code`` is True, where transformers has some of its own.
``autocast``
    The dtype of ``torch.autocast``.
``float32_precision``
    ``products in tf32`` or the like, see ``torch.set_float32_matmul_precision``.
``default_dtype``
    torch's default dtype, if it is not float32.

A caller may add fields, such as ``provenance={"steering": "…"}``, for what these do not show.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.batch import PROMPT_KINDS, PromptKind
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, ModelNotFoundError
from lmprobe_zarr.extraction.models.families import are_known
from lmprobe_zarr.extraction.models.numerics import device_types, settings_fields
from lmprobe_zarr.extraction.models.tokenizing import length_limit
from lmprobe_zarr.extraction.models.turns import between_loads
from lmprobe_zarr.extraction.models.window import UNKNOWN_WINDOW, Window, window_of
from lmprobe_zarr.model_files import (
    folder_name,
    read_json,
    template_digest,
    template_in,
    tokenizer_digest,
    tokenizer_object_digest,
    weights_digest,
)

__all__ = [
    "DEPTHS",
    "DTYPES",
    "FIXED_FIELDS",
    "PROVENANCE_FIELDS",
    "ModelIdentity",
    "Provenance",
    "cached_snapshot",
    "identify",
    "model_name",
    "modules_field",
    "near_folder",
]

Provenance = dict[str, str | int | float | bool | None]
Config = Mapping[str, Any]

# Names of the number of layers. Of an encoder-decoder it is that of the encoder; where prompts are pairs, that of the decoder.
DEPTHS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "num_encoder_layers")
DECODER_DEPTHS: Final = ("decoder_layers", "num_decoder_layers", *DEPTHS)
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
# All fields that come from the model and the process. Those after the first ten are there only where they are not None.
FIXED_FIELDS: Final = (
    *PROVENANCE_FIELDS, "stack", "engine", "engine_settings", "model_code", "remote_code", "autocast", "float32_precision", "default_dtype",
)  # fmt: skip
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What is known of a model before it is loaded.

    Parameters
    ----------
    name : str
        Its name in a store.
    provenance : dict
        Only the known fields.
    num_layers, hidden_size, vocab_size : int or None
        From ``config.json``; None where unknown.
    window : Window
        The most tokens that the model takes, from ``config.json``.
    num_experts : int or None
        Of every layer that has experts, from ``config.json``; None where it names none.
    model_type : str or None
        The architecture's name in ``config.json``.
    """

    name: str
    provenance: Provenance = field(default_factory=dict)
    num_layers: int | None = None
    hidden_size: int | None = None
    window: Window = UNKNOWN_WINDOW
    vocab_size: int | None = None
    num_experts: int | None = None
    model_type: str | None = None

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model takes at once; None where it has no limit, or it is unknown."""
        return self.window.tokens


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


def read_config(config: Config, kind: PromptKind) -> Config:
    """The part of a configuration that is of what reads prompts of this kind."""
    part = config.get("decoder") if kind == "pair" else None
    return part if isinstance(part, Mapping) else config


def num_layers_of(config: Config, kind: PromptKind = "text") -> int | None:
    return first_int(text_config(read_config(config, kind)), DECODER_DEPTHS if kind == "pair" else DEPTHS)


def hidden_size_of(config: Config) -> int | None:
    return first_int(text_config(config), ("hidden_size", "n_embd", "d_model", "dim"))


def num_experts_of(config: Config) -> int | None:
    return first_int(text_config(config), ("num_local_experts", "num_experts", "n_routed_experts"))


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
        near = near_folder(given)
        raise ModelNotFoundError(
            f"model {given!r} does not exist{near}: there is no folder {str(path.absolute())!r}, and it is no hub id (owner/name)"
        )
    return None


def near_folder(given: str) -> str:
    """A question that names the folder of a model whose name is nearest to that of a folder that does not exist, for an error."""
    given = given.rstrip("/")
    path = Path(given).expanduser()
    try:
        there = [each.name for each in path.parent.iterdir() if (each / "config.json").is_file()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, there, n=1)
    return f" (did you mean {given[: len(given) - len(path.name)] + near[0]!r}?)" if near else ""


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
    return os.fspath(model) if folder is None else folder_name(folder)


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


def _own_files(folder: Path | None, pattern: str) -> str:
    """A digest of the code in a folder, for the end of a name; empty where there is none."""
    paths = [] if folder is None else sorted(path for path in folder.glob(pattern) if path.is_file())
    content = [[path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8", errors="replace")] for path in paths if folder]
    return f":{settings_digest(content)}" if content else ""


def _has_own_class(kind: object) -> bool:
    """Whether transformers has a model of this type; True where it is not installed."""
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations if spec is not None else None) or ()
    return not places or any((Path(place) / "models" / str(kind).replace("-", "_")).is_dir() for place in places)


def remote_code_field(config: Config | None, files: Path | None, folder: Path | None, tokenizer: object, *, trusted: bool) -> Provenance:
    """The provenance field ``remote_code``, or nothing.

    Of a type that transformers does not have, only the code that comes with the model can run, so nothing has to be told apart.

    Parameters
    ----------
    config : mapping, optional
        Content of ``config.json``.
    files : Path, optional
        The folder of the model's files: its own, or that in the hub's local cache.
    folder : Path, optional
        The model's own folder; None for a hub model.
    tokenizer : None, str, path or object
        As the caller gave it.
    trusted : bool
        ``trust_remote_code``.
    """
    if not trusted or config is None:
        return {}
    found: dict[str, str] = {}

    def collect(settings: Config, code: str) -> None:
        for name, values in (settings.get("auto_map") or {}).items():
            for value in values if isinstance(values, list | tuple) else [values]:
                repository = str(value).partition("--")[0] if "--" in str(value) else None
                commit = "" if repository is None else f"@{cached_snapshot(repository, None)[0] or 'unknown'}"
                if value is not None and str(name).startswith("Auto"):
                    found[str(value)] = f"{value}{commit}{code}"

    if _has_own_class(config.get("model_type")):
        collect(config, _own_files(folder, "*/**/*.py"))
    tokens = files if tokenizer is None else Path(tokenizer).expanduser() if isinstance(tokenizer, str | os.PathLike) else None
    if tokens is not None and (tokens / "tokenizer_config.json").is_file() and (tokenizer is not None or found):
        collect(read_json(tokens / "tokenizer_config.json"), "" if tokenizer is None else _own_files(tokens, "**/*.py"))
    return {"remote_code": ", ".join(found[name] for name in sorted(found))} if found else {}


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
        The name of one of `FIXED_FIELDS`, a name that is no text, or a value that is no text, number, truth value or None.
    """
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise InvalidTypeError(f"provenance is a {type(provenance).__name__}: give a mapping, {{'steering': '…'}}")
    clashes = sorted(set(provenance) & set(FIXED_FIELDS))
    if clashes:
        raise InvalidArgumentError(
            f"provenance names {', '.join(map(repr, clashes))}, which come from the model itself: choose another name, such as 'steering'"
        )
    for name, value in provenance.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str | int | float | bool)):
            raise InvalidArgumentError(f"provenance field {name!r}={value!r}: use a string name and a string, number, truth value or None")
    return dict(provenance)


def prompt_fields(
    kind: PromptKind, *, template: str | None, truncation: bool, max_length: int | None, window: Window, tokenizer: Any = None
) -> Provenance:
    """The provenance fields that depend on how the prompts become tokens."""
    limit = length_limit(window, max_length, tokenizer)
    return {
        "special_tokens": {"text": True, "pair": True, "chat": False, "ids": None}[kind],
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
    trust_remote_code: bool = False,
    device: object = "auto",
    device_map: object = None,
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
    prompts_kind : {"text", "chat", "ids", "pair"}
    add_special_tokens : bool
    max_length : int, optional
        Tokens.
    truncation : bool
    modules : mapping of str to str, optional
        As for :func:`~lmprobe_zarr.extraction.load_model`.
    provenance : mapping, optional
        The caller's own fields.
    memory : Path, optional
        A JSON file that keeps the digests of weight files by path, size, times and place on the disk. Best effort.
    trust_remote_code, device, device_map
        As for :func:`~lmprobe_zarr.extraction.load_model`.

    Raises
    ------
    ModelNotFoundError
        A path without a model.
    InvalidArgumentError
        Unknown dtype or kind, a bad `max_length`, or a caller's field with the name of one of `FIXED_FIELDS`.
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
    if config is not None and modules is not None and are_known(text_config(config).get("model_type"), modules):
        known["modules"] = None
    computed = resolve_dtype(config, dtype)
    if computed is not None:
        known["compute_dtype"] = computed
    if config is not None:
        known["quantization"] = quantization_of(config)
    window = UNKNOWN_WINDOW if config is None else window_of(text_config(config))
    known |= _prompt_fields_known(prompts_kind, files, tokenizer, truncation=truncation, max_length=max_length, window=window)
    known |= remote_code_field(config, files, folder, tokenizer, trusted=trust_remote_code)
    known |= settings_fields(device_types(device, device_map)) | _code_field(config or {})
    known |= {"special_tokens": add_special_tokens} if prompts_kind in ("text", "pair") else {}
    known |= {"stack": "decoder"} if prompts_kind == "pair" else {}
    return ModelIdentity(
        name=model_name(model, name),
        provenance=known,
        num_layers=None if config is None else num_layers_of(config, prompts_kind),
        hidden_size=None if config is None else hidden_size_of(read_config(config, prompts_kind)),
        window=window,
        vocab_size=None if config is None else first_int(text_config(read_config(config, prompts_kind)), ("vocab_size",)),
        num_experts=None if config is None else num_experts_of(config),
        model_type=None if config is None else text_config(config).get("model_type"),
    )


def _code_field(config: Config) -> Provenance:
    """The provenance field ``model_code``, or nothing, as where torch is not imported: then nobody has replaced anything."""
    if "torch" not in sys.modules:
        return {}
    from lmprobe_zarr.extraction.models.model_code import code_of_named

    with between_loads():
        code = code_of_named(config)
    return {} if code is None else {"model_code": code}


def _prompt_fields_known(
    kind: PromptKind, files: Path | None, tokenizer: object, *, truncation: bool, max_length: int | None, window: Window
) -> Provenance:
    template: str | None = None
    if kind == "chat":
        if tokenizer is None:
            template = None if files is None else template_in(files)
        elif isinstance(tokenizer, str | os.PathLike):
            template = template_in(Path(tokenizer).expanduser()) if Path(tokenizer).expanduser().is_dir() else None
        else:
            template = template_digest(getattr(tokenizer, "chat_template", None))
    fields = prompt_fields(kind, template=template, truncation=truncation, max_length=max_length, window=window)
    if kind == "chat" and template is None:
        del fields["chat_template"]
    # The limit is unknown where the window is, and where the model may fail on prompts as long as max_length.
    if truncation and (not window.known or (window.fixed is None and window.tokens is not None and (max_length or 0) > window.tokens)):
        del fields["truncation"]
    return fields
