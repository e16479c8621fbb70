"""What a pooling applies to: the activations of a prompt's tokens, before classification, or their scores, after it.

Names mean the same as in lmprobe: ``max`` and ``min`` alone pool scores, and the other names alone pool activations. A prefix
``activation:`` or ``score:`` chooses explicitly, and ``all`` pools nothing. Names and numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.batch.pooling import POOLINGS, pool_ragged
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array, Ints

__all__ = ["BY_PROBE", "TRAINING", "Stage", "parse_stage", "reduce_scores"]

_POOLS_SCORES: Final = ("max", "min")  # without a prefix, as in lmprobe
TRAINING: Final = (*(name for name in POOLINGS if name not in _POOLS_SCORES), "all")


@dataclass(frozen=True, slots=True)
class Stage:
    """What is pooled and how.

    Parameters
    ----------
    of : {"activation", "score", "nothing", "learned"}
        "learned": the probe itself pools the tokens of a prompt.
    pooling : str
        One of ``last_token, first_token, mean, max, min``; empty for nothing, and for what is learned.
    """

    of: str
    pooling: str = ""

    @property
    def needs_tokens(self) -> bool:
        """Whether every token is needed."""
        return self.of != "activation"


#: The stage of probes that learn how to pool.
BY_PROBE: Final = Stage("learned")


def parse_stage(name: object, *, training: bool = False) -> Stage:
    """What a pooling's name means.

    Parameters
    ----------
    name : str
        ``last_token``, ``first_token``, ``mean``, ``max``, ``min``, ``all``, or one of the first five after ``activation:`` or ``score:``.
    training : bool
        Whether the pooling is for training, which takes ``last_token``, ``first_token``, ``mean`` and ``all`` (train on every token).

    Raises
    ------
    InvalidArgumentError
        Another name.
    """
    if training and (not isinstance(name, str) or name not in TRAINING):
        raise InvalidArgumentError(
            f"pooling {name!r} cannot be trained on: train_pooling takes {', '.join(TRAINING)}; give {name!r} as inference_pooling"
        )
    if isinstance(name, str) and name == "all":
        return Stage("nothing")
    of, _, pooling = str(name).rpartition(":")
    if not isinstance(name, str) or pooling not in POOLINGS or of not in ("", "activation", "score") or (not of and ":" in str(name)):
        raise InvalidArgumentError(
            f"unknown pooling {name!r}: use {', '.join(POOLINGS)} or all, with 'activation:' or 'score:' in front to say what is pooled"
        )
    return Stage(of or ("score" if pooling in _POOLS_SCORES else "activation"), pooling)


def reduce_scores(scores: Array, n_tokens: Ints, pooling: str) -> Array:
    """One score per prompt, or one per prompt and class, from the scores of its tokens.

    Parameters
    ----------
    scores : ndarray of float, shape (token,) or (token, class)
    n_tokens : ndarray of int, shape (prompt,)
    pooling : str
        Each class is pooled separately, so after ``max`` the classes of a prompt need not sum to one.

    Returns
    -------
    ndarray, shape (prompt,) or (prompt, class)
    """
    flat = scores.reshape(len(scores), -1)
    return pool_ragged(flat, n_tokens, pooling).reshape(len(n_tokens), *scores.shape[1:])
