"""Records of what a cache holds, which print well, in notebooks too. Never a store or a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from lmprobe_zarr.config import GB
from lmprobe_zarr.display import Html, card, count_of, definitions, format_bytes, section, table
from lmprobe_zarr.store.upkeep import EvictionEntry

__all__ = ["CacheInfo", "CachedPrompt", "CachedPromptInfo", "ClearSummary", "ModelCacheInfo", "ReadsInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCacheInfo:
    """What the cache holds of one model and provenance.

    Parameters
    ----------
    model_name : str
    group : str
        Folder of the group in the store; for lmprobe's own entries the folder's name in its cache.
    size_bytes, num_prompts, num_layers, num_parts : int
    num_annotations : int
        Annotations, which hold columns that no model gives again; they stay when parts are evicted.
    columns : tuple of str
        The user's columns, of annotations and parts.
    variables : tuple of str
        What is stored per prompt and per token.
    has_pooled, has_tokens, has_perplexity, has_logits, has_router : bool
    oldest, newest : datetime, optional
        First commit, and last commit or use, in UTC.
    unknown : tuple of str
        Fields of the provenance that the group does not record, as imported ones do not.
    """

    model_name: str
    group: str
    size_bytes: int
    num_prompts: int
    num_layers: int
    num_parts: int = 0
    num_annotations: int = 0
    columns: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    has_pooled: bool = False
    has_tokens: bool = False
    has_perplexity: bool = False
    has_logits: bool = False
    has_router: bool = False
    oldest: datetime | None = None
    newest: datetime | None = None
    unknown: tuple[str, ...] = ()

    @property
    def size_gb(self) -> float:
        """Size in GB of 1024³ bytes."""
        return self.size_bytes / GB

    def __str__(self) -> str:
        held = {
            "pooled": self.has_pooled, "tokens": self.has_tokens, "perplexity": self.has_perplexity, "logits": self.has_logits,
            "router": self.has_router,
        }  # fmt: skip
        what = "".join(f", {name}" for name, there in held.items() if there)
        what += f", {count_of(self.num_annotations, 'annotation')}" if self.num_annotations else ""
        what += f", columns {', '.join(self.columns)}" if self.columns else ""
        what += ", provenance not recorded" if self.unknown else ""
        counts = f"{count_of(self.num_prompts, 'prompt')}, {count_of(self.num_layers, 'layer')}"
        return f"{self.model_name}  {format_bytes(self.size_bytes)}  ({counts}{what})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadsInfo:
    """What is kept on this machine of what was read of remote stores.

    Parameters
    ----------
    folder : str
        Where; empty where no folder is known.
    size_bytes, entries : int
        Bytes on disk, and how many blocks, chunks and tables these are.
    limit_bytes : int, optional
        That of ``$LMPROBE_READ_CACHE``; None where nothing is kept unless `open_store` is told to.
    """

    folder: str
    size_bytes: int = 0
    entries: int = 0
    limit_bytes: int | None = None

    def __str__(self) -> str:
        limit = "" if self.limit_bytes is None else f" of {format_bytes(self.limit_bytes)}"
        return f"{format_bytes(self.size_bytes)}{limit} in {self.folder}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CacheInfo:
    """What a cache holds. Prints as a table, in notebooks too.

    Parameters
    ----------
    url : str
        Its place.
    models : tuple of ModelCacheInfo
        One per model and provenance, the largest first.
    legacy : tuple of ModelCacheInfo
        lmprobe's own entries beside it. They are read, and do not count towards the limit.
    below : tuple of CacheInfo
        The stores below, in the order in which they were named. They are read but never written, and do not count towards the limit.
    limit_bytes : int, optional
        None if there is no limit; 0 if nothing is to be stored.
    oldest, newest : datetime, optional
        First commit, and last commit or use, in UTC.
    reads : ReadsInfo, optional
        What is kept of remote stores, which has a limit of its own; None for a place that the call names.
    """

    url: str
    models: tuple[ModelCacheInfo, ...] = ()
    legacy: tuple[ModelCacheInfo, ...] = ()
    below: tuple[CacheInfo, ...] = ()
    limit_bytes: int | None = None
    oldest: datetime | None = None
    newest: datetime | None = None
    reads: ReadsInfo | None = None

    @property
    def total_size_bytes(self) -> int:
        """Bytes of this cache's own parts, without lmprobe's entries and the stores below."""
        return sum(model.size_bytes for model in self.models)

    @property
    def total_size_gb(self) -> float:
        """`total_size_bytes` in GB of 1024³ bytes."""
        return self.total_size_bytes / GB

    @property
    def limit(self) -> float | None:
        """The limit in GB of 1024³ bytes; None if there is no limit."""
        return None if self.limit_bytes is None else self.limit_bytes / GB

    def __repr__(self) -> str:
        return f"CacheInfo(total_size_gb={self.total_size_gb:.2f}, models={[model.model_name for model in self.models]})"

    def _rows(self) -> list[tuple[str, str]]:
        limit = "none" if self.limit_bytes is None else format_bytes(self.limit_bytes) if self.limit_bytes else "0, so nothing is stored"
        rows = [("cache", self.url), ("size", format_bytes(self.total_size_bytes)), ("limit", limit)]
        rows += [("model" if not i else "", str(model)) for i, model in enumerate(self.models)]
        if self.oldest is not None and self.newest is not None:
            rows += [("oldest", f"{self.oldest:%Y-%m-%d %H:%M}"), ("newest", f"{self.newest:%Y-%m-%d %H:%M}")]
        rows += [("lmprobe's" if not i else "", str(model)) for i, model in enumerate(self.legacy)]
        for store in self.below:
            rows += [("read only", store.url), *(("", str(model)) for model in store.models)]
        if self.reads is not None and (self.reads.entries or self.reads.limit_bytes):
            rows.append(("reads", str(self.reads)))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:<11}{value}".rstrip() for name, value in self._rows())

    def _repr_html_(self) -> str:
        rows = dict(self._rows()[1:3])
        if self.oldest is not None and self.newest is not None:
            rows |= {"oldest": f"{self.oldest:%Y-%m-%d %H:%M} UTC", "newest": f"{self.newest:%Y-%m-%d %H:%M} UTC"}
        if self.reads is not None and (self.reads.entries or self.reads.limit_bytes):
            rows["reads"] = str(self.reads)
        sections = [section("Models", _model_table(self.models), opened=True, note=f"({len(self.models)})")]
        if self.legacy:
            sections.append(section("lmprobe's own entries", _model_table(self.legacy), note=f"({len(self.legacy)})"))
        sections += [section("Read only", _model_table(store.models), note=store.url) for store in self.below]
        return str(card("lmprobe_zarr.CacheInfo", self.url, definitions(rows), *sections))


def _model_table(models: Sequence[ModelCacheInfo]) -> Html:
    rows = [
        (
            model.model_name,
            Html(f'<span style="white-space:nowrap">{format_bytes(model.size_bytes)}</span>'),
            model.num_prompts,
            model.num_layers,
            model.num_parts or "",
            ", ".join(model.variables),
            "" if model.newest is None else f"{model.newest:%Y-%m-%d %H:%M}",
        )
        for model in models
    ]
    return table(("model", "size", "prompts", "layers", "parts", "variables", "last used"), rows) if rows else Html("none")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPromptInfo:
    """What is stored of one prompt.

    Parameters
    ----------
    raw_layers : list of int
        Layers whose output is stored for every token.
    pooled : dict of str to list of int
        Layers of each pooling of the blocks' output.
    has_perplexity, has_token_perplexity, has_logits : bool
    logits_top_k : int, optional
        How many of the largest logits are stored; None if all or none are.
    num_tokens : int, optional
        Tokens of the prompt; None if unknown.
    router_layers : list of int
    variables : dict of str to list of int
        Every stored variable with its layers; an empty list for variables without layers.
    group : str
        The group that holds it.
    """

    raw_layers: list[int]
    pooled: dict[str, list[int]]
    has_perplexity: bool = False
    has_token_perplexity: bool = False
    has_logits: bool = False
    logits_top_k: int | None = None
    num_tokens: int | None = None
    router_layers: list[int] = field(default_factory=list)
    variables: dict[str, list[int]] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrompt:
    """One prompt of a model in the cache.

    Parameters
    ----------
    hash : str
        Its 16-digit label.
    prompt : str, optional
        Its text; None if it was not stored or is unknown.
    num_tokens : int, optional
    cached_at : str
        When the first part with this prompt was committed, ISO 8601 in UTC.
    """

    hash: str
    prompt: str | None
    num_tokens: int | None
    cached_at: str


class ClearSummary(int):
    """How many entries were deleted, as a number that prints what they were.

    Parameters
    ----------
    parts, annotations, legacy : int
        Parts, annotations, and lmprobe's own prompts.
    prompts : int
        Prompts of the parts, each counted once in every group.
    columns : iterable of str
        The user's columns that were deleted with parts and annotations.
    """

    parts: int
    annotations: int
    legacy: int
    prompts: int
    columns: tuple[str, ...]

    def __new__(cls, *, parts: int = 0, annotations: int = 0, legacy: int = 0, prompts: int = 0, columns: Iterable[str] = ()) -> Self:
        self = super().__new__(cls, parts + annotations + legacy)
        self.parts, self.annotations, self.legacy, self.prompts = parts, annotations, legacy, prompts
        self.columns = tuple(sorted(set(columns)))
        return self

    @classmethod
    def of(cls, entries: Sequence[EvictionEntry]) -> Self:
        """What some entries are."""
        infos = [entry.part.info for entry in entries if not entry.is_tombstone]
        return cls(
            parts=sum(info.kind == "part" for info in infos),
            annotations=sum(info.kind == "annotation" for info in infos),
            prompts=len({(info.group, row.tobytes()) for info in infos if info.kind == "part" for row in info.digests}),
            columns=[key.partition("/")[2] for info in infos for key in info.own_columns],
        )

    def joined(self, other: ClearSummary) -> ClearSummary:
        """Both together."""
        return ClearSummary(
            parts=self.parts + other.parts,
            annotations=self.annotations + other.annotations,
            legacy=self.legacy + other.legacy,
            prompts=self.prompts + other.prompts,
            columns=(*self.columns, *other.columns),
        )

    def __str__(self) -> str:
        what = [f"{count_of(self.parts, 'part')} of {count_of(self.prompts, 'prompt')}", count_of(self.annotations, "annotation")]
        what += [f"{count_of(self.legacy, 'prompt')} of lmprobe's own cache"] if self.legacy else []
        return ", ".join(what) + (f"; columns {', '.join(self.columns)}" if self.columns else "")

    __repr__ = __str__

    def __reduce__(self) -> tuple[object, ...]:
        return int, (int(self),)
