"""`Request`: what is requested, checked: prompts, variables, and where they are stored. Reads no store and loads nothing."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lmprobe_zarr.batch import (
    ALL,
    NO_CHAT_OPTIONS,
    ChatOptions,
    Column,
    Generate,
    LayerSpec,
    Outputs,
    OverSpec,
    Sites,
    SitesSpec,
    TokenPart,
    check_answer_columns,
    check_texts,
    given_prompts,
    is_top_k,
    parse_column,
    parse_over,
    parse_poolings,
    parse_sites,
    pooled_name,
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
    sites : Sites
    poolings : tuple of str
    parts : tuple of TokenPart or None
        The parts of the tokens that are pooled; None stands for all of them.
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
    sites: Sites
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
    parts: tuple[TokenPart | None, ...] = (None,)
    generate: Generate | None = None
    drawn_seed: int = 0

    @property
    def needs_head(self) -> bool:
        """Whether the projection onto the vocabulary has to run."""
        return self.outputs.needs_head or self.generate is not None

    @property
    def part_names(self) -> dict[str, str]:
        """The parts of the tokens that are pooled, by name, with what is noted of each."""
        return {ALL if part is None else part.name: "" if part is None else part.described for part in self.parts}

    @property
    def any_dtype(self) -> bool:
        """Whether the group that serves decides in which dtype the model computes: the caller names the group, and no dtype."""
        return (self.any_provenance or self.group is not None) and self.choice.dtype == "auto" and self.choice.by_name

    @property
    def layered(self) -> bool:
        """Whether any requested variable has layers."""
        return self.outputs.router or self.sites.any_layered

    def kept_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The layers to store when `layers` are requested: with `keep_passed` also those below, where they cost no more time."""
        passed = layers and self.keep_passed and not self.keep_tokens and not self.outputs.router
        return tuple(range(max(layers) + 1)) if passed else layers

    def wanted(self, layers: tuple[int, ...], site_layers: Mapping[str, Collection[int]]) -> list[Wanted]:
        """Every requested variable.

        Parameters
        ----------
        layers : tuple of int
            Requested layers.
        site_layers : mapping of str to collection of int
            The layers of the model that have a site, the router among them. All are assumed to have a site that it does not name.
        """

        def having(site: str) -> tuple[int, ...]:
            # Where none of them has it, all are wanted still, so that the model is asked and says so.
            return tuple(layer for layer in layers if layer in site_layers.get(site, layers)) or layers

        found = []
        for site in self.sites:
            own_layers = having(site) if self.sites.layered(site) else ()
            for pooling, part in itertools.product(self.poolings, self.parts):
                name = pooled_name(site, pooling, ALL if part is None else part.name)
                pooled_from = site if part is None else None
                found.append(Wanted(level="prompts", name=name, layers=own_layers, site=site, pooled_from=pooled_from, part=part))
            found += [Wanted(level="tokens", name=site, layers=own_layers, site=site)] if self.keep_tokens else []
        for place, name, layered in self.outputs.variables():
            level: Level = "tokens" if place == "tokens" else "prompts"
            own_layers = having(name) if layered else ()
            top_k = self.outputs.top_k if is_top_k(name) else None
            found.append(Wanted(level=level, name=name, layers=own_layers, site=name, at_least=top_k))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One requested variable.

    Parameters
    ----------
    level, name : str
    layers : tuple of int
        Empty for variables without layers.
    site : str
        The site or output that it is of.
    part : TokenPart, optional
        The part of the tokens that it is pooled over, where that is not all of them.
    pooled_from : str, optional
        The site whose stored tokens it can be pooled from instead.
    at_least : int, optional
        For the k largest values: how many a stored row must hold.
    """

    level: Level
    name: str
    layers: tuple[int, ...]
    site: str = ""
    part: TokenPart | None = None
    pooled_from: str | None = None
    at_least: int | None = None


def check_request(
    choice: ModelChoice,
    prompts: Iterable[Any],
    store: Store,
    *,
    layers: LayerSpec,
    sites: SitesSpec,
    pooling: str | Sequence[str],
    keep_tokens: bool,
    outputs: Outputs,
    over: OverSpec = ALL,
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
        options of chats for other prompts, a tokenizer that cannot be called; what the chosen engine cannot give.
    """
    given = given_prompts(prompts)
    kind = prompts_kind(given)
    check_texts(given)
    _check_options(choice, kind, chat)
    names, outputs = parse_sites(sites, outputs)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling or ()))
    if not poolings and not keep_tokens:
        if not outputs:
            raise InvalidArgumentError("nothing would be stored: give a pooling, or keep_tokens=True")
        names = Sites()
    parts, spans = parse_over(over, len(given))
    _check_parts(parts, kind, poolings)
    own = check_columns(columns, prompts, given)
    if same := sorted(set(spans) & set(own)):
        raise InvalidArgumentError(
            f"{same[0]!r} is a column of coords=, and that of the spans of over=: choose another name for one of them"
        )
    own |= {name: parse_column(name, values) for name, values in spans.items()}
    every = [pooled_name(site, each, ALL if part is None else part.name) for site in names for each in poolings for part in parts]
    variables = {*names, *every}
    if same := sorted(variables & set(own)):
        raise InvalidArgumentError(f"{same[0]!r} is a column of coords= and a variable of sites=: choose another name for one of them")
    if generate is not None:
        _check_generate(generate, kind, own)
    if choice.engine is not None:
        choice.engine.check_request(kind, names, outputs, generates=generate is not None)
    if kind == "pair" and store_text:
        own = with_encoder_texts(own, given)
    return Request(
        choice=choice, given=given, kind=kind, columns=own, store=store, layers=layers, chat=chat,
        sites=names, poolings=poolings, keep_tokens=keep_tokens, outputs=outputs, keep_passed=keep_passed, refresh=refresh, group=group,
        any_provenance=any_provenance, parts=parts if poolings else (None,), generate=generate, drawn_seed=secrets.randbelow(DRAWN_SEEDS),
    )  # fmt: skip


def _check_parts(parts: Sequence[TokenPart | None], kind: PromptKind, poolings: Sequence[str]) -> None:
    """Raise for parts of the tokens that prompts of this kind do not have."""
    for part in parts:
        if part is not None and not poolings:
            raise InvalidArgumentError(f"over={part.name!r} was given without a pooling: it says which tokens are pooled")
        if part is not None and part.role and kind != "chat":
            raise InvalidArgumentError(
                f"over={part.name!r} is the role {' or '.join(map(repr, part.role))}, and roles are of chats: give lists of messages, or "
                "another part, over={'tail': {'position': slice(-8, None)}}"
            )


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
