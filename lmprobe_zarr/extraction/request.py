"""`Request`: what is requested, checked: prompts, variables, and where they are stored. Reads no store and loads nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lmprobe_zarr.batch import (
    LAYERED_SITES,
    NO_CHAT_OPTIONS,
    ChatOptions,
    Column,
    Generate,
    LayerSpec,
    Outputs,
    check_answer_columns,
    check_texts,
    given_prompts,
    is_top_k,
    parse_poolings,
    parse_sites,
    prompts_kind,
    with_encoder_texts,
)
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.extraction.columns import Columns, check_columns
from lmprobe_zarr.extraction.model_choice import ModelChoice
from lmprobe_zarr.extraction.models import PromptKind
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import Level
from lmprobe_zarr.store.parts import CallOrder

__all__ = ["Request", "Wanted", "check_request"]

# Seeds that are drawn are short enough to be typed again.
DRAWN_SEEDS: Final = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an extraction has to provide; made by `check_request`.

    Parameters
    ----------
    choice : ModelChoice
    given : list
        The prompts as the caller gave them, repeats included.
    kind : {"text", "chat", "ids", "pair"}
    columns : mapping of str to Column
        One value per given prompt.
    store : Store
        Where activations are looked up, and stored unless `Options` has a sink.
    layers : "all", "middle", "last", int, sequence of int or slice
    sites, poolings : tuple of str
    keep_tokens : bool
    outputs : Outputs
    keep_passed : bool
        Whether layers below the deepest requested one are stored too, where that costs no more time.
    refresh : bool
        Whether the model is run on stored prompts too.
    group : str, optional
        Name of the stored group.
    any_provenance : bool
        Whether groups of the model's name may serve that do not record all that identifies it.
    chat : ChatOptions
        How chats are rendered.
    order : CallOrder, optional
        Where the prompts are in the list of the call, if they are not all of it.
    generate : Generate, optional
        How the model answers the prompts; None where they are run as they are.
    drawn_seed : int
        What sampling starts from where the caller names no seed; one for the whole call.
    """

    choice: ModelChoice
    given: list[Any]
    kind: PromptKind
    store: Store
    layers: LayerSpec
    sites: tuple[str, ...]
    poolings: tuple[str, ...]
    keep_tokens: bool
    outputs: Outputs
    columns: Mapping[str, Column] = field(default_factory=dict)
    keep_passed: bool = False
    refresh: bool = False
    group: str | None = None
    any_provenance: bool = False
    chat: ChatOptions = NO_CHAT_OPTIONS
    order: CallOrder | None = None
    generate: Generate | None = None
    drawn_seed: int = 0

    @property
    def needs_head(self) -> bool:
        """Whether the projection onto the vocabulary has to run."""
        return self.outputs.needs_head or self.generate is not None

    @property
    def any_dtype(self) -> bool:
        """Whether the group that serves decides in which dtype the model computes: the caller names the group, and no dtype."""
        return (self.any_provenance or self.group is not None) and self.choice.dtype == "auto" and self.choice.by_name

    @property
    def layered(self) -> bool:
        """Whether any requested variable has layers."""
        return self.outputs.router or bool(set(self.sites) & set(LAYERED_SITES))

    def kept_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The layers to store when `layers` are requested: with `keep_passed` also those below, where they cost no more time."""
        passed = layers and self.keep_passed and not self.keep_tokens and not self.outputs.router
        return tuple(range(max(layers) + 1)) if passed else layers

    def wanted(self, layers: tuple[int, ...], routers: tuple[int, ...] | None = None) -> list[Wanted]:
        """Every requested variable.

        Parameters
        ----------
        layers : tuple of int
            Requested layers.
        routers : tuple of int, optional
            Layers that have a router; None if that is unknown, and then all are assumed to have one.
        """
        found = []
        for site in self.sites:
            own_layers = layers if site in LAYERED_SITES else ()
            found += [Wanted(level="prompts", name=f"{site}_{pooling}", layers=own_layers, pooled_from=site) for pooling in self.poolings]
            found += [Wanted(level="tokens", name=site, layers=own_layers)] if self.keep_tokens else []
        for place, name, layered in self.outputs.variables():
            level: Level = "tokens" if place == "tokens" else "prompts"
            own_layers = tuple(layer for layer in layers if routers is None or layer in routers) if layered else ()
            top_k = self.outputs.top_k if is_top_k(name) else None
            found.append(Wanted(level=level, name=name, layers=own_layers, at_least=top_k))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One requested variable.

    Parameters
    ----------
    level, name : str
    layers : tuple of int
        Empty for variables without layers.
    pooled_from : str, optional
        The site whose stored tokens it can be pooled from instead.
    at_least : int, optional
        For the k largest values: how many a stored row must hold.
    """

    level: Level
    name: str
    layers: tuple[int, ...]
    pooled_from: str | None = None
    at_least: int | None = None


def check_request(
    choice: ModelChoice,
    prompts: Iterable[Any],
    store: Store,
    *,
    layers: LayerSpec,
    sites: str | Sequence[str],
    pooling: str | Sequence[str],
    keep_tokens: bool,
    outputs: Outputs,
    columns: Columns | None = None,
    keep_passed: bool = False,
    refresh: bool = False,
    group: str | None = None,
    any_provenance: bool = False,
    chat: ChatOptions = NO_CHAT_OPTIONS,
    store_text: bool = True,
    generate: Generate | None = None,
) -> Request:
    """The request that these arguments describe.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        No prompts, or what is no list of prompts; nothing to store, an unknown site or pooling, columns without one value per prompt;
        options of chats for other prompts, a tokenizer that cannot be called.
    """
    given = given_prompts(prompts)
    kind = prompts_kind(given)
    check_texts(given)
    _check_options(choice, kind, chat)
    names = parse_sites(sites, outputs)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling or ()))
    if not poolings and not keep_tokens:
        if not outputs:
            raise InvalidArgumentError("nothing would be stored: give a pooling, or keep_tokens=True")
        names = ()
    own = check_columns(columns, prompts, given)
    if generate is not None:
        _check_generate(generate, kind, own)
    if kind == "pair" and store_text:
        own = with_encoder_texts(own, given)
    return Request(
        choice=choice, given=given, kind=kind, columns=own, store=store, layers=layers, chat=chat,
        sites=names, poolings=poolings, keep_tokens=keep_tokens, outputs=outputs, keep_passed=keep_passed, refresh=refresh, group=group,
        any_provenance=any_provenance, generate=generate, drawn_seed=secrets.randbelow(DRAWN_SEEDS),
    )  # fmt: skip


def _check_generate(generate: object, kind: PromptKind, columns: Mapping[str, Column]) -> None:
    if not isinstance(generate, Generate):
        raise InvalidTypeError(f"generate is a {type(generate).__name__}: give lz.Generate(max_new_tokens=…)")
    if kind == "pair":
        raise InvalidArgumentError(
            "generate= was given with pairs of texts, whose second text is the answer of an encoder-decoder already: leave generate out"
        )
    check_answer_columns(columns)


def _check_options(choice: ModelChoice, kind: PromptKind, chat: ChatOptions) -> None:
    """Raise for options that would have no effect on prompts of this kind, and for a tokenizer that is none of transformers' kind."""
    words = {"text": "texts", "ids": "token ids", "pair": "pairs of texts"}
    if chat and kind != "chat":
        raise InvalidArgumentError(
            f"options of a chat template were given, but the prompts are {words[kind]}: give chats, which are lists of messages"
        )
    if not choice.add_special_tokens and kind not in ("text", "pair"):
        raise InvalidArgumentError(
            "add_special_tokens=False is for texts: chats have the special tokens that their template prints, and token ids are taken as "
            "they are"
        )
    tokenizer = choice.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)) and not callable(tokenizer):
        raise InvalidTypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which cannot be called as transformers' can: give a folder, a hub id or such a "
            "tokenizer; transformers.PreTrainedTokenizerFast(tokenizer_object=…) wraps those of tokenizers"
        )
