"""What `extract(generate=…)` asks for: how answers are written, which of them is which, and what is kept of each. Never a model or torch.

Settings are those of transformers' generation configuration. What counts is what they come to together with the model's own configuration:
two calls that come to the same ask for the same answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch.columns import Column
from lmprobe_zarr.batch.hashes import HASH_DIGITS
from lmprobe_zarr.batch.parse_column import parse_column
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Ints

__all__ = [
    "ANSWER_COLUMNS",
    "NEUTRAL",
    "SAMPLING",
    "Answer",
    "Generate",
    "Settings",
    "answer_columns",
    "answer_sha256",
    "check_answer_columns",
    "decide_settings",
    "draw_uniform",
    "parse_ids",
]

#: Columns of prompts that have an answer, in every part that holds any.
ANSWER_COLUMNS: Final = (
    "completion", "completion_ids", "prompt_of", "finish_reason", "generation", "generation_seed", "generation_sample",
)  # fmt: skip

# What decides between tokens where sampling does, with the values that transformers gives them where nobody names one.
SAMPLING: Final[Mapping[str, Any]] = MappingProxyType(
    {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
)
# These are recorded whenever answers are sampled, since few expect that transformers takes the 50 likeliest tokens only.
_ALWAYS_RECORDED: Final = ("temperature", "top_k", "top_p")
# What else changes the answers and is understood here, with the values that change nothing.
NEUTRAL: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "min_new_tokens": None, "min_length": 0,
        "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None,
        "exponential_decay_length_penalty": None, "remove_invalid_values": False, "eos_token_id": None, "stop_strings": None,
    }
)  # fmt: skip
# What would make another kind of search, or answers that no two runs have in common; with the values that switch it off.
_REFUSED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0, 0.0), "guidance_scale": (1, 1.0), "constraints": (),
        "force_words_ids": (), "watermarking_config": (), "top_h": (), "dola_layers": (), "max_time": (), "token_healing": (False,),
        "forced_bos_token_id": (), "forced_eos_token_id": (), "prompt_lookup_num_tokens": (), "assistant_early_exit": (),
        "use_mtp": (False,), "encoder_no_repeat_ngram_size": (0,), "diversity_penalty": (0, 0.0), "num_return_sequences": (1,),
    }
)  # fmt: skip
_FLOATS: Final = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
)
_KNOWN: Final = ("max_new_tokens", "do_sample", *SAMPLING, *NEUTRAL)
_OWN_ARGUMENTS: Final = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "seed", "n")
MOST_SEEDS: Final = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How answers are written, decided: what a `Generate` comes to with the model's own configuration.

    Parameters
    ----------
    values : mapping of str to JSON values
        ``max_new_tokens``, ``do_sample``, and all else that differs from what changes nothing.
    deviations : tuple of str
        Which of them the caller chose otherwise than the model's own configuration.
    """

    values: Mapping[str, Any]
    deviations: tuple[str, ...] = ()

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer at most."""
        return int(self.values["max_new_tokens"])

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, not the likeliest taken."""
        return bool(self.values["do_sample"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """How the model answers the prompts of `extract`. What is left out is as the model's own generation configuration has it.

    Parameters
    ----------
    max_new_tokens : int, optional
        Tokens of an answer at most, the one that ends it included. Needed unless the model's own configuration names it.
    temperature : float, optional
        0 takes the likeliest token each time; any other number samples.
    top_p, top_k : float, int, optional
        Sample among the likeliest tokens only: those of this probability together, or this number of them (0 for all).
    do_sample : bool, optional
        Whether tokens are sampled. By default they are where any of the three above says so, or the model's own configuration.
    seed : int, optional
        What sampling starts from. Without one it is drawn, and recorded; the same call finds the answers that were drawn first.
    n : int
        Answers per prompt.
    settings : mapping, optional
        More of transformers' generation configuration: ``repetition_penalty``, ``min_new_tokens``, ``stop_strings``, ``eos_token_id``,
        ``min_p`` and so on; None switches off what the model's own configuration has.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        A value that makes no sense, an unknown setting, beam search, or several greedy answers of one prompt.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    do_sample: bool | None = None
    seed: int | None = None
    n: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least, most, ways in (
            ("max_new_tokens", 1, None, "give a whole number of at least 1"),
            ("top_k", 0, None, "give a whole number, 0 for all tokens"),
            ("seed", 0, MOST_SEEDS - 1, "give a whole number from 0 to 2**63 - 1, or None to have one drawn"),
            ("n", 1, None, "give a whole number of at least 1"),
        ):
            value = getattr(self, name)
            if value is None and name != "n":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least or (most is not None and value > most):
                raise InvalidArgumentError(f"{name}={value!r:.60} is no number that {name} can be: {ways}")
            object.__setattr__(self, name, int(value))
        for name, least_float, most_float, ways in (
            ("temperature", 0.0, np.inf, "give 0 for the likeliest tokens, or a larger number to sample"),
            ("top_p", 0.0, 1.0, "give a number above 0 and at most 1"),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            fits = isinstance(value, int | float | np.number) and not isinstance(value, bool) and least_float <= value <= most_float
            if not fits or not np.isfinite(value) or (name == "top_p" and value == 0):
                raise InvalidArgumentError(f"{name}={value!r:.60} is no number that {name} can be: {ways}")
            object.__setattr__(self, name, float(value))
        if self.do_sample is not None and not isinstance(self.do_sample, bool | np.bool_):
            raise InvalidTypeError(f"do_sample={self.do_sample!r:.60} is no truth value: give True or False")
        object.__setattr__(self, "settings", _checked(self.settings))
        self._check_together()

    def _check_together(self) -> None:
        named = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if self.do_sample and self.temperature == 0:
            raise InvalidArgumentError("temperature=0 takes the likeliest tokens, and do_sample=True was given: leave one of them out")
        greedy = self.temperature == 0 or self.do_sample is False
        unused = [name for name in named if name != "temperature" or self.temperature != 0]
        if greedy and unused:
            raise InvalidArgumentError(
                f"{unused[0]}={getattr(self, unused[0])!r} is for sampling, but the likeliest tokens were asked for: leave it out, or "
                f"{'give a temperature above 0' if self.temperature == 0 else 'leave do_sample=False out'}"
            )
        if greedy and self.n > 1:
            raise InvalidArgumentError(_all_alike(self.n))


def decide_settings(generate: Generate, own: Mapping[str, Any]) -> Settings:
    """What a call comes to with a model's own generation configuration, given as the names and values that it sets.

    Raises
    ------
    InvalidArgumentError
        The model's configuration asks for a kind of search that is none of these, nobody says how long an answer may be, or several
        greedy answers of one prompt would be asked for.
    """
    given = {name: getattr(generate, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample")}
    asked = {**{name: value for name, value in given.items() if value is not None}, **generate.settings}
    if generate.temperature == 0:
        asked["do_sample"] = False
        del asked["temperature"]
    elif any(value is not None for name, value in asked.items() if name in SAMPLING):
        asked.setdefault("do_sample", True)
    for name, neutral in _REFUSED.items():
        value = own.get(name)
        if value is not None and value not in neutral and name not in asked:
            raise InvalidArgumentError(
                f"this model's own generation configuration has {name}={value!r:.60}, and answers here are greedy or sampled token by "
                f"token: switch it off, settings={{{name!r}: {neutral[0] if neutral else None!r}}}"
            )
    values = _effective(own, asked)
    alone = _effective(own, {})
    if "max_new_tokens" not in values:
        raise InvalidArgumentError(
            "nobody says how long an answer may be: this model's own generation configuration has no max_new_tokens, so give "
            "Generate(max_new_tokens=…)"
        )
    if not values["do_sample"] and generate.n > 1:
        raise InvalidArgumentError(_all_alike(generate.n))
    names = [name for name in sorted({*values, *alone}) if values.get(name) != alone.get(name)]
    return Settings(values=values, deviations=tuple(names))


def _all_alike(n: int) -> str:
    return f"n={n} answers per prompt were asked for, but the likeliest tokens are the same each time: give a temperature, or n=1"


def _checked(settings: object) -> Mapping[str, Any]:
    """The further settings, as JSON has them."""
    if not isinstance(settings, Mapping):
        raise InvalidTypeError(f"settings is a {type(settings).__name__}: give a mapping, {{'repetition_penalty': 1.1}}")
    checked = {}
    for name, value in settings.items():
        if name in _OWN_ARGUMENTS:
            raise InvalidArgumentError(f"settings names {name!r}, which is an argument: give Generate({name}=…)")
        if name in _REFUSED and (value is None or value in _REFUSED[name]):
            checked[name] = value
            continue
        if name in _REFUSED:
            raise InvalidArgumentError(
                f"settings has {name}={value!r:.60}, and answers here are greedy or sampled token by token: leave it out"
                + (", or give n=" if name == "num_return_sequences" else "")
            )
        if name not in _KNOWN:
            raise InvalidArgumentError(
                f"settings names {name!r:.60}, which is not known here: use {', '.join(sorted({**SAMPLING, **NEUTRAL}))}"
            )
        try:
            checked[name] = json.loads(json.dumps(_plain(value), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InvalidTypeError(f"settings[{name!r}] is {value!r:.60}, which JSON cannot hold: give numbers, texts or lists") from error
    return checked  # a plain dict, which can be sent to workers


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _effective(own: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of the settings of both, sorted by name."""
    neutral = {**SAMPLING, **NEUTRAL}
    known = {name: value for name, value in own.items() if name in _KNOWN and value is not None}
    merged = {**neutral, **known, **asked}
    samples = bool(merged.get("do_sample"))
    found: dict[str, Any] = {"do_sample": samples}
    for name in _KNOWN:
        value = merged.get(name, neutral.get(name))
        value = neutral.get(name) if value is None else value
        if name == "do_sample" or value is None or (name in SAMPLING and not samples):
            continue
        if name == "eos_token_id":
            value = sorted({int(each) for each in (value if isinstance(value, list | tuple) else [value])})
        if name == "stop_strings" and isinstance(value, str):
            value = [value]
        if name in _FLOATS and isinstance(value, int | float):
            value = float(value)
        if value != neutral.get(name) or name in _ALWAYS_RECORDED:
            found[name] = value
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------------------------------- which answer is which


def answer_sha256(prompt: str, settings: Settings, seed: int | None, sample: int) -> str:
    r"""The digest of a prompt with an answer: the sha256 of ``b"\0answer\0"`` and compact JSON with sorted keys; see docs/format.md.

    Parameters
    ----------
    prompt : str
        The whole digest of the prompt that it answers.
    settings : Settings
    seed : int, optional
        As it was asked for: None where it was drawn, and for greedy answers.
    sample : int
        Which of the answers of this prompt.
    """
    content = {"prompt": prompt, "sample": sample, "seed": seed if settings.samples else None, "settings": dict(settings.values)}
    return hashlib.sha256(b"\0answer\0" + json.dumps(content, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def draw_uniform(seed: int, prompt: str, sample: int, count: int) -> Any:
    """Numbers between 0 and 1, the same for the same seed, digest of a prompt and sample, whatever else is generated and when."""
    key = hashlib.sha256(f"{seed}:{prompt}:{sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(count)


# ------------------------------------------------------------------------------------------------------------- what is kept of one


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Answer:
    """An answer as it is stored.

    Parameters
    ----------
    token_ids : ndarray of int64
        All tokens that were generated, the one that ends it included.
    completion : str
        Its text, without special tokens.
    finish_reason : {"stop", "length"}
        Whether the model ended it, or the limit did.
    generation : str
        The settings, as JSON.
    seed : int, optional
        What sampling started from; None for greedy answers.
    """

    token_ids: Ints
    completion: str
    finish_reason: str
    generation: str
    seed: int | None = None


def parse_ids(text: str) -> Ints:
    """Token ids from the text of a column ``completion_ids``.

    Raises
    ------
    ValueError
        It is no list of numbers.
    """
    return np.array([int(each) for each in text.split()], np.int64)


def answer_columns(answers: Sequence[Answer], prompts: Sequence[str], samples: Iterable[int]) -> dict[str, Column]:
    """The columns of prompts with answers.

    Parameters
    ----------
    answers : sequence of Answer
    prompts : sequence of str
        Whole digest of the prompt that each answers.
    samples : iterable of int
        Which of the answers of its prompt each is.
    """
    seeds = np.array([-1 if answer.seed is None else answer.seed for answer in answers], np.int64)
    seed = parse_column("generation_seed", seeds)
    columns = {
        "completion": [answer.completion for answer in answers],
        "completion_ids": [" ".join(map(str, answer.token_ids.tolist())) for answer in answers],
        "prompt_of": [digest[:HASH_DIGITS] for digest in prompts],
        "finish_reason": [answer.finish_reason for answer in answers],
        "generation": [answer.generation for answer in answers],
        "generation_sample": np.array(list(samples), np.int64),
    }
    parsed = {name: parse_column(name, values) for name, values in columns.items()}
    return parsed | {"generation_seed": replace(seed, missing=seeds < 0) if (seeds < 0).any() else seed}


def check_answer_columns(columns: Iterable[str]) -> None:
    """Raise `InvalidArgumentError` for a column of the caller's with the name of one that answers have."""
    taken = sorted(set(columns) & {*ANSWER_COLUMNS, "generated"})
    if taken:
        raise InvalidArgumentError(f"coords names {taken[0]!r}, which generate= makes itself: give the column another name")
