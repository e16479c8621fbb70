"""The answers that a request asks for: which prompt each belongs to, what it is found by, and what the store knows of it. Runs no model.

A prompt with its answer is a stored prompt of its own. Its digest is made of that of the prompt, the settings, the seed and the number of
the sample, none of which needs the model; so the same call finds its answers, and no answer is ever written a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lmprobe_zarr.batch import (
    ANSWER_COLUMNS,
    HASH_DIGITS,
    Answer,
    Column,
    Generate,
    Prompts,
    Settings,
    answer_columns,
    answer_sha256,
    decide_settings,
    decode_ids,
    fit_column,
    parse_ids,
)
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models import TokenizedPrompts, Window, length_limit, no_room, with_answers
from lmprobe_zarr.store.parts import View, kinds_of_column, read_column, read_values
from lmprobe_zarr.typing import Ints

__all__ = ["Answers", "as_stored", "ask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers to some prompts. An index is that of a prompt with an answer, among the distinct prompts of the request.

    Parameters
    ----------
    plain : Prompts
        The prompts without answers.
    settings : Settings
    seed : int, optional
        What sampling starts from: the caller's, or drawn; None for greedy answers.
    of : ndarray of int64, shape (answer,)
        Which of the plain prompts each answers.
    sample : ndarray of int64, shape (answer,)
    known : mapping of int to Answer
        Those that are stored, as far as they are needed again.
    lengths : mapping of int to int
        Tokens of prompt and answer together, of those.
    """

    plain: Prompts
    settings: Settings
    seed: int | None
    of: Ints
    sample: Ints
    known: Mapping[int, Answer] = field(default_factory=dict)
    lengths: Mapping[int, int] = field(default_factory=dict)

    def digests_of(self, rows: Sequence[int] | Ints) -> list[str]:
        """Whole digest of the prompt that each of these answers."""
        return [self.plain.sha256[self.of[i]] for i in rows]

    def unknown(self, rows: Ints) -> Ints:
        """Those that have to be generated."""
        return np.array([i for i in rows.tolist() if i not in self.known], np.int64)

    def columns(self, answers: Mapping[int, Answer]) -> dict[str, Column]:
        """Their columns, in the order of the mapping."""
        rows = list(answers)
        return answer_columns(list(answers.values()), self.digests_of(rows), self.sample[rows])

    def complete(self, prompts: TokenizedPrompts, rows: Ints, answers: Sequence[Answer], tokenizer: object) -> TokenizedPrompts:
        """Prompts with their answers, as the model is run over them; `rows` says which these are."""
        turns = None
        if self.plain.messages is not None:
            goes_on = bool(self.plain.chat.continue_final_message)
            turns = [len(self.plain.messages[self.of[i]]) - goes_on for i in rows.tolist()]
        return with_answers(prompts, [a.token_ids for a in answers], tokenizer, turns=turns)

    def check_lengths(self, missing: Ints, prompts: TokenizedPrompts, window: Window, max_length: int | None, tokenizer: object) -> None:
        """Check the tokens of missing prompts, given without their answers.

        Raises
        ------
        PromptTooLongError
            An answer that is still to be generated could go beyond the limit.
        InvalidArgumentError
            A prompt of a stored answer has other tokens now.
        """
        limit, most = length_limit(window, max_length, tokenizer), self.settings.max_new_tokens
        for number, i in enumerate(missing.tolist()):
            length, first = int(prompts.lengths[number]), int(prompts.first[number])
            if i not in self.known:
                if limit is not None and length + most > limit:
                    raise no_room(first, prompts.text[number], length, most, limit, window)
                continue
            expected = self.lengths[i] - len(self.known[i].token_ids)
            if length != expected:
                raise InvalidArgumentError(
                    f"prompts[{first}] has {length} tokens, and had {expected} when its answer was generated: give the tokenizer that it "
                    f"had then, or delete its answers (prompt_of {self.digests_of([i])[0][:HASH_DIGITS]}) and extract them again"
                )


def ask(generate: Generate, plain: Prompts, own: Mapping[str, object], drawn: int) -> tuple[Prompts, Answers]:
    """The prompts with their answers as distinct prompts, and the answers.

    Parameters
    ----------
    generate : Generate
    plain : Prompts
        The prompts of the call.
    own : mapping
        The model's own generation configuration.
    drawn : int
        The seed where the caller names none.

    Returns
    -------
    prompts : Prompts
        Those of one prompt stand together. Their texts and token ids are those of the plain prompts.
    answers : Answers
    """
    settings = decide_settings(generate, own)
    n = generate.n
    of, sample = np.repeat(np.arange(len(plain)), n), np.tile(np.arange(n), len(plain))
    digests = [answer_sha256(plain.sha256[i], settings, generate.seed, int(s)) for i, s in zip(of, sample, strict=True)]
    prompts = replace(
        plain.take(of),
        sha256=tuple(digests),
        row=(plain.row[:, None] * n + np.arange(n)).reshape(-1),
        timed=None,  # their digests are no texts' at all
    )
    seed = (drawn if generate.seed is None else generate.seed) if settings.samples else None
    return prompts, Answers(plain=plain, settings=settings, seed=seed, of=of, sample=sample)


def as_stored(answers: Answers, prompts: Prompts, view: View | None, missing: Ints, tokenizer: object) -> tuple[Prompts, Answers]:
    """The same with the stored answers of missing prompts, which lack other values; and with the texts that these belong to.

    Raises
    ------
    InvalidArgumentError
        A column of the caller's has the name and not the kind of one that answers have; the answer of stored values is not stored, or is
        no list of token ids; or a chat with a date was stored without its text.
    """
    answers = replace(answers, known={}, lengths={})
    if view is None:
        return prompts, answers
    _check_kinds(answers, view)
    rows = view.find([prompts.sha256[i] for i in missing])
    places, rows = missing[rows >= 0], rows[rows >= 0]
    if not len(rows):
        return prompts, answers
    held = view.columns("prompts")
    lost = [name for name in (*ANSWER_COLUMNS, "prompt_length") if name not in held]
    columns = {} if lost else {name: read_column(view, name, rows) for name in ANSWER_COLUMNS}
    gone = np.zeros(len(rows), bool) if columns.get("completion_ids") is None else columns["completion_ids"].missing
    if lost or (gone is not None and gone.any()):
        first = 0 if gone is None else int(np.argmax(gone))
        raise InvalidArgumentError(
            f"the answer of the stored prompt {view.hashes[rows[first]]} is not stored with it ({', '.join(lost) or 'completion_ids'}), so "
            "further values of it cannot be computed: delete it, store.delete(…, prompts=[…]), and extract it again"
        )
    seeds = columns["generation_seed"]
    known = {}
    for number, i in enumerate(places.tolist()):
        try:
            ids = parse_ids(str(columns["completion_ids"].values[number]))
        except ValueError as error:
            raise InvalidArgumentError(
                f"completion_ids of the stored prompt {view.hashes[rows[number]]} is no list of token ids ({error}): delete that prompt, "
                "store.delete(…, prompts=[…]), and extract it again"
            ) from error
        without_seed = seeds.kind.name == "missing" or (seeds.missing is not None and bool(seeds.missing[number]))
        known[i] = Answer(
            token_ids=ids,
            completion=str(columns["completion"].values[number]),
            finish_reason=str(columns["finish_reason"].values[number]),
            generation=str(columns["generation"].values[number]),
            seed=None if without_seed else int(seeds.values[number]),
        )
    lengths = dict(zip(places.tolist(), map(int, read_values(view, "prompts", "prompt_length", rows, ())), strict=True))
    return _with_dates(answers, prompts, view, places, rows, known, tokenizer), replace(answers, known=known, lengths=lengths)


def _with_dates(
    answers: Answers, prompts: Prompts, view: View, places: Ints, rows: Ints, known: Mapping[int, Answer], tokenizer: object
) -> Prompts:
    """The prompts, in which chats whose text depends on the time have the text that was answered."""
    if answers.plain.timed is None:
        return prompts
    timed = answers.plain.timed[answers.of[places]]
    places, rows = places[timed], rows[timed]
    texts = read_values(view, "prompts", "text", rows, ()).tolist() if len(rows) and "text" in view.columns("prompts") else [""] * len(rows)
    found = {}
    for i, text in zip(places.tolist(), texts, strict=True):
        if not text:
            raise InvalidArgumentError(
                f"prompts[{prompts.first[i]}] is a chat whose template prints the time, and its answer is stored without its text "
                "(store_text=False), so further values of it cannot be computed: delete it and extract all again, or give the template its "
                "date in chat_template_kwargs"
            )
        found[i] = str(text).removesuffix(decode_ids(tokenizer, known[i].token_ids))
    return prompts.with_texts(found)


def _check_kinds(answers: Answers, view: View) -> None:
    """Raise if a stored column of another kind is in the way of one that answers have."""
    example = Answer(token_ids=np.zeros(1, np.int64), completion="", finish_reason="stop", generation="{}", seed=answers.seed)
    for name, column in answers.columns({0: example}).items():
        fit_column(name, column, kinds_of_column(view, name))
