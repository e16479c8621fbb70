"""Rows that come in pieces, several prompts to a pass: they are pooled as whole prompts are, and counted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.batch import POOLINGS, offsets_of, pool_ragged, pooled_name
from lmprobe_zarr.errors import EngineError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lmprobe_zarr.extraction.models.gathered import POOL_PACKED, Gathered, Piece, Wish  # noqa: E402 — needs torch
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts  # noqa: E402
from lmprobe_zarr.extraction.models.vllm_engine import checked_answer  # noqa: E402
from lmprobe_zarr.extraction.models.vllm_worker import answer_of  # noqa: E402

pytestmark = pytest.mark.model

Rows = dict[tuple[str, int | None], Any]
Passes = Sequence[Sequence[tuple[int, int, int]]]

LENGTHS = np.array([3, 7, 1, 4])
STARTS = offsets_of(LENGTHS)
TOKENS = int(LENGTHS.sum())
IDS = np.arange(100, 100 + TOKENS)
TAIL = np.array([place >= 2 for length in LENGTHS for place in range(length)])
#: Each pass as pieces (prompt, first, count): one of whole prompts, one in another order, and one prompt over three passes.
WHOLE = [[(0, 0, 3), (1, 0, 7), (2, 0, 1), (3, 0, 4)]]
REORDERED = [[(2, 0, 1), (0, 0, 3)], [(3, 0, 4), (1, 0, 7)]]
SPLIT = [[(0, 0, 3), (1, 0, 2)], [(1, 2, 3), (2, 0, 1)], [(1, 5, 2), (3, 0, 4)]]
#: The second prompt is pushed out of memory after its first piece, and begins again.
AGAIN = [[(1, 0, 2), (0, 0, 3)], [(2, 0, 1), (3, 0, 4)], [(1, 0, 5)], [(1, 5, 2)]]


def wish(**changed: Any) -> Wish:
    given: dict[str, Any] = {
        "lengths": LENGTHS, "layers_of": {"resid": (0, 2), "embed": (None,)}, "poolings": POOLINGS,
        "parts": {"all": None, "tail": TAIL}, "keep_tokens": True,
    }  # fmt: skip
    return Wish(**given | changed)


def truth(dtype: Any = None) -> Rows:
    generator = torch.Generator().manual_seed(0)
    return {
        tap: torch.randn(TOKENS, 5, generator=generator).to(dtype or torch.float32) for tap in (("resid", 0), ("resid", 2), ("embed", None))
    }


def feed(
    gathered: Gathered, passes: Sequence[Sequence[tuple[int, int, int]]], rows: dict[tuple[str, int | None], Any], *, padding: int = 0
) -> Gathered:
    for pieces in passes:
        places = np.concatenate([np.arange(STARTS[p] + first, STARTS[p] + first + count) for p, first, count in pieces])
        gathered.begin_pass([Piece(prompt=p, first=first, count=count) for p, first, count in pieces], IDS[places])
        for (site, layer), values in rows.items():
            gathered.take(site, layer, torch.cat([values[places], torch.full((padding, values.shape[1]), torch.nan, dtype=values.dtype)]))
        gathered.end_pass()
    return gathered


def part() -> TokenizedPrompts:
    return TokenizedPrompts(
        sha256=tuple("abcd"), text=tuple("abcd"), lengths=LENGTHS, token_ids=IDS, truncated=np.zeros(4, bool), first=np.arange(4)
    )  # fmt: skip


def test_every_pooling_has_a_packed_form() -> None:
    assert tuple(POOL_PACKED) == POOLINGS


@pytest.mark.parametrize("passes", [WHOLE, REORDERED, SPLIT, AGAIN])
def test_pieces_become_whole_prompts(passes: Passes) -> None:
    rows = truth()
    levels, stored = checked_answer(answer_of(feed(Gathered(wish()), passes, rows, padding=2)), part())
    assert not stored
    layered = np.stack([rows["resid", 0].numpy(), rows["resid", 2].numpy()])
    assert np.array_equal(levels["tokens"]["resid"], layered)
    assert np.array_equal(levels["tokens"]["embed"], rows["embed", None].numpy())
    for pooling in POOLINGS:
        assert np.allclose(levels["prompts"][pooled_name("resid", pooling)], pool_ragged(layered, LENGTHS, pooling), atol=1e-6)
        found = levels["prompts"][pooled_name("embed", pooling, "tail")]
        tails = [np.flatnonzero(TAIL[a:b]) + a for a, b in itertools.pairwise(STARTS.tolist())]
        for prompt, tail in enumerate(tails):
            if not len(tail):
                assert np.isnan(found[prompt]).all()
                continue
            expected = pool_ragged(rows["embed", None].numpy()[None, tail], np.array([len(tail)]), pooling)[0, 0]
            assert np.allclose(found[prompt], expected, atol=1e-6)


def test_a_part_that_no_prompt_has_is_nan() -> None:
    none = np.zeros(TOKENS, bool)
    gathered = feed(Gathered(wish(parts={"tail": none}, keep_tokens=False)), SPLIT, truth())
    levels, _ = checked_answer(answer_of(gathered), part())
    assert levels["prompts"]["resid_mean_tail"].shape == (2, 4, 5)
    assert all(np.isnan(values).all() for values in levels["prompts"].values())


def test_bfloat16_arrives_as_float32_of_the_same_numbers() -> None:
    rows = truth(torch.bfloat16)
    levels, stored = checked_answer(answer_of(feed(Gathered(wish(parts={"all": None})), SPLIT, rows)), part())
    assert set(stored.values()) == {"bfloat16"}
    assert levels["tokens"]["embed"].dtype == np.float32
    assert np.array_equal(levels["tokens"]["embed"], rows["embed", None].float().numpy())
    assert np.array_equal(levels["prompts"]["embed_last_token"], rows["embed", None].float().numpy()[STARTS[1:] - 1])


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ([], "rows of 0 tokens came from vLLM for 15 tokens of 4 prompts"),  # compiled code: no hook runs
        (SPLIT[:-1], "rows of 9 tokens"),
        ([[(0, 0, 3), (2, 0, 1), (3, 0, 4)], [(1, 2, 5)]], "rows of positions 2 to 6 of a prompt of 7 tokens came, of which 0 had come"),
        ([*WHOLE, [(2, 1, 1)]], "rows of positions 1 to 1 of a prompt of 1 tokens came, of which 1 had come"),
    ],
)  # fmt: skip
def test_rows_that_are_not_those_of_the_tokens_are_an_error(passes: Passes, told: str) -> None:
    with pytest.raises(EngineError, match="so nothing of them is stored") as raised:
        checked_answer(answer_of(feed(Gathered(wish()), passes, truth())), part())
    assert told in str(raised.value)


def test_rows_of_other_tokens_are_an_error() -> None:
    gathered = feed(Gathered(wish()), WHOLE, truth())
    gathered.token_ids[4] += 1
    with pytest.raises(EngineError, match=r"rows of other tokens came from vLLM than those of prompts\[1\]"):
        checked_answer(answer_of(gathered), part())


def test_a_module_that_is_not_called_or_called_twice_is_an_error() -> None:
    rows = truth()
    lacking = {tap: values for tap, values in rows.items() if tap != ("resid", 2)}
    with pytest.raises(EngineError, match="1 of 3 modules were not called in a pass, such as that of 'resid' of layer 2"):
        checked_answer(answer_of(feed(Gathered(wish()), WHOLE, lacking)), part())
    gathered = Gathered(wish())
    gathered.begin_pass([Piece(prompt=2, first=0, count=1)], IDS[STARTS[2] : STARTS[3]])
    for _ in range(2):
        gathered.take("resid", 0, rows["resid", 0][:1])
    assert gathered.problem == "the module at site 'resid' of layer 0 is called more than once in one pass"


def test_fewer_rows_than_tokens_are_an_error() -> None:
    gathered = Gathered(wish())
    gathered.begin_pass([Piece(prompt=0, first=0, count=3)], IDS[:3])
    gathered.take("resid", 0, torch.zeros(2, 5))
    assert gathered.problem == "site 'resid' of layer 0 gives (2, 5) for 3 tokens"
