"""The model that a caller chose: how it is identified and loaded, and the one that was loaded last. Never a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lmprobe_zarr import config
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.models import Engine, ModelIdentity, PromptKind, Provenance

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import ReadyModel

__all__ = ["LoadingOptions", "ModelChoice", "ModelMemory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Which model, with which tokenizer, and how it tokenizes and computes; the fields are those of `lmprobe_zarr.extract`.

    Parameters
    ----------
    model : str, path or torch Module
    name, tokenizer, revision, max_length, truncation, modules, trust_remote_code, add_special_tokens
        As for `lmprobe_zarr.extract`.
    dtype : "auto", str, torch.dtype or None
        None accepts stored activations of any dtype. If the model has to be run, it computes in the same dtype.
    provenance : mapping
        Fields that the caller gave: own ones, such as ``steering``, and fixed ones, such as ``revision``.
    engine : Engine, optional
        What runs the model in the place of transformers.
    """

    model: Any
    name: str | None = None
    tokenizer: Any = None
    revision: str | None = None
    dtype: Any = "auto"
    max_length: int | None = None
    truncation: bool = False
    provenance: Provenance = field(default_factory=dict)
    modules: Mapping[str, str] | None = None
    trust_remote_code: bool = False
    add_special_tokens: bool = True
    engine: Engine | None = None

    @property
    def by_name(self) -> bool:
        """Whether the model is named, so that it can be identified without being loaded."""
        return isinstance(self.model, (str, os.PathLike))

    @property
    def own_provenance(self) -> dict[str, Any]:
        """The caller's own fields, such as ``steering``: they become part of the group."""
        return {name: value for name, value in self.provenance.items() if name not in models.FIXED_FIELDS}

    def identify(self, kind: PromptKind, device: Any = "auto", device_map: Any = None) -> ModelIdentity:
        """What is known of a named model without loading it, for prompts of one kind."""
        identity = models.identify(
            self.model, name=self.name, tokenizer=self.tokenizer, revision=self.revision, prompts_kind=kind, max_length=self.max_length,
            dtype="auto" if self.dtype is None else self.dtype, truncation=self.truncation, memory=config.weights_memory(),
            modules=self.modules, provenance=self.own_provenance, trust_remote_code=self.trust_remote_code, device=device,
            device_map=device_map, add_special_tokens=self.add_special_tokens,
        )  # fmt: skip
        provenance = dict(identity.provenance) if self.engine is None else self.engine.provenance_of(identity.provenance)
        if self.dtype is None:  # stored activations of any dtype are accepted
            provenance.pop("compute_dtype", None)
        return replace(identity, provenance=provenance)

    def load_tokenizer(self) -> Any:
        """The tokenizer: the caller's object, or the named one, or the model's own."""
        if self.tokenizer is not None and not isinstance(self.tokenizer, (str, os.PathLike)):
            return self.tokenizer
        if self.tokenizer is not None:  # which has no revision of the model's
            return models.load_tokenizer(self.tokenizer, trust_remote_code=self.trust_remote_code)
        return models.load_tokenizer(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingOptions:
    """How a model is loaded for one extraction.

    Parameters
    ----------
    kind : {"text", "chat", "ids"}
        The kind of its prompts.
    dtype : "auto", str or torch.dtype
        The dtype that it computes in.
    device, device_map
        As for `lmprobe_zarr.extract`.
    head : bool
        Whether its head is needed.
    stream : bool
        Whether the weights of a block are in memory only when it is its turn.
    """

    kind: PromptKind
    dtype: Any
    device: Any
    device_map: Any
    head: bool
    stream: bool = False


@dataclass(slots=True)
class ModelMemory:
    """Keeps the model that was loaded last for the next call, since loading takes longer than running a few prompts."""

    loaded: ReadyModel | None = None
    key: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the model that is kept, whose memory the next one takes. An engine has memory of its own."""
        weights = self.loaded.module.parameters() if isinstance(self.loaded, models.LoadedModel) else ()
        return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())

    def load(self, choice: ModelChoice, options: LoadingOptions, identity: ModelIdentity | None) -> ReadyModel:
        """The chosen model, loaded only if it is not the last one or has changed since.

        Parameters
        ----------
        choice : ModelChoice
        options : LoadingOptions
        identity : ModelIdentity, optional
            What is known of a named model now.
        """
        key = _key_of(choice, options)
        # A model object may have been edited since. Only loading it again, which examines its weights, would reveal that.
        if not choice.by_name or self.loaded is None or key != self.key or _has_changed(self.loaded, identity):
            self.release()  # frees its memory before the next model is loaded
            self.loaded, self.key = _load(choice, options), key
        return self.loaded

    def release(self) -> None:
        """Let go of the model; an engine is ended."""
        held, self.loaded = self.loaded, None
        if held is not None:
            held.close()


def _key_of(choice: ModelChoice, options: LoadingOptions) -> tuple[Any, ...]:
    """Values that are equal only where the same model would be loaded."""
    return (
        choice.model if choice.by_name else id(choice.model), choice.name, choice.revision, str(options.dtype), options.kind,
        choice.max_length, choice.truncation, choice.add_special_tokens, str(options.device), str(options.device_map), options.head,
        options.stream,
        id(choice.tokenizer) if choice.tokenizer is not None else None, repr(choice.modules), repr(choice.own_provenance),
        choice.trust_remote_code, choice.engine,
    )  # fmt: skip


def _has_changed(loaded: ReadyModel, identity: ModelIdentity | None) -> bool:
    known = {} if identity is None else identity.provenance
    # Of a model that was loaded under other settings of the process, a field may be there that is not known now.
    sometimes = set(models.FIXED_FIELDS) - set(models.PROVENANCE_FIELDS)
    if identity is not None and any(name in loaded.provenance and name not in known for name in sometimes):
        return True
    # Names of modules are part of the key; a loaded model may know that they are those that are found anyway.
    return any(name not in ("compute_dtype", "modules") and loaded.provenance.get(name) != value for name, value in known.items())


def _load(choice: ModelChoice, options: LoadingOptions) -> ReadyModel:
    if choice.engine is not None:
        return _start_engine(choice, choice.engine, options)
    return models.load_model(
        choice.model, name=choice.name, tokenizer=choice.tokenizer, revision=choice.revision, dtype=options.dtype, device=options.device,
        device_map=options.device_map, trust_remote_code=choice.trust_remote_code, modules=choice.modules, prompts_kind=options.kind,
        max_length=choice.max_length, truncation=choice.truncation, memory=config.weights_memory(), provenance=choice.own_provenance,
        head=options.head, add_special_tokens=choice.add_special_tokens, stream=options.stream,
    )  # fmt: skip


def _start_engine(choice: ModelChoice, engine: Engine, options: LoadingOptions) -> ReadyModel:
    tokenizer = choice.load_tokenizer()  # which fetches the configuration of a hub model too
    return models.start_engine(
        engine, choice.model, replace(choice, dtype=options.dtype).identify(options.kind), tokenizer, prompts_kind=options.kind,
        add_special_tokens=choice.add_special_tokens, max_length=choice.max_length, truncation=choice.truncation,
        trust_remote_code=choice.trust_remote_code, own_tokenizer=choice.tokenizer is None,
    )  # fmt: skip
