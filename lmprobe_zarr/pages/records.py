"""What a page shows, as values: contents of a group, its coverage, norms, scores and tokens. Nothing is read, computed or drawn here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmprobe_zarr.display import Html
from lmprobe_zarr.pages.pictures import Chart
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Coverage", "GroupPage", "LayerProfile", "ListedGroup", "ShownPrompt", "ShownTokens", "TokenMap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedGroup:
    """One group as every page lists it.

    Parameters
    ----------
    model, name : str
        Of the model, and of the group.
    prompts, tokens : int
    layers, hidden, stored_in : str
        Layers, width, and parts, as text.
    raw_nbytes, nbytes : int
        Bytes before compression and as stored.
    summary : str
        The group in one line.
    sections : tuple of Html
        Variables, columns and provenance, each in a section that opens and closes.
    """

    model: str
    name: str
    prompts: int
    tokens: int
    layers: str
    hidden: str
    stored_in: str
    raw_nbytes: int
    nbytes: int
    summary: str
    sections: tuple[Html, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The share of neighbouring prompts that a variable is stored for, by layer.

    Parameters
    ----------
    variable : str
    level : {"prompts", "tokens"}
    layers : tuple of int
        Empty for a variable without layers, which has one row.
    edges : tuple of int
        Indices, in the store's order, of the prompts that begin a bin, and last the number of prompts.
    shares : ndarray of float, shape (layer, bin)
        0 to 1.
    """

    variable: str
    level: Literal["prompts", "tokens"]
    layers: tuple[int, ...]
    edges: tuple[int, ...]
    shares: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Norms and outliers of one variable by layer.

    Parameters
    ----------
    variable : str
    level : {"prompts", "tokens"}
    layers : tuple of int
    rows, of_rows : int
        Number of rows (tokens, or prompts) that were read, and of all rows.
    prompts, of_prompts : int
        The same numbers in prompts.
    norms : ndarray of float, shape (3, layer)
        5th, 50th and 95th percentile of the rows' Euclidean norms.
    largest_norm : ndarray of float, shape (layer,)
    first_norm : ndarray of float, shape (layer,), optional
        Median norm of the first tokens of the prompts; None if rows are prompts.
    peak : ndarray of float, shape (layer,)
        The largest absolute value.
    ratio : ndarray of float, shape (layer,)
        Root mean square of the largest unit, divided by that of the median unit.
    unit : ndarray of int, shape (layer,)
        Index of the largest unit.
    n_outliers : ndarray of int, shape (layer,)
        Units whose root mean square is more than six times the median unit's.
    not_finite : ndarray of int, shape (layer,)
        Rows that are left out because a value is NaN or infinite, or because they are not stored.
    """

    variable: str
    level: Literal["prompts", "tokens"]
    layers: tuple[int, ...]
    rows: int
    of_rows: int
    prompts: int
    of_prompts: int
    norms: Array
    largest_norm: Array
    first_norm: Array | None
    peak: Array
    ratio: Array
    unit: Ints
    n_outliers: Ints
    not_finite: Ints

    @property
    def is_sample(self) -> bool:
        """Whether only some of the prompts were read."""
        return self.prompts < self.of_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMap:
    """A number for every token of some prompts, by layer.

    Parameters
    ----------
    layers : tuple of int
    rows : ndarray of int
        The prompts, by their places in the view.
    counts : ndarray of int, shape (len(rows),)
        How many of their tokens are shown.
    of_counts : ndarray of int
        How many tokens they have.
    values : ndarray of float, shape (layer, token)
        Values of the tokens of all prompts, end to end.
    """

    layers: tuple[int, ...]
    rows: Ints
    counts: Ints
    of_counts: Ints
    values: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrompt:
    """One prompt of a token map.

    Parameters
    ----------
    hash : str
    label : str
        Its label, if there is one.
    text : str
        The whole text, if it is known but the places of its tokens are not; else empty.
    pieces : tuple of (str, str)
        For each token shown: the text between it and the token before, and its own text, which is empty if unknown.
    names : tuple of str
        What each token is called: its text, id or position.
    roles : tuple of str
        The role of each token, empty where it is unknown; none where nothing is known of any.
    generated : tuple of bool
        Whether the model has generated each token; none where it has generated none.
    """

    hash: str
    label: str
    text: str
    pieces: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    roles: tuple[str, ...] = ()
    generated: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTokens:
    """A token map with what is needed to show it.

    Parameters
    ----------
    values : TokenMap
    prompts : tuple of ShownPrompt
    what : str
        What a value is, in a few words.
    two : bool
        Whether values are scores on both sides of 0; else norms or weights.
    note : str
        How the values were computed.
    weights : bool
        Whether values are weights, from 0 on.
    """

    values: TokenMap
    prompts: tuple[ShownPrompt, ...]
    what: str
    two: bool
    note: str
    weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPage:
    """Everything that the page shows of one group.

    Parameters
    ----------
    contents : ListedGroup
    layers : tuple of int
        The layers that are shown; if there are too many, every n-th.
    coverage : tuple of Coverage
    profile : LayerProfile or None
    scores : tuple of Chart
        One for each metric.
    scores_note : str
        What the scores were computed from, and how.
    tokens : ShownTokens or None
    missing : tuple of str
        What is not shown, and why.
    start : int
        The layer that is selected when the page opens.
    listed : Html, optional
        Its first prompts with their columns, under a title of its own.
    """

    contents: ListedGroup
    layers: tuple[int, ...]
    coverage: tuple[Coverage, ...]
    profile: LayerProfile | None
    scores: tuple[Chart, ...]
    scores_note: str
    tokens: ShownTokens | None
    missing: tuple[str, ...]
    start: int
    listed: Html | None = None
