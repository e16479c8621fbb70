"""Prompts to token ids, with the characters of every token in its text. Needs a tokenizer, never a model or torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import Prompts, accepted, concat_ranges, decode_ids, offsets_of, positions_of, role_code, shorten, special_id
from lmprobe_zarr.errors import InvalidArgumentError, PromptTooLongError
from lmprobe_zarr.extraction.models.chat_roles import role_columns
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.window import Window
from lmprobe_zarr.log import warn
from lmprobe_zarr.typing import Ints

__all__ = [
    "DecoderStart",
    "TokenizedPrompts",
    "check_vocabulary",
    "length_limit",
    "no_room",
    "outside_vocabulary",
    "tokenize",
    "too_long",
    "with_answers",
]

CHUNK_PROMPTS: Final = 512
# Tokenizers without a limit have a number such as 1e30.
ABSURD_LENGTH: Final = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompts:
    """The tokens of some prompts, end to end, without padding.

    Parameters
    ----------
    sha256 : tuple of str
        Digest of every prompt.
    text : tuple of str
        Text of every prompt.
    lengths : ndarray of int64, shape (prompt,)
        Tokens of every prompt; all at least 1.
    token_ids : ndarray of int64, shape (token,)
    char_start, char_end : ndarray of int64, shape (token,), or None
        ``text[char_start:char_end]`` is the text of the token; −1 for tokens that the tokenizer added. None where unknown.
    truncated : ndarray of bool, shape (prompt,)
        Which prompts lost tokens.
    first : ndarray of int64, shape (prompt,)
        Place of each prompt in the caller's list, for messages.
    encoder_ids : tuple of ndarray of int64, or None
        For pairs, the tokens that the encoder reads; all else is of what the decoder reads.
    columns : mapping of str to ndarray of int64, shape (token,)
        Further columns of the tokens, such as ``generated``; stored where anything is stored by token. Chats have ``role``, a code, and
        ``turn``, where they were asked for.
    role_names : tuple of str
        The names of roles by their code in ``columns["role"]``; `role_code` finds the code of a name.
    parts : mapping of str to ndarray of bool, shape (token,)
        By name, which tokens are in a part that is pooled by itself.
    """

    sha256: tuple[str, ...]
    text: tuple[str, ...]
    lengths: Ints
    token_ids: Ints
    char_start: Ints | None = None
    char_end: Ints | None = None
    truncated: npt.NDArray[np.bool_]
    first: Ints
    encoder_ids: tuple[Ints, ...] | None = None
    columns: Mapping[str, Ints] = field(default_factory=dict)
    role_names: tuple[str, ...] = ()
    parts: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sha256)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts together."""
        return int(self.lengths.sum())

    @property
    def run_lengths(self) -> Ints:
        """How many tokens of every prompt are run, those of its encoder included, shape (prompt,)."""
        return self.lengths if self.encoder_ids is None else self.lengths + np.array([len(ids) for ids in self.encoder_ids], np.int64)

    def take(self, rows: Sequence[int] | Ints) -> TokenizedPrompts:
        """Some of the prompts, in the order of `rows`."""
        chosen = np.asarray(rows, np.int64)
        tokens = concat_ranges(offsets_of(self.lengths)[chosen], self.lengths[chosen])
        return TokenizedPrompts(
            sha256=tuple(self.sha256[i] for i in chosen),
            text=tuple(self.text[i] for i in chosen),
            lengths=self.lengths[chosen],
            token_ids=self.token_ids[tokens],
            char_start=None if self.char_start is None else self.char_start[tokens],
            char_end=None if self.char_end is None else self.char_end[tokens],
            truncated=self.truncated[chosen],
            first=self.first[chosen],
            encoder_ids=None if self.encoder_ids is None else tuple(self.encoder_ids[i] for i in chosen),
            columns={name: column[tokens] for name, column in self.columns.items()},
            role_names=self.role_names,
            parts={name: mask[tokens] for name, mask in self.parts.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderStart:
    """How the tokens of a decoder's text become what it reads, as transformers shifts labels.

    Parameters
    ----------
    token_id : int
        Stands before the tokens; where `wraps`, the last token of the text does.
    wraps : bool
    """

    token_id: int = 0
    wraps: bool = False

    def before(self, ids: Ints, *, ends: bool) -> Ints:
        """What the decoder reads for the tokens of its text; `ends` says that the tokenizer added the last of them."""
        if self.wraps:
            return np.roll(ids, 1)
        return np.concatenate([np.array([self.token_id], np.int64), ids[:-1] if ends else ids])


def length_limit(context_length: int | Window | None, max_length: int | None, tokenizer: Any = None) -> int | None:
    """The most tokens that a prompt may have; None where no limit is known.

    `max_length` if it is given, but never more than a model takes whose positions are a table. Otherwise the model's window. The
    tokenizer's own ``model_max_length`` counts only where the window is unknown, because it is often left over from training.

    Parameters
    ----------
    context_length : int, Window or None
        The model's window. A number is one that the model fails beyond; None is an unknown one.
    max_length : int or None
        The caller's limit.
    tokenizer : transformers tokenizer, optional

    Raises
    ------
    InvalidArgumentError
        `max_length` is not a whole number of at least 1.
    """
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise InvalidArgumentError(f"max_length={max_length!r} is no number of tokens: give a whole number of at least 1, or None")
    window = Window.of(context_length)
    if max_length is not None:
        return min(max_length, window.tokens) if window.fixed and window.tokens is not None else max_length
    if window.known:
        return window.tokens
    own = getattr(tokenizer, "model_max_length", None)
    return int(own) if own is not None and 0 < own < ABSURD_LENGTH else None


def too_long(number: int, text: str, length: int, limit: int | None, window: Window) -> PromptTooLongError:
    """The error for a prompt that is longer than the limit."""
    longer = "" if window.fixed else ", pass max_length= for a larger one"
    return PromptTooLongError(
        f"prompts[{number}] {shorten(text)} has {length} tokens, but the limit is {limit}: shorten it{longer}, or pass truncation=True"
    )


def no_room(number: int, text: str, length: int, new: int, limit: int, window: Window) -> PromptTooLongError:
    """The error for a prompt whose answer could go beyond the limit."""
    longer = "" if window.fixed else ", pass max_length= for a larger limit"
    return PromptTooLongError(
        f"prompts[{number}] {shorten(text)} has {length} tokens, and an answer of {new} more would go beyond the limit of {limit}: "
        f"give a smaller max_new_tokens, shorten the prompt{longer}"
    )


@contextmanager
def _unchanged(tokenizer: Any) -> Iterator[None]:
    """Restore the tokenizer's truncation and padding afterwards, which a call resets."""
    backend = getattr(tokenizer, "_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if backend.truncation != truncation:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        if backend.padding != padding:
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


Pieces = tuple[list[Ints], list[npt.NDArray[np.int64]] | None]


def _encode(texts: Sequence[str], tokenizer: Any, *, special: bool, limit: int | None) -> Pieces:
    """Token ids of every text, and for fast tokenizers their (start, end) in characters: shape (token, 2)."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    ids: list[Ints] = []
    places: list[Ints] = []
    # Only what this call needs and what the tokenizer names: some raise for arguments that they do not know.
    options: dict[str, Any] = {"return_offsets_mapping": True, "return_special_tokens_mask": True} if fast else {}
    options |= accepted(
        tokenizer.__call__, padding=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )  # fmt: skip
    options |= {} if special else {"add_special_tokens": False}
    options |= {} if limit is None else {"truncation": True, "max_length": limit}
    for start in range(0, len(texts), CHUNK_PROMPTS):
        encoded = tokenizer(list(texts[start : start + CHUNK_PROMPTS]), **options)
        ids += [np.asarray(i, np.int64) for i in encoded["input_ids"]]
        if fast:
            for offsets, added in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True):
                place = np.asarray(offsets, np.int64).reshape(-1, 2)
                place[np.asarray(added, np.bool_)] = -1
                places.append(place)
    return ids, places if fast else None


def _tokenize_texts(
    prompts: Prompts, tokenizer: Any, limit: int | None, truncation: bool, special: bool
) -> tuple[Pieces, npt.NDArray[np.bool_]]:
    assert prompts.text is not None  # noqa: S101 - only ids come without a text
    for number, text in enumerate(prompts.text):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"prompts[{prompts.first[number]}] {text[:20]!a} holds a lone surrogate at character {error.start}: remove it"
            ) from error
    with _unchanged(tokenizer):
        ids, places = _encode(prompts.text, tokenizer, special=special, limit=None)
        long = np.array([limit is not None and len(i) > limit for i in ids], np.bool_)
        if truncation and long.any():
            added = tokenizer.num_special_tokens_to_add(pair=False) if special else 0
            if limit is not None and limit <= added:
                raise InvalidArgumentError(
                    f"max_length={limit} leaves no room beside the {added} special tokens of this tokenizer: give more than {added}"
                )
            rows = np.flatnonzero(long)
            cut, cut_places = _encode([prompts.text[i] for i in rows], tokenizer, special=special, limit=limit)
            for n, i in enumerate(rows):
                ids[i] = cut[n]
                if places is not None and cut_places is not None:
                    places[i] = cut_places[n]
    return (ids, places), long


def _tokenize_pairs(
    prompts: Prompts, tokenizer: Any, limit: int | None, truncation: bool, special: bool, start: DecoderStart
) -> tuple[Pieces, npt.NDArray[np.bool_], tuple[Ints, ...]]:
    """As `_tokenize_texts`, for the texts of decoders; and the tokens of their encoders' texts."""
    assert prompts.encoder_text is not None  # noqa: S101 - that is what the kind says
    read = replace(prompts, text=prompts.encoder_text)
    (encoder_ids, _), long = _tokenize_texts(read, tokenizer, limit, truncation, special)
    with _as_targets(tokenizer):
        (labels, places), long_labels = _tokenize_texts(prompts, tokenizer, limit, truncation, special)
    end = {special_id(tokenizer, name) for name in ("eos_token", "sep_token")} - {None} if special else set()
    ids, shifted = [], []
    for number, tokens in enumerate(labels):
        ends = len(tokens) > 0 and int(tokens[-1]) in end
        ids.append(start.before(tokens, ends=ends))
        if places is not None:
            place = places[number]
            shifted.append(np.roll(place, 1, axis=0) if start.wraps else np.vstack([[[-1, -1]], place[:-1] if ends else place]))
        if limit is not None and len(ids[number]) > limit:  # by the token that the decoder reads first
            long_labels[number] = True
            if truncation:
                ids[number] = ids[number][:limit]
                if places is not None:
                    shifted[number] = shifted[number][:limit]
    return (ids, shifted if places is not None else None), long | long_labels, tuple(encoder_ids)


@contextmanager
def _as_targets(tokenizer: Any) -> Iterator[None]:
    """The tokenizer reads texts of decoders inside, which some (Marian, NLLB) tokenize otherwise."""
    if hasattr(tokenizer, "_switch_to_target_mode") and hasattr(tokenizer, "_switch_to_input_mode"):
        tokenizer._switch_to_target_mode()
        try:
            yield
        finally:
            tokenizer._switch_to_input_mode()
    else:
        yield


def _tokenize_ids(prompts: Prompts, tokenizer: Any, limit: int | None, truncation: bool) -> tuple[Pieces, npt.NDArray[np.bool_]]:
    assert prompts.token_ids is not None  # noqa: S101 - that is what the kind says
    ids = list(prompts.token_ids)
    long = np.array([limit is not None and len(i) > limit for i in ids], np.bool_)
    if truncation and limit is not None:
        left = getattr(tokenizer, "truncation_side", "right") == "left"
        ids = [i[-limit:] if left else i[:limit] for i in ids]
    return (ids, None), long


def _warn_of_padding(prompts: Prompts, ids: Sequence[Ints], tokenizer: Any) -> None:
    """Warn if prompts of one length may hold padding. What cannot be anything else has been refused: see `parse_prompts`."""
    pad = special_id(tokenizer, "pad_token")
    if pad is None or len({len(i) for i in ids}) != 1:
        return
    for words, ends in (("ends", [int(i[-1]) == pad for i in ids]), ("begins", [int(i[0]) == pad for i in ids])):
        if any(ends) and not all(ends):
            warn(
                f"prompts[{prompts.first[ends.index(True)]}] {words} with the token id {pad}, with which this tokenizer pads too, and all "
                "prompts have the same length: if that token is padding, leave it out, ids[mask == 1]",
                UserWarning,
            )
            return


def _warn_of_doubled(prompts: Prompts, ids: Sequence[Ints], tokenizer: Any) -> None:
    """Warn if texts begin or end with the very special token that the tokenizer adds there, as chats do that were rendered by hand."""
    for at, step, words, names in (
        (0, 1, "begin", ("bos_token", "cls_token")),
        (-1, -1, "end", ("eos_token", "sep_token")),
    ):
        special = {special_id(tokenizer, name) for name in names} - {None}
        doubled = [n for n, i in enumerate(ids) if len(i) > 1 and int(i[at]) == int(i[at + step]) and int(i[at]) in special]
        if doubled:
            number = int(prompts.first[doubled[0]])
            token = int(ids[doubled[0]][at])
            warn(
                f"{len(doubled)} of {len(ids)} texts, first prompts[{number}], {words} with the special token that the tokenizer adds to "
                f"texts, so the model gets it twice (token id {token}): pass add_special_tokens=False for texts that have their special "
                "tokens already, or give chats as lists of messages",
                UserWarning,
            )
            return


def outside_vocabulary(number: int, token_id: int, vocab_size: int, *, given: bool = False) -> InvalidArgumentError:
    """The error for a token id that a model does not have."""
    which = "holds" if given else "becomes"
    why = "" if given else "the tokenizer and the model do not belong together; "
    return InvalidArgumentError(
        f"prompts[{number}] {which} the token id {token_id}, but the vocabulary ends at {vocab_size - 1}: "
        f"{why}use this model's own tokenizer"
    )


def check_vocabulary(tokenized: TokenizedPrompts, vocab_size: int | None) -> None:
    """Raise `InvalidArgumentError` for a token id that a model with a vocabulary of this size does not have."""
    if vocab_size is not None and len(tokenized) and tokenized.token_ids.max() >= vocab_size:
        place = int(tokenized.token_ids.argmax())
        row = int(np.searchsorted(np.cumsum(tokenized.lengths), place, side="right"))
        raise outside_vocabulary(int(tokenized.first[row]), int(tokenized.token_ids[place]), vocab_size)


def tokenize(
    prompts: Prompts,
    tokenizer: Any,
    *,
    context_length: int | Window | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    vocab_size: int | None = None,
    add_special_tokens: bool = True,
    decoder_start: DecoderStart | None = None,
    roles: bool = False,
) -> TokenizedPrompts:
    """The tokens of every prompt, as the model will see them.

    Texts get the tokenizer's special tokens; rendered chats have them already; token ids are taken as they are. The tokenizer's padding and
    truncation settings are ignored and left as they were.

    Parameters
    ----------
    prompts : Prompts
    tokenizer : transformers tokenizer
    context_length : int or Window, optional
        The model's window, tokens; a number is one that the model fails beyond.
    max_length : int, optional
        Another limit, tokens; see :func:`length_limit`.
    truncation : bool
        Cut prompts that are longer than the limit, on the tokenizer's truncation side, instead of raising.
    vocab_size : int, optional
        Token ids at or above it are an error.
    add_special_tokens : bool
        Whether texts get the tokenizer's special tokens. Rendered chats and token ids never do.
    decoder_start : DecoderStart, optional
        For pairs, what the decoder reads first; without it the number of tokens is right, and the first is not.
    roles : bool
        Whether to find out the role and the turn of the tokens of chats, for which each is rendered several times more.

    Raises
    ------
    PromptTooLongError
        A prompt is longer than the limit and `truncation` is False.
    InvalidArgumentError
        A prompt without tokens, a token id outside the vocabulary, text that is not Unicode, or a `max_length` that leaves room only for
        special tokens.

    Warns
    -----
    UserWarning
        Texts begin or end with a special token that the tokenizer adds once more; token ids that may hold padding; contents of chats whose
        tokens cannot be told.
    """
    limit = length_limit(context_length, max_length, tokenizer)
    special = add_special_tokens and prompts.kind in ("text", "pair")
    encoder_ids: tuple[Ints, ...] | None = None
    # Setting the truncation changes the tokenizer for all threads, and a fast one raises if another thread is using it.
    with running(tokenizer):
        if prompts.token_ids is not None:
            (ids, places), long = _tokenize_ids(prompts, tokenizer, limit, truncation)
        elif prompts.kind == "pair":
            (ids, places), long, encoder_ids = _tokenize_pairs(
                prompts, tokenizer, limit, truncation, special, decoder_start or DecoderStart()
            )
        else:
            (ids, places), long = _tokenize_texts(prompts, tokenizer, limit, truncation, special)
    if prompts.kind == "text" and special:
        _warn_of_doubled(prompts, ids, tokenizer)
    elif prompts.kind == "ids":
        _warn_of_padding(prompts, prompts.token_ids or (), tokenizer)
    text = prompts.text
    if text is None:
        assert prompts.token_ids is not None  # noqa: S101 - only ids come without a text
        text = tuple(decode_ids(tokenizer, i) for i in prompts.token_ids)
    for number, tokens in enumerate(ids):
        read = () if encoder_ids is None else (encoder_ids[number],)
        if any(not len(each) for each in (tokens, *read)):
            raise InvalidArgumentError(f"prompts[{prompts.first[number]}] {shorten(text[number])} has no tokens: leave it out")
        if long[number] and not truncation:
            longest = max(len(each) for each in (tokens, *read))
            raise too_long(int(prompts.first[number]), text[number], longest, limit, Window.of(context_length))
        if vocab_size is not None and tokens.max() >= vocab_size:
            raise outside_vocabulary(int(prompts.first[number]), int(tokens.max()), vocab_size, given=prompts.kind == "ids")
    joined = None if places is None else np.concatenate(places)
    columns: dict[str, Ints] = {}
    names: tuple[str, ...] = ()
    if roles and prompts.kind == "chat":
        with running(tokenizer), _unchanged(tokenizer):
            columns, names = role_columns(prompts, ids, places, tokenizer)
    return TokenizedPrompts(
        sha256=prompts.sha256,
        text=text,
        lengths=np.array([len(i) for i in ids], np.int64),
        token_ids=np.concatenate(ids),
        char_start=None if joined is None else joined[:, 0].copy(),
        char_end=None if joined is None else joined[:, 1].copy(),
        truncated=long & truncation,
        first=prompts.first,
        encoder_ids=encoder_ids,
        columns=columns,
        role_names=names,
    )


def with_answers(
    prompts: TokenizedPrompts, answers: Sequence[Ints], tokenizer: Any, *, turns: Sequence[int] | None = None
) -> TokenizedPrompts:
    """Prompts, each with the tokens of an answer behind its own; the column ``generated`` is 1 for these, and 0 for the prompt's.

    Parameters
    ----------
    prompts : TokenizedPrompts
    answers : sequence of ndarray of int64
        Token ids of the answer to each prompt.
    tokenizer : transformers tokenizer
        Says which characters of the answer, special tokens included, each token has.
    turns : sequence of int, optional
        For chats, the turn of each answer, whose role is the assistant's.
    """
    counts = np.array([len(ids) for ids in answers], np.int64)
    lengths = prompts.lengths + counts
    generated = positions_of(lengths) >= np.repeat(prompts.lengths, lengths)

    def joined(before: Ints, behind: Ints | int) -> Ints:
        column = np.empty(len(generated), np.int64)
        column[~generated], column[generated] = before, behind
        return column

    texts = [decode_ids(tokenizer, ids) for ids in answers]
    ends = np.array([len(text) for text in prompts.text], np.int64)
    places = [_pieces(tokenizer, ids, text) for ids, text in zip(answers, texts, strict=True)]
    spans = np.concatenate([np.zeros((0, 2), np.int64), *(np.where(p < 0, -1, p + end) for p, end in zip(places, ends, strict=True))])
    columns = {name: joined(column, -1) for name, column in prompts.columns.items()}
    if turns is not None and "role" in columns:
        columns["role"][generated] = role_code("assistant", prompts.role_names)
        columns["turn"][generated] = np.repeat(np.asarray(turns, np.int64), counts)
    return replace(
        prompts,
        text=tuple(text + more for text, more in zip(prompts.text, texts, strict=True)),
        lengths=lengths,
        token_ids=joined(prompts.token_ids, np.concatenate([np.zeros(0, np.int64), *answers])),
        char_start=None if prompts.char_start is None else joined(prompts.char_start, spans[:, 0]),
        char_end=None if prompts.char_end is None else joined(prompts.char_end, spans[:, 1]),
        columns={**columns, "generated": generated.astype(np.int64)},
    )


def _pieces(tokenizer: Any, ids: Ints, text: str) -> Ints:
    """The characters of each token in the text that the tokens are decoded to, (token, 2); -1 where they cannot be told.

    A token is decoded together with a few before it, since tokenizers leave out blanks at the beginning of a text. Tokens that are a part
    of one character are known once it is whole: the last of them has it.
    """
    found = np.full((len(ids), 2), -1, np.int64)
    start = known = at = 0
    for number in range(len(ids)):
        before = decode_ids(tokenizer, ids[start:known]) if known > start else ""
        now = decode_ids(tokenizer, ids[start : number + 1])
        if len(now) <= len(before) or now.endswith("\ufffd") or not now.startswith(before):
            continue
        more = now[len(before) :]
        if not text.startswith(more, at):
            return np.full((len(ids), 2), -1, np.int64)
        found[number] = at, at + len(more)
        at += len(more)
        start, known = known, number + 1
    return found
