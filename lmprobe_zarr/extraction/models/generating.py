"""Answers to tokenized prompts, by the model's own ``generate`` and batch by batch. Never a store.

Sampling is not left to ``generate``, which draws from one generator for all rows: each answer has numbers of its own, so it is the same
whatever else is in its batch, and after an interruption. ``generate`` runs greedily, and a last processor of its logits, behind those that
the settings name, chooses one token.

Batches are padded on the left, if the model's first batch gives the logits that its prompts have alone. Otherwise, and with settings that
look at earlier tokens and would see the padding, only prompts of equal length share a batch.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from transformers.generation import logits_process, stopping_criteria

from lmprobe_zarr.batch import NEUTRAL, SAMPLING, Answer, Settings, accepted, draw_uniform, offsets_of
from lmprobe_zarr.errors import DeviceMemoryError, InvalidArgumentError
from lmprobe_zarr.extraction.models.batching import (
    check_batch_sizes,
    default_batch_tokens,
    free_memory,
    is_out_of_memory,
    most_prompts_with_logits,
    next_batch,
)
from lmprobe_zarr.extraction.models.check import ROUNDING, check_model
from lmprobe_zarr.extraction.models.forward import as_run, lengths_that_matter
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.outputs import head_width
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.prediction import check_head, no_prediction
from lmprobe_zarr.extraction.models.structure import plain_ids
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts
from lmprobe_zarr.typing import Ints

__all__ = ["generate_answers"]

# Settings under which padding on the left changes nothing: they look at the logits of one token, or at tokens that were generated.
_BLIND_TO_PADDING: Final = (
    "do_sample",
    "max_new_tokens",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "eos_token_id",
    *SAMPLING,
)
# What is set so that nothing but the settings decides, where this version of transformers has it.
_SWITCHED_OFF: Final = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None, "guidance_scale": None, "constraints": None,
    "force_words_ids": None, "watermarking_config": None, "top_h": None, "dola_layers": None, "max_time": None, "token_healing": False,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "use_mtp": False, "renormalize_logits": False, "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False, "disable_compile": True,
}  # fmt: skip
# A step of generation reads all weights for a single token of each prompt, so a batch may be larger than one whose activations are kept: it
# holds keys and values only. It is halved where the device runs out of memory.
MORE_TOKENS: Final = 4
LEAST_TOKENS: Final = 1024
LONG: Final = 7
SHORT: Final = 3
CHECKED_STEPS: Final = 3


def generate_answers(
    loaded: LoadedModel,
    prompts: TokenizedPrompts,
    settings: Settings,
    *,
    of: Sequence[str],
    samples: Sequence[int],
    seed: int | None,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """One answer to each prompt, in their order.

    Parameters
    ----------
    loaded : LoadedModel
        With its head.
    prompts : TokenizedPrompts
    settings : Settings
    of : sequence of str
        The whole digest of each prompt, from which its random numbers are made.
    samples : sequence of int
        Which of the answers of its prompt each is.
    seed : int, optional
        What sampling starts from; not needed for greedy answers.
    batch_tokens, batch_prompts : int, optional
        Padded tokens, those of answers included, and prompts per batch; as for `run`.
    progress : callable, optional
        Called with the number of prompts and of generated tokens of every batch.

    Raises
    ------
    InvalidArgumentError
        A model that predicts no next token; logits that are NaN.
    DeviceMemoryError
        The device cannot hold a single prompt with its answer.
    """
    check_batch_sizes(batch_tokens, batch_prompts)
    _check_can_generate(loaded)
    conduct = check_model(loaded)
    if conduct.causal is False:
        raise no_prediction(loaded.name, f"{type(loaded.module).__name__}, whose tokens see those after them")
    body = loaded.located.body
    by_longest = lengths_that_matter(body, getattr(body, "config", None))[0] is not None
    blind = set(settings.values) <= {*_BLIND_TO_PADDING} and not by_longest
    mixed = conduct.padding in ("masked", "unmasked") and blind and _pads_left(loaded)
    width = head_width(loaded.located.head, loaded.vocab_size) or 0
    most = 1 if conduct.padding == "single" else most_prompts_with_logits(width)
    most = most if batch_prompts is None else min(most, batch_prompts)
    budget = MORE_TOKENS * max(LEAST_TOKENS, default_batch_tokens(loaded.device.type)) if batch_tokens is None else batch_tokens
    loaded.checked["generation_batches"] = "padded" if mixed else "single" if most == 1 else "equal"
    starts = offsets_of(prompts.lengths)
    ids = [prompts.token_ids[starts[i] : starts[i + 1]] for i in range(len(prompts))]
    # The longest first, so that memory runs out early.
    order = np.argsort(-prompts.lengths, kind="stable")
    answers: dict[int, Answer] = {}
    while len(answers) < len(order):
        left = order[len(answers) :]
        count = next_batch(prompts.lengths[left] + settings.max_new_tokens, budget, None if mixed else 0, most)
        rows = left[:count].tolist()
        uniform = None
        if settings.samples:
            assert seed is not None  # noqa: S101 - drawn where none was given
            uniform = np.stack([draw_uniform(seed, of[i], samples[i], settings.max_new_tokens) for i in rows])
        try:
            found = _run_batch(loaded, [ids[i] for i in rows], settings, uniform, seed if settings.samples else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise DeviceMemoryError(
                    f"prompts[{int(prompts.first[rows[0]])}] with {len(ids[rows[0]])} tokens and an answer of at most "
                    f"{settings.max_new_tokens} does not fit into the memory of {str(loaded.device)!r}: use a smaller dtype, a smaller "
                    "max_new_tokens, or device_map='auto'"
                ) from error
            most = max(1, count // 2)
            free_memory(loaded.device)
            continue
        answers |= dict(zip(rows, found, strict=True))
        if progress is not None:
            progress(count, sum(len(answer.token_ids) for answer in found))
    return [answers[i] for i in range(len(prompts))]


def _check_can_generate(loaded: LoadedModel) -> None:
    """Check that a model can answer.

    Raises
    ------
    InvalidArgumentError
        It does not predict the next token, is an encoder-decoder, or has no method ``generate``.
    """
    check_head(loaded)
    whole = loaded.located.whole
    if isinstance(loaded.located.body, PairedBody) or getattr(getattr(whole, "config", None), "is_encoder_decoder", False):
        raise InvalidArgumentError(
            f"{loaded.name!r} ({type(loaded.module).__name__}) is an encoder-decoder, whose answers are not generated here: generate them "
            "yourself, and give pairs of texts, (what the encoder reads, the answer)"
        )
    if not callable(getattr(whole, "generate", None)):
        raise InvalidArgumentError(
            f"{loaded.name!r} ({type(whole).__name__}) has no method generate: give a model as AutoModelForCausalLM loads it"
        )


# ----------------------------------------------------------------------------------------------------------------- one batch


@contextmanager
def _quietly(loaded: LoadedModel) -> Iterator[None]:
    """As passes are run, without warnings of settings that this model's configuration has, and of padding, which is looked after here."""
    with as_run(loaded), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _run_batch(loaded: LoadedModel, ids: Sequence[Ints], settings: Settings, uniform: Any, seed: int | None) -> list[Answer]:
    longest = max(map(len, ids))
    ends = settings.values.get("eos_token_id")
    if ends is None and "eos_token_id" not in settings.deviations:  # otherwise the caller has switched it off
        ends = getattr(getattr(loaded.located.whole, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [int(each) for each in (ends if isinstance(ends, list | tuple) else [ends])]
    watch = _Ends(len(ids), longest, ends, _stop_criteria(loaded, settings))
    processors: list[Any] = []
    if uniform is not None:
        processors.append(_Sampler(_warpers(settings, loaded.device), uniform, longest))
    options = {
        name: value for name, value in {**NEUTRAL, **settings.values}.items() if name not in ("do_sample", "stop_strings", *SAMPLING)
    }
    options |= {"eos_token_id": ends or None, "stop_strings": None, "do_sample": False, **SAMPLING}
    with _quietly(loaded):
        output = _call(loaded, ids, logits_processor=processors, stopping_criteria=[watch], **options)
    generated = output[:, longest:].cpu().numpy().astype(np.int64)
    recorded = dict(settings.values) | ({"eos_token_id": ends} if ends else {})
    if seed is not None:
        recorded["seed"] = seed
    found = []
    for row, end in zip(generated, watch.ended, strict=True):
        tokens = row[: end or settings.max_new_tokens]
        found.append(
            Answer(
                token_ids=tokens,
                completion=_completion(loaded.tokenizer, tokens),
                finish_reason="stop" if end else "length",
                generation=json.dumps(recorded, sort_keys=True),
                seed=seed,
            )
        )
    return found


def _call(loaded: LoadedModel, ids: Sequence[Ints], *, logits_processor: list[Any], stopping_criteria: list[Any], **options: Any) -> Any:
    """What ``generate`` returns for prompts that are padded on the left."""
    whole: Any = loaded.located.whole
    longest = max(map(len, ids))
    padded, mask = np.full((len(ids), longest), loaded.pad_id, np.int64), np.zeros((len(ids), longest), np.int64)
    for row, kept, tokens in zip(padded, mask, ids, strict=True):
        row[longest - len(tokens) :], kept[longest - len(tokens) :] = tokens, 1
    known = getattr(whole, "generation_config", None)
    options = {name: value for name, value in _SWITCHED_OFF.items() if hasattr(known, name)} | options
    if _takes_mask(whole):
        options["attention_mask"] = torch.from_numpy(mask).to(loaded.device)
    return whole.generate(
        torch.from_numpy(padded).to(loaded.device), pad_token_id=loaded.pad_id, logits_processor=logits_processor,
        stopping_criteria=stopping_criteria, **options,
    )  # fmt: skip


def _takes_mask(whole: Any) -> bool:
    parameters = inspect.signature(whole.forward).parameters
    return "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _stop_criteria(loaded: LoadedModel, settings: Settings) -> list[Any]:
    texts = settings.values.get("stop_strings")
    return [stopping_criteria.StopStringCriteria(loaded.tokenizer, texts)] if texts else []


def _completion(tokenizer: Any, ids: Ints) -> str:
    """The text of an answer, without special tokens."""
    options = accepted(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(tokenizer.decode(ids.tolist(), **options))


class _Ends(stopping_criteria.StoppingCriteria):  # type: ignore[misc]
    """Ends the answers, and knows after how many tokens each ended; 0 where none has."""

    def __init__(self, rows: int, start: int, end_ids: Sequence[int], others: Sequence[Any]) -> None:
        self.ended, self._start, self._end_ids, self._others = [0] * rows, start, list(end_ids), others

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        done = torch.isin(input_ids[:, -1].cpu(), torch.tensor(self._end_ids, dtype=torch.int64))
        for other in self._others:
            done |= other(input_ids, scores, **options).cpu()
        for row in done.nonzero().flatten().tolist():
            self.ended[row] = self.ended[row] or input_ids.shape[1] - self._start
        return torch.tensor([bool(end) for end in self.ended], device=input_ids.device)


# ------------------------------------------------------------------------------------------------------------------ sampling


def _warpers(settings: Settings, device: torch.device) -> list[Any]:
    """What narrows the choice of tokens down, in the order of transformers."""
    values = {**SAMPLING, **settings.values}
    found: list[Any] = []
    if values["temperature"] != 1.0:
        found.append(logits_process.TemperatureLogitsWarper(values["temperature"]))
    if values["top_k"]:
        found.append(logits_process.TopKLogitsWarper(values["top_k"]))
    if values["top_p"] < 1.0:
        found.append(logits_process.TopPLogitsWarper(values["top_p"]))
    if values["min_p"] is not None:
        found.append(logits_process.MinPLogitsWarper(values["min_p"]))
    if values["typical_p"] < 1.0:
        found.append(logits_process.TypicalLogitsWarper(values["typical_p"]))
    if 0.0 < values["epsilon_cutoff"] < 1.0:
        found.append(logits_process.EpsilonLogitsWarper(values["epsilon_cutoff"]))
    if 0.0 < values["eta_cutoff"] < 1.0:
        found.append(logits_process.EtaLogitsWarper(values["eta_cutoff"], device=str(device)))
    return found


class _Sampler(logits_process.LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of each row: the first at which the sum of probabilities goes beyond the row's random number."""

    def __init__(self, warpers: Sequence[Any], uniform: Any, start: int) -> None:
        self._warpers, self._uniform, self._start = warpers, torch.from_numpy(uniform), start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        # float64, in which the sum of a whole vocabulary is exact enough; MPS has none.
        wide = scores.cpu().double() if scores.device.type == "mps" else scores.double()
        sums = torch.softmax(wide, dim=-1).cumsum(dim=-1)
        if not bool(torch.isfinite(sums[:, -1]).all()):
            raise InvalidArgumentError("the logits of this model are NaN, so that no token can be drawn: load the model again")
        drawn = self._uniform[:, input_ids.shape[1] - self._start].to(sums.device) * sums[:, -1]
        chosen = torch.searchsorted(sums, drawn[:, None], right=True).clamp(max=scores.shape[1] - 1).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


# ------------------------------------------------------------------------------------------------------------------- padding


def _pads_left(loaded: LoadedModel) -> bool:
    """Whether two prompts of different lengths have the logits in one batch that each has alone; examined once per loaded model."""
    known = loaded.checked.get("pads_left")
    if known is None:
        ids = np.array(plain_ids(loaded.located.body, LONG + SHORT), np.int64)
        prompts = [ids[:LONG], ids[LONG:]]
        try:
            with _quietly(loaded):
                together = _scores(loaded, prompts, int(ids[0]))
                alone = [_scores(loaded, [each], int(ids[0]))[:, 0] for each in prompts]
            known = all(_alike(together[:, row], each, loaded.dtype) for row, each in enumerate(alone))
        except Exception as error:  # any error of a model's own code; equal lengths may do
            if is_out_of_memory(error):
                raise
            known = False
        loaded.checked["pads_left"] = known
    return bool(known)


def _scores(loaded: LoadedModel, ids: Sequence[Ints], token_id: int) -> torch.Tensor:
    """The logits of the first few steps, shape (step, row, vocab), where each answer is this token again and again."""
    forced = _Forced(token_id)
    _call(loaded, ids, logits_processor=[forced], stopping_criteria=[], do_sample=False, max_new_tokens=CHECKED_STEPS, eos_token_id=None)
    return torch.stack(forced.seen)


class _Forced(logits_process.LogitsProcessor):  # type: ignore[misc]
    """Takes the same token at each step, and keeps the logits."""

    def __init__(self, token_id: int) -> None:
        self.seen: list[torch.Tensor] = []
        self._token_id = token_id

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.append(scores.double().cpu() if scores.device.type != "mps" else scores.cpu().double())
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._token_id] = 0.0
        return chosen


def _alike(some: torch.Tensor, others: torch.Tensor, dtype: str) -> bool:
    """Whether logits of shape (step, vocab) are equal but for rounding."""
    near = ROUNDING[getattr(torch, dtype)]
    return bool(((some - others).norm(dim=-1) <= near * others.norm(dim=-1)).all())
