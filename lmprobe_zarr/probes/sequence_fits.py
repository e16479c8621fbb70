"""How probes with a pooling of their own learn: minibatches of prompts in torch, and an inner fold that says when to stop.

Holds one training loop for many fits at once, which share every read of the rows. Never folds, how rows are stored, files or results.
Imports torch when something is fitted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmprobe_zarr.batch import concat_ranges, offsets_of
from lmprobe_zarr.probes.folds import inner_folds
from lmprobe_zarr.probes.sequences import SequenceProbe, SequenceSolution
from lmprobe_zarr.typing import Array, Floats, Ints, Mask

if TYPE_CHECKING:
    import torch

__all__ = ["POOL_PADDED", "SequenceFit", "Trained", "Training", "draw_looks", "fit_sequences"]

#: Bytes of the rows of a lot, as float32. Rows that are no more in all are read once; of more, a lot is made of this many runs of
#: neighbouring prompts from random places, so that reading takes few ranges.
LOT_BYTES: Final = 128 * 2**20
_RUNS: Final = 16
#: The share of the training prompts that say when to stop is one of so many inner folds.
_INNER: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a probe learns.

    Parameters
    ----------
    batch_prompts : int
        Prompts of a minibatch at most, of which a fit takes those that it trains on.
    learning_rate : float
        That of AdamW, times the number of hidden units: a step of that size in every coefficient changes a score by about as much,
        however wide the rows are.
    weight_decay : float
        That of AdamW.
    max_epochs : int
        Passes over the training prompts at most.
    patience : int
        Passes without a loss of the inner fold that is smaller by `tolerance`, after which a fit ends. What had the smallest is kept.
    tolerance : float
        In nats.
    """

    batch_prompts: int = 32
    learning_rate: float = 0.5
    weight_decay: float = 0.01
    max_epochs: int = 200
    patience: int = 10
    tolerance: float = 0.001

    def batches(self, prompts: int) -> int:
        """How many minibatches some prompts make: of few, eight of at least four prompts, since a pass of one step moves nothing."""
        return max(-(-prompts // self.batch_prompts), min(8, prompts // 4))


# -- pooling ---------------------------------------------------------------------------------------------------------------
#
# Each takes projections, shape (prompt, token, projection), padded with zeros; which of them are tokens, shape (prompt, token); the
# probe, and the number of outputs. It gives what ``sequences`` gives for the same prompts.


def _softmax(scores: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~there[:, :, None], -math.inf).softmax(dim=1)


def _values(padded: torch.Tensor, probe: SequenceProbe, outputs: int) -> torch.Tensor:
    return padded[:, :, padded.shape[2] - probe.heads * outputs :].reshape(*padded.shape[:2], probe.heads, outputs)


def _pool_attention(padded: torch.Tensor, there: torch.Tensor, probe: SequenceProbe, outputs: int) -> torch.Tensor:
    weights = _softmax(padded[:, :, : probe.heads], there)
    return (weights[:, :, :, None] * _values(padded, probe, outputs)).sum(dim=(1, 2))


def _pool_multimax(padded: torch.Tensor, there: torch.Tensor, probe: SequenceProbe, outputs: int) -> torch.Tensor:
    largest = padded.masked_fill(~there[:, :, None], -math.inf).amax(dim=1)
    return largest.reshape(len(padded), probe.heads, outputs).sum(dim=1)


def _pool_softmax(padded: torch.Tensor, there: torch.Tensor, probe: SequenceProbe, _outputs: int) -> torch.Tensor:
    return (_softmax(padded / probe.size, there) * padded).sum(dim=1)


def _pool_windows(padded: torch.Tensor, there: torch.Tensor, probe: SequenceProbe, _outputs: int) -> torch.Tensor:
    import torch

    counts, size = there.sum(dim=1), int(probe.size)
    whole = padded.sum(dim=1) / counts[:, None]
    if padded.shape[1] < size:
        return whole
    # Views of the windows, not sums that run over the prompt: those lose digits, and on CUDA give other ones every time.
    means = padded.unfold(1, size, 1).mean(dim=3)
    first = torch.arange(means.shape[1], device=there.device)[None, :, None]
    largest = means.masked_fill(first > (counts - size)[:, None, None], -math.inf).amax(dim=1)
    return torch.where((counts < size)[:, None], whole, largest)


def _pool_mean(padded: torch.Tensor, there: torch.Tensor, _probe: SequenceProbe, _outputs: int) -> torch.Tensor:
    return (padded.sum(dim=1) / there.sum(dim=1)[:, None]).relu()


#: How each probe pools in torch, by name.
POOL_PADDED: Final[Mapping[str, Callable[[Any, Any, SequenceProbe, int], Any]]] = {
    "attention": _pool_attention,
    "multimax": _pool_multimax,
    "softmax_mean": _pool_softmax,
    "rolling_mean_max": _pool_windows,
    "mlp": _pool_mean,
}


# -- fits ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFit:
    """One fit that is asked for.

    Parameters
    ----------
    probe : SequenceProbe
    learns, looks : ndarray of bool, shape (prompt,)
        Which prompts it learns from, and which say when to stop; none is both.
    mean, scale : ndarray of float64, shape (hidden,)
        How hidden units are standardised: ``(activation − mean) / scale``.
    seed : int
        Of its first coefficients.
    """

    probe: SequenceProbe
    learns: Mask
    looks: Mask
    mean: Floats
    scale: Floats
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a fit.

    Parameters
    ----------
    solution : SequenceSolution
    losses, inner_losses : ndarray of float64, shape (epoch,)
        The mean loss of the training prompts, in nats, each before the step that learns from it; that of the inner fold after the epoch.
    converged : bool
        Whether the loss of the inner fold stopped falling before the last epoch allowed.
    seconds : float
        Time of its own steps.
    problem : str
        Why there is no solution; empty if there is one.
    """

    solution: SequenceSolution
    losses: Floats
    inner_losses: Floats
    converged: bool
    seconds: float
    problem: str = ""


def draw_looks(codes: Ints, kept: Ints, seed: int, *, grouped: bool = False) -> Mask:
    """Which of some training prompts say when to stop: one of five stratified inner folds of whole groups.

    Parameters
    ----------
    codes : ndarray of int, shape (prompt,)
        Their classes.
    kept : ndarray of int, shape (prompt,)
        Prompts of an equal number are on one side.
    seed : int
    grouped : bool
        Whether the caller gave groups.

    Raises
    ------
    LabelError
        A class has a single prompt (or group).
    """
    looks = np.zeros(len(codes), bool)
    looks[inner_folds(codes, kept, _INNER, seed, grouped=grouped)[0][1]] = True
    return looks


def fit_sequences(
    fits: Sequence[SequenceFit],
    read: Callable[[Ints], Array],
    counts: Ints,
    codes: Ints,
    *,
    seed: int,
    device: str = "cpu",
    training: Training | None = None,
) -> list[Trained]:
    """All fits, which learn side by side, so that each lot of rows is read once for all of them.

    Parameters
    ----------
    fits : sequence of SequenceFit
    read : callable
        The tokens of some prompts, given by ascending numbers: their rows end to end, shape (token, hidden), finite.
    counts : ndarray of int, shape (prompt,)
        How many tokens each prompt has, at least 1.
    codes : ndarray of int, shape (prompt,)
        The number of each prompt's class.
    seed : int
        Of the order of the prompts.
    device : str
        From `lmprobe_zarr.probes.devices.parse_device`.
    training : Training, optional

    Notes
    -----
    Rows that are more than 128 MiB as float32 are read once in every pass. Only projections are padded, never rows: an attention probe of
    one head has two numbers per token. The loss is the cross entropy; the optimiser AdamW. Source: I. Loshchilov and F. Hutter, "Decoupled
    Weight Decay Regularization" (2019), arXiv:1711.05101.
    """
    import torch

    training = training or Training()
    lots = _Lots(read, counts, device)
    # Near the means of all fits, so that no digits are lost where hidden units are far from zero.
    origin = fits[0].mean.astype(np.float32)
    alike: dict[Any, list[int]] = {}
    for number, fit in enumerate(fits):
        alike.setdefault((fit.probe, len(np.unique(codes[fit.learns]))), []).append(number)
    groups = [_Learners([fits[number] for number in numbers], codes, training, device, origin) for numbers in alike.values()]
    centre = torch.as_tensor(origin, device=device)
    # One pass more than is learned from: each pass measures the loss of the inner fold after the one before.
    for epoch in range(training.max_epochs + 1):
        rng = np.random.default_rng([seed, epoch])
        for prompts, rows in lots.read_all(rng):
            starts, lengths = offsets_of(counts[prompts])[:-1], counts[prompts]
            for some in np.array_split(rng.permutation(len(prompts)), training.batches(len(prompts))):
                tokens = torch.as_tensor(concat_ranges(starts[some], lengths[some]), device=device)
                batch = _Batch.of(rows[tokens] - centre, prompts[some], lengths[some], device)
                for group in groups:
                    group.step(batch, learns=epoch < training.max_epochs, looks=epoch > 0)
        for group in groups:
            group.end_epoch(epoch)
        if all(group.ended for group in groups):
            break
    found: dict[int, Trained] = {}
    for numbers, group in zip(alike.values(), groups, strict=True):
        found.update(zip(numbers, group.results(), strict=True))
    return [found[number] for number in range(len(fits))]


@dataclass(frozen=True, slots=True)
class _Batch:
    """The tokens of some prompts, and where each stands.

    Parameters
    ----------
    rows : Tensor, shape (token, hidden)
        End to end.
    prompts : Tensor of int, shape (prompt,)
        The numbers of the prompts.
    prompt, place : Tensor of int, shape (token,)
        The prompt of each token, by its place in the batch, and its place in the prompt.
    there : Tensor of bool, shape (prompt, token)
        Which places have a token.
    """

    rows: torch.Tensor
    prompts: torch.Tensor
    prompt: torch.Tensor
    place: torch.Tensor
    there: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, prompts: Ints, lengths: Ints, device: str) -> _Batch:
        import torch

        def tensor(values: Array) -> torch.Tensor:
            return torch.as_tensor(values, device=device)

        there = np.arange(lengths.max())[None, :] < lengths[:, None]
        prompt, place = np.nonzero(there)
        return cls(rows, tensor(prompts), tensor(prompt), tensor(place), tensor(there))

    def averaged(self) -> _Batch:
        """One row per prompt, the mean of its tokens."""
        import torch

        shares = torch.zeros((len(self.prompts), len(self.rows)), device=self.rows.device)
        shares[self.prompt, torch.arange(len(self.rows), device=self.rows.device)] = 1
        first = torch.arange(len(self.prompts), device=self.rows.device)
        rows = (shares @ self.rows) / self.there.sum(dim=1)[:, None]
        return _Batch(rows, self.prompts, first, torch.zeros_like(first), torch.ones_like(first, dtype=torch.bool)[:, None])


class _Lots:
    """Rows by lots of prompts; kept where one lot is all of them."""

    def __init__(self, read: Callable[[Ints], Array], counts: Ints, device: str) -> None:
        self._read, self._counts, self._device = read, counts, device
        self._all: torch.Tensor | None = None
        self._runs: list[Ints] | None = None

    def _load(self, prompts: Ints) -> torch.Tensor:
        import torch

        # A copy: what is read may be the caller's own, or read only.
        return torch.tensor(np.asarray(self._read(prompts), np.float32), device=self._device)

    def read_all(self, rng: np.random.Generator) -> Iterator[tuple[Ints, torch.Tensor]]:
        """The prompts of each lot, ascending, and their rows end to end."""
        every = np.arange(len(self._counts), dtype=np.int64)
        if self._all is not None:
            yield every, self._all
            return
        if self._runs is None:
            width = self._read(every[:1]).shape[1]
            budget = max(1, LOT_BYTES // (4 * width))
            if self._counts.sum() <= budget:
                self._all = self._load(every)
                yield every, self._all
                return
            run = max(1, budget // _RUNS)
            self._runs = np.split(every, np.flatnonzero(np.diff((np.cumsum(self._counts) - 1) // run)) + 1)
        order = rng.permutation(len(self._runs))
        for first in range(0, len(order), _RUNS):
            prompts = np.concatenate([self._runs[number] for number in np.sort(order[first : first + _RUNS])])
            yield prompts, self._load(prompts)


class _Learners:
    """Fits of one probe on several training sets: their coefficients, their optimiser, and the losses so far.

    Coefficients have the fit as their first axis, so that one matrix product serves all; no fit depends on another. They are those of
    standardised hidden units, and become those of the activations at the end.
    """

    def __init__(self, fits: Sequence[SequenceFit], codes: Ints, training: Training, device: str, origin: Array) -> None:
        import torch

        self._fits, self._training, self._probe = fits, training, fits[0].probe
        self._classes = [np.unique(codes[fit.learns]) for fit in fits]
        self._outputs = 1 if len(self._classes[0]) == 2 else len(self._classes[0])
        self._ended = np.zeros(len(fits), bool)
        self._problems = [""] * len(fits)
        self._losses: list[list[float]] = [[] for _ in fits]
        self._inner: list[list[float]] = [[] for _ in fits]
        self._best: list[tuple[float, dict[str, Array]]] = [(math.inf, {}) for _ in fits]
        # The last loss that was clearly smaller than those before it, and its epoch.
        self._mark: list[tuple[float, int]] = [(math.inf, 0) for _ in fits]
        self._seconds = 0.0

        def tensor(values: Any, dtype: Any = np.float32) -> torch.Tensor:
            return torch.tensor(np.asarray(values, dtype), device=device)

        self._targets = tensor([np.searchsorted(classes, codes) for classes in self._classes], np.int64)
        self._learns, self._looks = (tensor([getattr(fit, name) for fit in fits]) for name in ("learns", "looks"))
        self._scale = tensor([fit.scale for fit in fits])[:, None, :]
        self._shift = tensor([(fit.mean - origin) / fit.scale for fit in fits])[:, :, None]
        self._held = {name: tensor(values).requires_grad_() for name, values in self._first().items()}
        self._frozen = {name: held.detach().clone() for name, held in self._held.items()}
        rates = self._rates()
        groups = [
            {"params": [held], "lr": rates[name], "weight_decay": training.weight_decay if name in ("coef", "output") else 0.0}
            for name, held in self._held.items()
        ]
        self._optimiser = torch.optim.AdamW(groups)
        self._sums = torch.zeros((2, len(fits)), device=device)

    @property
    def ended(self) -> bool:
        """Whether every fit has ended."""
        return bool(self._ended.all())

    def _first(self) -> dict[str, Array]:
        """The coefficients that the fits begin with."""
        hidden, r, n = len(self._fits[0].mean), self._outputs, self._probe.projections(self._outputs)
        size = 1.0 if self._probe.inner else 0.1
        found: dict[str, list[Array]] = {}
        for fit in self._fits:
            rng = np.random.default_rng(fit.seed)
            drawn = {"coef": size / np.sqrt(hidden) * rng.normal(size=(n, hidden)), "bias": np.zeros(r)}
            if self._probe.inner:
                drawn |= {"intercept": np.zeros(n), "output": rng.normal(size=(r, n)) / np.sqrt(n)}
            for name, values in drawn.items():
                found.setdefault(name, []).append(values)
        return {name: np.stack(values) for name, values in found.items()}

    def _rates(self) -> dict[str, float]:
        rate = self._training.learning_rate
        return {
            "coef": rate / len(self._fits[0].mean),
            "output": rate / max(1, self._probe.inner),
            **dict.fromkeys(("bias", "intercept"), rate / 10),
        }

    def _scores(self, held: Mapping[str, torch.Tensor], batch: _Batch) -> torch.Tensor:
        """The scores of the prompts of a batch, shape (fit, prompt, output)."""
        coef = held["coef"]
        projected = batch.rows @ (coef / self._scale).flatten(0, 1).T - (coef @ self._shift).flatten()
        if "intercept" in held:
            projected = projected + held["intercept"].flatten()
        # Each place is written once, so this gives the same numbers on every device that it runs on.
        padded = projected.new_zeros((*batch.there.shape, projected.shape[1])).index_put((batch.prompt, batch.place), projected)
        n, (prompts, tokens) = len(self._fits), batch.there.shape
        by_fit = padded.reshape(prompts, tokens, n, -1).permute(2, 0, 1, 3).flatten(0, 1)
        pooled = POOL_PADDED[self._probe.name](by_fit, batch.there.repeat(n, 1), self._probe, self._outputs)
        pooled = pooled.reshape(n, prompts, -1)
        scores: torch.Tensor = pooled @ held["output"].transpose(1, 2) if "output" in held else pooled
        return scores + held["bias"][:, None, :]

    def _loss(self, scores: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """The loss of each prompt by each fit, in nats, shape (fit, prompt)."""
        import torch

        targets = self._targets[:, prompts]
        if self._outputs == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores[:, :, 0], targets.to(scores.dtype), reduction="none")
        else:
            loss = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
        return loss

    def step(self, batch: _Batch, *, learns: bool, looks: bool) -> None:
        """Learn from the training prompts of a batch, and measure the loss of those of the inner folds by the epoch before."""
        import torch

        if self.ended:
            return
        began = time.perf_counter()
        if self._probe.inner:
            batch = batch.averaged()
        if looks:
            with torch.no_grad():
                self._sums[1] += (self._loss(self._scores(self._frozen, batch), batch.prompts) * self._looks[:, batch.prompts]).sum(dim=1)
        if learns:
            mine = self._learns[:, batch.prompts]
            losses = (self._loss(self._scores(self._held, batch), batch.prompts) * mine).sum(dim=1)
            self._optimiser.zero_grad()
            mean: Any = (losses / mine.sum(dim=1).clamp(min=1)).sum()
            mean.backward()
            self._optimiser.step()
            self._sums[0] += losses.detach()
        self._seconds += time.perf_counter() - began

    def end_epoch(self, epoch: int) -> None:
        """Note the losses of an epoch, and end the fits whose inner fold no longer improves."""
        losses, inner = self._sums.cpu().numpy().astype(np.float64)
        held = {name: frozen.cpu().numpy().astype(np.float64) for name, frozen in self._frozen.items()}
        for number, fit in enumerate(self._fits):
            if self._ended[number]:
                continue
            if epoch:
                loss = float(inner[number] / fit.looks.sum())
                self._inner[number].append(loss)
                if not math.isfinite(loss):
                    self._ended[number], self._problems[number] = True, f"its loss is {loss} after {epoch} passes"
                    continue
                if loss < self._best[number][0]:
                    self._best[number] = loss, {name: values[number].copy() for name, values in held.items()}
                if loss < self._mark[number][0] - self._training.tolerance:
                    self._mark[number] = loss, epoch
                self._ended[number] = epoch - self._mark[number][1] >= self._training.patience
            if not self._ended[number] and epoch < self._training.max_epochs:
                self._losses[number].append(float(losses[number] / fit.learns.sum()))
        self._frozen = {name: values.detach().clone() for name, values in self._held.items()}
        self._sums.zero_()

    def results(self) -> list[Trained]:
        """What came of the fits; the seconds of all are shared out evenly."""
        return [
            Trained(
                solution=self._solution(number), losses=np.array(self._losses[number]), inner_losses=np.array(self._inner[number]),
                converged=bool(self._ended[number]), seconds=self._seconds / len(self._fits), problem=self._problems[number],
            )
            for number in range(len(self._fits))
        ]  # fmt: skip

    def _solution(self, number: int) -> SequenceSolution:
        fit, r, probe = self._fits[number], self._outputs, self._probe
        best = self._best[number][1]
        if self._problems[number] or not best:
            n, hidden = probe.projections(r), len(fit.mean)
            best = {"coef": np.full((n, hidden), np.nan), "bias": np.full(r, np.nan)}
            best |= {"intercept": np.full(n, np.nan), "output": np.full((r, n), np.nan)} if probe.inner else {}
        coef, bias = best["coef"] / fit.scale, best["bias"]
        intercept = best.get("intercept", np.zeros(len(coef))) - coef @ fit.mean
        if not probe.inner:
            # A constant added to the values of a head is one added to its pooled value, and one added to its scores changes no weight.
            bias = bias + intercept[len(intercept) - probe.heads * r :].reshape(-1, r).sum(axis=0)
            intercept = np.zeros(len(coef))
        return SequenceSolution(probe, coef, intercept, best.get("output", np.zeros((r, 0))), bias, self._classes[number])
