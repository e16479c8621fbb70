"""Loading: a model by its name or as an object, with its tokenizer, its parts found and its provenance complete. Never a store."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn

from lmprobe_zarr import model_files as files
from lmprobe_zarr.batch import PROMPT_KINDS, PromptKind
from lmprobe_zarr.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    LmprobeZarrError,
    MissingDependencyError,
    ModelNotFoundError,
    UnknownArchitectureError,
)
from lmprobe_zarr.extraction.models import identity, streamed, turns
from lmprobe_zarr.extraction.models.architectures import Located, locate
from lmprobe_zarr.extraction.models.fingerprint import ATTRIBUTES_VOLATILE, check_code, foreign_code, global_hooks, model_fingerprint
from lmprobe_zarr.extraction.models.identity import Provenance, near_folder
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.loading_report import check_weights, listening, quiet_logging
from lmprobe_zarr.extraction.models.model_code import code_of_named, code_of_object
from lmprobe_zarr.extraction.models.numerics import device_types, settings_fields
from lmprobe_zarr.extraction.models.paired import decoder_start
from lmprobe_zarr.extraction.models.prediction import check_head, check_predicts, predicts_next
from lmprobe_zarr.extraction.models.streamed import StreamedBlocks
from lmprobe_zarr.extraction.models.structure import input_device, input_embeddings
from lmprobe_zarr.extraction.models.tokenizer_match import check_tokenizer
from lmprobe_zarr.extraction.models.window import UNKNOWN_WINDOW, Window, refine_window, window_of
from lmprobe_zarr.extraction.models.wrappers import check_complete, uncompiled, unwrapped

__all__ = ["as_it_is", "depth_of", "load_model", "load_module", "load_tokenizer"]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]


@contextmanager
def _loading(what: str, source: str, folder: Path | None, revision: str | None) -> Iterator[None]:
    try:
        with turns.loading(), listening(source):
            yield
    except LmprobeZarrError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"the {what} of {source!r} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if folder is not None:
            raise ModelNotFoundError(f"cannot load the {what} of {source!r} from {str(folder)!r}: {_first_line(error)}") from error
        hub = "and it cannot be loaded from the Hub"
        if _is_offline():
            hub = "and HF_HUB_OFFLINE is set, so the Hub is not asked"
        elif "connect" in _first_line(error).lower():
            hub = "and the Hub could not be reached"
        at = f" at revision {revision!r}" if revision else ""
        near = near_folder(source)
        raise ModelNotFoundError(
            f"cannot load the {what} of {source!r}{at}{near}: there is no folder of this name here, {hub}\n{_first_line(error)}"
        ) from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


# Any of these makes a folder one of a tokenizer.
TOKENIZER_FILES: Final = ("tokenizer_config.json", "tokenizer.json")


def _source(model: str | os.PathLike[str], revision: str | None) -> tuple[str, Path | None, str | None]:
    """The argument of ``from_pretrained``, the folder if it is one, and the revision: the commit where the local cache knows it.

    The commit of the cache is used without asking the hub, so that the model that runs is the one that was looked up in the store.
    """
    folder = identity.local_folder(model)
    if folder is not None:
        if revision is not None:
            raise InvalidArgumentError(f"revision={revision!r} was given for the folder {str(folder)!r}: only hub ids have revisions")
        return str(folder), folder, None
    name = os.fspath(model)
    commit, _ = identity.cached_snapshot(name, revision)
    return name, None, commit or revision


def load_tokenizer(model: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, without the model; a fast one where there is one.

    Raises
    ------
    ModelNotFoundError
        There is none.
    """
    folder: Path | None = Path(model).expanduser().resolve() if isinstance(model, str | os.PathLike) else None
    if folder is not None and not (folder / "config.json").is_file() and any((folder / name).is_file() for name in TOKENIZER_FILES):
        source, revision = str(folder), None  # as a tokenizer's own save_pretrained writes it
    else:
        source, folder, revision = _source(model, revision)
    with _loading("tokenizer", source, folder, revision):
        return transformers.AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)


def _tokenizer_for(tokenizer: object, model: str | os.PathLike[str] | None, revision: str | None, trust_remote_code: bool) -> Any:
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise InvalidTypeError(f"tokenizer is a {type(tokenizer).__name__}: give a transformers tokenizer, a folder or a hub id")
        return tokenizer
    if model is None:
        raise InvalidArgumentError("a model object brings no tokenizer: pass tokenizer= (a tokenizer, a folder or a hub id)")
    return load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)


def _pick_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgumentError(
            f"device={str(device)!r} cannot be used here ({_first_line(error)}): use 'auto', 'cpu', 'cuda' or 'mps'"
        ) from error
    if chosen.type == "meta":
        raise InvalidArgumentError("device='meta' holds no numbers: use 'auto', 'cpu', 'cuda' or 'mps'")
    return chosen


def _raw_config(source: str, folder: Path | None, revision: str | None) -> dict[str, Any]:
    if folder is not None:
        return files.read_json(folder / "config.json")
    content, _ = transformers.PretrainedConfig.get_config_dict(source, revision=revision or "main")
    return dict(content)


def _cut(config: Any, depth: int) -> None:
    """Change a configuration to that of a model with fewer blocks, the first ones."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        # What differs between layers is listed by layer.
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth


def _load_weights(
    source: str,
    folder: Path | None,
    revision: str | None,
    dtype: str,
    device_map: Any,
    trust_remote_code: bool,
    head: bool = False,
    paired: bool = False,
    depth: int | None = None,
) -> tuple[nn.Module, str | None]:
    """The base model, with the head that predicts the next token or without one, in evaluation mode, and its commit.

    With `depth`, only so many of its blocks are loaded.
    """
    if device_map is not None:
        try:
            importlib.metadata.version("accelerate")
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingDependencyError("device_map= needs accelerate: pip install 'lmprobe-zarr[models]'") from error
    with _loading("model", source, folder, revision):
        options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if depth is not None:
            _cut(config, depth)
        kind = _class_of(config, head=head, paired=paired, trust_remote_code=trust_remote_code)
        module, report = kind.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), device_map=device_map, output_loading_info=True, **options
        )
    if getattr(module, "_hf_peft_config_loaded", False):
        raise ModelNotFoundError(f"{source!r} holds an adapter beside the model: load both with peft, and pass that object with name='…'")
    # The blocks that were left out are no tensors without a place.
    check_weights(source, module, report if depth is None else {**report, "unexpected_keys": ()}, head=head)
    return module.eval(), getattr(module.config, "_commit_hash", None)


def _class_of(config: Any, *, head: bool, paired: bool, trust_remote_code: bool) -> Any:
    """The auto class that builds a model of this configuration."""
    own = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    # Where only the class with a head comes with the model, one without would be another program.
    whole = head or ("AutoModelForCausalLM" in own and "AutoModel" not in own)
    with_head: Any = transformers.AutoModelForSeq2SeqLM if paired else transformers.AutoModelForCausalLM
    # Only the class with a head has a method that shifts labels, and some (Marian) have no other.
    return with_head if whole or paired else transformers.AutoModel


def _load_streamed(
    source: str, folder: Path | None, revision: str | None, dtype: str, device: torch.device, trust_remote_code: bool, head: bool,
    layers: str | None,
) -> tuple[nn.Module, str | None, StreamedBlocks]:  # fmt: skip
    """As `_load_weights`, a model whose blocks read their weights when it is their turn, on a device."""
    with _loading("model", source, folder, revision):
        options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(source, **options)
        kind = _class_of(config, head=head, paired=False, trust_remote_code=trust_remote_code)
        files_of = folder if folder is not None else streamed.downloaded(source, revision)
        module, report, blocks = streamed.build(source, files_of, config, kind, dtype, layers=layers, trust_remote_code=trust_remote_code)
    check_weights(source, module, report, head=head)
    blocks.share(device)
    return module.eval(), getattr(config, "_commit_hash", None), blocks


# ---------------------------------------------------------------- model objects


def _adapters(module: nn.Module) -> str | None:
    """The provenance field ``adapter`` of a PEFT model.

    Raises
    ------
    InvalidArgumentError
        An adapter that changes more than the weights: it adds tokens, or depends on the content of the prompt.
    """
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    active = getattr(module, "active_adapters", list(configs))
    active = [str(name) for name in (active() if callable(active) else active)]
    for name in active:
        config = configs.get(name)
        if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
            raise InvalidArgumentError(
                f"the adapter {name!r} ({type(config).__name__}) puts its own tokens before the prompt, or acts by what the prompt holds, "
                "which cannot be extracted: use one that changes weights, such as LoRA"
            )
    layers = [part for part in module.modules() if hasattr(part, "disable_adapters") and hasattr(part, "merged_adapters")]
    if layers and all(part.disable_adapters for part in layers):
        return None
    elsewhere = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
    settings = {name: {k: v for k, v in configs[name].to_dict().items() if k not in elsewhere} for name in active if name in configs}
    return f"{'+'.join(active)}:{identity.settings_digest(settings)}"


def _object_dtype(module: nn.Module, dtype: object) -> str:
    own = next(
        (p.dtype for p in module.parameters() if p.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)), torch.float32
    )
    name = str(own).removeprefix("torch.")
    if str(dtype).removeprefix("torch.") not in ("auto", name):
        raise InvalidArgumentError(
            f"dtype={dtype!r} was given for a model object that computes in {name!r}: convert it yourself, model.to(…)"
        )
    return name


def _object_config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", None)
    return dict(config.to_dict()) if hasattr(config, "to_dict") else {}


# ---------------------------------------------------------------- putting together


def _window(module: nn.Module, config: Mapping[str, Any], full: Mapping[str, Any]) -> Window:
    """The window that the file of the configuration names, or the loaded configuration, which has defaults too."""
    named = window_of(identity.text_config(config))
    window = named if named.known else window_of(identity.text_config(full))
    vocabulary = input_embeddings(module)
    tables = (getattr(part, "num_embeddings", None) for part in module.modules() if part is not vocabulary)
    return refine_window(window, [rows for rows in tables if isinstance(rows, int)])


def _vocab_size(body: nn.Module, config: Mapping[str, Any]) -> int | None:
    embeddings = input_embeddings(body)
    # A table larger than the vocabulary was padded for speed; all of its rows can be looked up.
    held = getattr(embeddings, "num_embeddings", None)
    return held if isinstance(held, int) else identity.first_int(identity.text_config(config), ("vocab_size",))


def _located(module: nn.Module, modules: Mapping[str, str] | None, kind: PromptKind) -> tuple[Located, Mapping[str, str] | None]:
    """The parts of a model, and what the caller named of them; None where these are the modules that are found anyway."""
    paired = kind == "pair"
    if modules is None:
        return locate(module, paired=paired), None
    named = locate(module, modules, paired=paired)
    try:
        found = locate(module, paired=paired)
    except UnknownArchitectureError:
        return named, modules
    sites = [site for site in ("attn", "mlp") if site in modules]
    same = found.blocks == named.blocks and all(getattr(found, site) == getattr(named, site) for site in sites)
    if "router" in modules:
        gates = [{layer: router.gate for layer, router in each.routers.items()} for each in (found, named)]
        same = same and gates[0] == gates[1]
    return (found, None) if same else (named, modules)


def _assemble(module: nn.Module, tokenizer: Any, config: Mapping[str, Any], located: Located, **rest: Any) -> LoadedModel:
    padding = identity.text_config(config).get("pad_token_id")
    vocabulary = _vocab_size(located.body, config)
    usable = isinstance(padding, int) and padding >= 0 and (vocabulary is None or padding < vocabulary)
    device = input_device(located.body)
    own = getattr(located.body, "config", None)
    everything = located.body if located.whole is None else located.whole
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        located=located,
        num_layers=len(located.blocks),
        hidden_size=identity.hidden_size_of(config),
        vocab_size=vocabulary,
        device=device,
        spread=len({p.device for p in everything.parameters()}) > 1,
        predicts_next=predicts_next(located),
        num_experts=identity.num_experts_of(config) if located.routers else None,
        pad_id=padding if usable and padding is not None else 0,
        recorded={
            "attention": getattr(own, "_attn_implementation", None),
            "device": str(device),
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        },
        **rest,
    )


def _check_prompts_kind(kind: str) -> None:
    if kind not in PROMPT_KINDS:
        raise InvalidArgumentError(f"prompts_kind={kind!r} is unknown: use one of {', '.join(map(repr, PROMPT_KINDS))}")


def as_it_is(model: nn.Module, *, modules: Mapping[str, str] | None = None, name: str | None = None) -> LoadedModel:
    """A model object as far as a short pass needs it: no tokenizer, and no digest of its weights."""
    located = locate(model, modules)
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    config: Any = getattr(located.body, "config", None)
    size = getattr(config, "hidden_size", None)
    return LoadedModel(
        name=str(name or type(model).__name__),
        module=model,
        tokenizer=None,
        located=located,
        num_layers=len(located.blocks),
        hidden_size=size if isinstance(size, int) else None,
        window=UNKNOWN_WINDOW,
        vocab_size=None,
        num_experts=None if config is None else identity.num_experts_of(config.to_dict()),
        dtype=str(torch.float32 if weight is None else weight.dtype).removeprefix("torch."),
        device=torch.device("cpu") if weight is None else weight.device,
    )


def depth_of(model: str | os.PathLike[str], *, revision: str | None = None) -> int | None:
    """How many blocks the configuration of a named model says that it has; None where it does not."""
    where, folder, revision = _source(model, revision)
    with _loading("configuration", where, folder, revision):
        return identity.num_layers_of(_raw_config(where, folder, revision))


def load_module(
    model: str | os.PathLike[str], *, revision: str | None = None, dtype: object = "auto", device: str | torch.device = "auto",
    trust_remote_code: bool = False, depth: int | None = None,
) -> nn.Module:  # fmt: skip
    """A named model with its head, without a tokenizer and without a provenance: for what is never stored.

    Parameters
    ----------
    model, revision, dtype, device, trust_remote_code
        As for `load_model`.
    depth : int, optional
        Load only so many of its blocks, the first ones. What lies outside of the blocks is complete.

    Raises
    ------
    ModelNotFoundError, InvalidArgumentError
        As `load_model` with a head.
    """
    where, folder, revision = _source(model, revision)
    chosen = _pick_device(device)
    with _loading("configuration", where, folder, revision):
        config = _raw_config(where, folder, revision)
    check_predicts(where, config, False)
    computed = identity.resolve_dtype(config, dtype) or "float32"
    module, _ = _load_weights(where, folder, revision, computed, None, trust_remote_code, head=True, depth=depth)
    return module.to(chosen)


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    *,
    name: str | None = None,
    tokenizer: object = None,
    revision: str | None = None,
    dtype: object = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    modules: Mapping[str, str] | None = None,
    head: bool = False,
    prompts_kind: PromptKind = "text",
    add_special_tokens: bool = True,
    max_length: int | None = None,
    truncation: bool = False,
    provenance: Mapping[str, Any] | None = None,
    memory: Path | None = None,
    stream: bool = False,
) -> LoadedModel:
    """A model with its tokenizer, its parts located and its provenance complete.

    Parameters
    ----------
    model : str, path or torch Module
        A folder, a hub id, or a loaded model (PEFT, quantised, edited in memory). A folder or hub id is loaded without its head
        unless `head` is True. An object is used as it is: it is moved only where `device` names one, and its mode and configuration are
        left as they were. Of a model in ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` the model inside is used,
        without compilation.
    name : str, optional
        Its name in a store; needed for an object. Otherwise see :func:`~lmprobe_zarr.extraction.model_name`.
    tokenizer : transformers tokenizer, str or path, optional
        Needed for an object.
    revision : str, optional
        Branch, tag or commit of a hub id. For a branch the commit in the local cache is used, if there is one.
    dtype : str or torch.dtype
        ``"auto"``: what ``config.json`` names, float32 where it names none; an object's own.
    device : str or torch.device
        ``"auto"``: CUDA, then MPS, then the CPU; an object stays where it is.
    device_map : optional
        As for transformers, instead of `device`: spreads the model over several devices.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    modules : mapping of str to str, optional
        For unknown architectures: ``{"layers": "model.layers", "attn": "self_attn", "mlp": "mlp", "router": "mlp.gate"}``.
    head : bool
        Whether logits or perplexities will be needed. The provenance is the same either way.
    prompts_kind, add_special_tokens, max_length, truncation
        How the prompts will be tokenized; part of the provenance.
    provenance : mapping, optional
        The caller's own fields, beside those in :mod:`lmprobe_zarr.extraction.models.identity`: each a text, number, truth value or None.
        Needed where hooks or replaced methods change what an object computes, because their code is not part of the fingerprint.
    memory : Path, optional
        A JSON file that remembers the digests of weight files.
    stream : bool
        Whether the weights of a block are in memory only when it is its turn. The provenance is the same either way.

    Raises
    ------
    ModelNotFoundError
        Nothing can be loaded; the weights, with those of a requested head, are incomplete; blocks of the checkpoint have tensors that the
        model has no place for.
    UnknownArchitectureError
        Its blocks were not found by name.
    InvalidArgumentError
        An object without a name or tokenizer, without all of its weights in this process (FSDP, DeepSpeed, the meta device), or with
        hooks but no `provenance`; arguments that do not go together; a device that this machine lacks; a `head` requested of a model
        that has none or does not predict the next token; a tokenizer with more tokens than the model has embeddings.
    InvalidTypeError
        Neither a model nor the name of one.
    MissingDependencyError
        The model needs a package that is not installed.

    Warns
    -----
    CacheWarning
        Tensors of the checkpoint are not used; the tokenizer was loaded from elsewhere than the model.
        Warnings of transformers come out once per model and process, through its own logger.
    """
    _check_prompts_kind(prompts_kind)
    identity.modules_field(modules)  # raises where it is no mapping
    own = identity.own_fields(provenance)
    # Checked before anything is loaded. Hooks of a model object are checked below.
    check_code(global_hooks(), own)
    if device_map is not None and str(device) != "auto":
        raise InvalidArgumentError(f"device={str(device)!r} and device_map={device_map!r} were both given: give one")
    if stream and (isinstance(model, nn.Module) or device_map is not None or prompts_kind == "pair"):
        raise InvalidArgumentError(
            "weights='streamed' is for models that are loaded by their name onto one device, and for one text at a time: leave it out for "
            "model objects, device_map= and pairs"
        )
    blocks: StreamedBlocks | None = None
    if isinstance(model, nn.Module):
        if name is None:
            raise InvalidArgumentError(f"a model object ({type(model).__name__}) needs a name of your choosing: name='…'")
        if revision is not None or device_map is not None:
            raise InvalidArgumentError("revision= and device_map= are for models that are loaded here: apply them to the object yourself")
        model = unwrapped(model)
        check_complete(model)
        adapter = _adapters(model)
        with uncompiled(model), quiet_logging(), turns.running(model):
            located, by_hand = _located(model, modules, prompts_kind)
            # Modules outside the body, such as a head, are checked in `check_head`, if they run.
            check_code(foreign_code(located.body), own)
        computed = _object_dtype(model, dtype)
        held = _tokenizer_for(tokenizer, None, None, trust_remote_code)
        module = model if str(device) == "auto" else model.to(_pick_device(device))
        config = full = _object_config(module)
        with uncompiled(module), turns.between_loads():
            source: Provenance = {"revision": None, "weights": model_fingerprint(module), "adapter": adapter}
            code, kinds = code_of_object(module, skipped=ATTRIBUTES_VOLATILE), {parameter.device.type for parameter in module.parameters()}
        source["tokenizer"] = identity.tokenizer_field(held if not isinstance(tokenizer, str | os.PathLike) else tokenizer, None)
    else:
        where, folder, revision = _source(model, revision)
        name = identity.model_name(model, name)
        chosen = None if device_map is not None else _pick_device(device)
        with _loading("configuration", where, folder, revision):
            config = _raw_config(where, folder, revision)
        if head:
            check_predicts(where, config, prompts_kind == "pair")
        computed = identity.resolve_dtype(config, dtype) or "float32"
        held = _tokenizer_for(tokenizer, model, revision, trust_remote_code)
        if stream and chosen is not None:
            layers = None if modules is None else modules.get("layers")
            module, commit, blocks = _load_streamed(where, folder, revision, computed, chosen, trust_remote_code, head, layers)
        else:
            module, commit = _load_weights(where, folder, revision, computed, device_map, trust_remote_code, head, prompts_kind == "pair")
            module = module if chosen is None else module.to(chosen)
        full = _object_config(module)
        source = {"revision": None if folder is not None else commit or revision, "adapter": None}
        source["weights"] = None if folder is None else files.weights_digest(folder, memory)
        source["tokenizer"] = identity.tokenizer_field(tokenizer, folder)
        at = folder if folder is not None else identity.cached_snapshot(where, revision)[1]
        source |= identity.remote_code_field(config, at, folder, tokenizer, trusted=trust_remote_code)
        with turns.between_loads():
            code, kinds = code_of_named(config), set(device_types(device, device_map))
        with quiet_logging(), turns.running(module), streamed.explained(name, blocks):
            located, by_hand = _located(module, modules, prompts_kind)
    source |= settings_fields(sorted(kinds)) | ({} if code is None else {"model_code": code})
    window = _window(module, config, full)
    template = files.template_digest(getattr(held, "chat_template", None))
    source |= {"compute_dtype": computed, "quantization": identity.quantization_of(config), "modules": identity.modules_field(by_hand)}
    source |= identity.prompt_fields(
        prompts_kind, template=template, truncation=truncation, max_length=max_length, window=window, tokenizer=held
    )
    source |= {"special_tokens": add_special_tokens} if prompts_kind in ("text", "pair") else {}
    source |= ({"stack": "decoder"} if prompts_kind == "pair" else {}) | own
    start = decoder_start(module, full or config) if prompts_kind == "pair" else None
    loaded = _assemble(
        module,
        held,
        identity.read_config(full or config, prompts_kind),
        located,
        decoder_start=start,
        streamed=blocks,
        name=identity.model_name("", name),
        window=window,
        dtype=computed,
        provenance=source,
    )
    origin = getattr(getattr(module, "config", None), "_name_or_path", None) if isinstance(model, nn.Module) else model
    check_tokenizer(held, loaded.name, None if tokenizer is None else origin, loaded.vocab_size)
    if head:
        check_head(loaded)
    return loaded
