"""Fits of probes that learn how to pool, beside a plain loop in torch that pads: ``python -m benchmarks.sequences``, or with ``--quick``.

Prompts from 8 to 2,000 tokens long, spread evenly over the logarithm, lie in a store. Both sides read them from there, standardise them,
and make as many passes with AdamW over four fifths of the prompts, and measure the loss of the others after each. The loop pads each
minibatch to its longest prompt; its second form makes minibatches of prompts of like lengths. The last side fits prompts that all have
the mean length. Its projections have no padding either, so it says what is to be gained at most by putting like lengths together.

Seconds are the processor's, of one thread: those of the wall follow whoever else uses the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

import lmprobe_zarr as lz
from benchmarks.curves import forget_peak, peak
from benchmarks.timing import alternate
from lmprobe_zarr.probes import sequence_fits

SHORTEST, LONGEST, BATCH, PROBES = 8, 2_000, 32, ("attention", "multimax", "softmax_mean", "mlp")
Rows = list[torch.Tensor]


def write(folder: str, prompts: int, hidden: int) -> None:
    """Two stores of as many tokens: of mixed lengths, and of the mean length."""
    rng = np.random.default_rng(0)
    mixed = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), prompts)).astype(int)
    labels = np.arange(prompts) % 2
    for name, lengths in (("mixed", mixed), ("alike", np.full(prompts, round(mixed.mean())))):
        rows = [rng.standard_normal((length, hidden), np.float32) for length in lengths]
        for each, label in zip(rows, labels, strict=True):
            each[rng.integers(len(each)), :4] += 6 * (label - 0.5)
        lz.write_activations(
            lz.open_store(f"{folder}/{name}"), model="m", prompts=[f"p{i}" for i in range(prompts)], activations={"resid": {0: rows}},
            coords={"label": labels},
        )  # fmt: skip


def fit_stored(store: str, probe: str, epochs: int) -> None:
    """The fit of this package, which is not let end before all passes are made."""
    made = partial(sequence_fits.Training, max_epochs=epochs, patience=epochs + 1)
    with patch.object(sequence_fits, "Training", made), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        lz.fit_tokens(lz.open_store(store, "r").tokens("m").resid, "label", probe, device="cpu", n_workers=1)


def fit_padded(store: str, probe: str, epochs: int, *, alike: bool) -> None:
    """The loop."""
    tokens = lz.open_store(store, "r").tokens("m").resid.sel(layer=0)
    values = torch.as_tensor(tokens.values)
    prompt = tokens.prompt.values
    starts = np.flatnonzero(np.append(True, prompt[1:] != prompt[:-1]))
    counts = np.diff(np.append(starts, len(prompt)))
    labels = torch.as_tensor(tokens.label.values[starts], dtype=torch.float32)
    values = (values - values.mean(0)) / values.std(0)
    rows = list(torch.split(values, counts.tolist()))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(rows))
    inner, train = order[: len(rows) // 5], order[len(rows) // 5 :]
    model = Padded(probe, values.shape[1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.5 / values.shape[1])
    for _ in range(epochs):
        for some in minibatches(train, counts, rng, alike=alike):
            loss = model.loss([rows[i] for i in some], labels[some])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            for some in minibatches(inner, counts, rng, alike=alike):
                model.loss([rows[i] for i in some], labels[some])


def minibatches(prompts: Any, counts: Any, rng: np.random.Generator, *, alike: bool) -> Iterator[Any]:
    """Prompts in random order, or minibatches of like lengths in random order."""
    order = rng.permutation(prompts)
    if alike:
        order = order[np.argsort(counts[order], kind="stable")]
    lots = np.array_split(order, -(-len(order) // BATCH))
    yield from (lots[i] for i in rng.permutation(len(lots)))


class Padded(torch.nn.Module):
    """Each probe as one would write it for a padded batch and its mask."""

    def __init__(self, probe: str, hidden: int) -> None:
        super().__init__()
        self.probe = probe
        self.tokens = torch.nn.Linear(hidden, {"attention": 2, "multimax": 4, "softmax_mean": 1, "mlp": 64}[probe])
        self.inner = torch.nn.Linear(64, 1)

    def loss(self, rows: Rows, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of a minibatch."""
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(each) for each in rows])
        there = (torch.arange(x.shape[1]) < lengths[:, None])[:, :, None]
        return torch.nn.functional.binary_cross_entropy_with_logits(self.scores(x, there, lengths), labels)

    def scores(self, x: torch.Tensor, there: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The score of each prompt."""
        if self.probe == "mlp":
            mean = (x * there).sum(1) / lengths[:, None]
            return torch.as_tensor(self.inner(self.tokens(mean).relu())[:, 0])
        made = self.tokens(x)
        if self.probe == "multimax":
            return torch.as_tensor(made.masked_fill(~there, -torch.inf).amax(1).sum(1))
        weights = made[:, :, :1].masked_fill(~there, -torch.inf).softmax(1)
        return torch.as_tensor((weights * made[:, :, -1:]).sum((1, 2)))


def measured(call: Callable[..., None], *given: Any) -> tuple[float, int]:
    """Seconds of the processor, and the bytes of memory beyond what was held before."""
    torch.set_num_threads(1)
    before, began = forget_peak(), time.process_time()
    call(*given)
    return time.process_time() - began, peak() - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few prompts")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    prompts = given.prompts or (50 if given.quick else 200)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, prompts, given.hidden)
        tokens = lz.open_store(f"{folder}/mixed", "r").tokens("m").sizes["token"]
        size = tokens * given.hidden * 4 / 2**20
        print(f"{prompts} prompts, {tokens:,} tokens × {given.hidden} ({size:.0f} MiB as float32), {given.epochs} passes, one thread")
        print("probe         side                                      seconds   / padded   peak memory, MiB")
        pools = {side: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) for side in SIDES}
        for probe in PROBES:
            report(pools, folder, probe, given.epochs, given.runs)
        for pool in pools.values():
            pool.shutdown()


#: What is called on which store.
SIDES: dict[str, tuple[Any, str]] = {
    "padded loop": (partial(fit_padded, alike=False), "mixed"),
    "padded loop, like lengths together": (partial(fit_padded, alike=True), "mixed"),
    "fit_tokens": (fit_stored, "mixed"),
    "fit_tokens, all of the mean length": (fit_stored, "alike"),
}


def report(pools: dict[str, ProcessPoolExecutor], folder: str, probe: str, epochs: int, runs: int) -> None:
    """The lines of a probe. Each side has a process of its own, which has made a first fit before it is measured."""
    most = dict.fromkeys(SIDES, 0)

    def run(side: str) -> float:
        call, store = SIDES[side]
        seconds, held = pools[side].submit(measured, call, f"{folder}/{store}", probe, epochs).result()
        most[side] = max(most[side], held)
        return float(seconds)

    took = alternate({side: partial(run, side) for side in SIDES}, runs)
    for side, seconds in took.items():
        print(f"{probe:<14}{side:<42}{seconds:<10.2f}{seconds / took['padded loop']:<11.2f}{most[side] / 2**20:.0f}", flush=True)


if __name__ == "__main__":
    main()
