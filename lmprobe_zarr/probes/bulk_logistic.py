"""Logistic regression of many fits at once by L-BFGS.

Its line search is nearly exact: along a direction, the decisions are known without another product. Its preconditioner has the curvature
of each fit and the leading directions of the rows.

Sources: J. Nocedal and S. Wright, "Numerical Optimization" (2006), chapter 7.2 (L-BFGS); Z. Frangella, J. Tropp and M. Udell, "Randomized
Nyström Preconditioning", SIAM Journal on Matrix Analysis and Applications 44 (2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lmprobe_zarr.probes.bulk_rows import Fits
from lmprobe_zarr.typing import Array, Floats

if TYPE_CHECKING:
    import torch

__all__ = ["MEMORY", "TOLERANCE", "logistic"]

#: A fit has converged when its coefficients, for standardised units, are this close to the optimum by estimate, as a share of the largest
#: where that is above 1. Tests hold the true distance to `TOLERANCE`.
_ENOUGH: Final = 1e-5
TOLERANCE: Final = 1e-4
_MOST_ITERATIONS: Final = 1000
#: Pairs of steps that L-BFGS remembers, and over how many steps the rate of convergence is taken.
MEMORY, _WINDOW = 5, 8
#: A search along a step may end where the slope has shrunk to this share.
_NEAR: Final = 0.3


def logistic(fits: Fits) -> tuple[Floats, Array]:
    """Decisions for all rows, float64, shape (fit, decision, row), and which fits converged."""
    import torch

    descent = _Descent(fits)
    # float32 is accurate enough for most fits; what is wrong with each is computed in float64. Coarser products of a GPU are of no use.
    coarse = fits.rows.device != "cpu" and torch.get_float32_matmul_precision() != "highest"
    for dtype in (torch.float64,) if coarse else (torch.float32, torch.float64):
        descent.run(dtype)
        descent.check()
        if not bool(descent.wrong.any()):
            break
    return descent.decided.cpu().numpy(), (~descent.wrong).cpu().numpy()


class _Descent:
    """L-BFGS of many fits. The loss is the sum over the training rows, as scikit-learn's times 1 / C."""

    def __init__(self, fits: Fits) -> None:
        import torch

        rows, shape = fits.rows, (len(fits.requests), fits.width)
        self.fits = fits
        on: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
        self.coef, self.intercept = torch.zeros(*shape, rows.hidden, **on), torch.zeros(*shape, **on)
        self.decided = torch.zeros(*shape, rows.n, **on)
        #: Which fits have not converged.
        self.wrong = torch.ones(shape[0], dtype=torch.bool, device=rows.device)
        #: How much farther the optimum was than the last step of each fit was long.
        self._farther = torch.ones(shape[0], **on)
        #: The last steps of each fit, the last one first; zeros where there were fewer.
        sizes = ((*shape, rows.hidden), shape, (*shape, rows.hidden), shape, (shape[0],))
        self._pairs = [tuple(torch.zeros(*size, dtype=torch.float32, device=rows.device) for size in sizes) for _ in range(MEMORY)]

    def run(self, dtype: torch.dtype) -> None:
        """Descend with the fits that are wrong until each has converged, or rounding lets it get no further."""
        import torch

        state = self._begin(dtype)
        lengths: list[torch.Tensor] = []
        for turn in range(_MOST_ITERATIONS):
            lengths = [*lengths[-_WINDOW:], state.advance()]
            # Steps shrink by about the same factor each time.
            last = torch.stack(lengths[-2:]).amax(dim=0)
            rate = ((last / lengths[0].clamp_min(1e-30)) ** (1 / max(1, len(lengths) - 1))).clamp(0.1, 0.98)
            farther = rate / (1 - rate)
            ended = ((last * farther <= _ENOUGH * state.size()) & (turn >= 2)) | ~torch.isfinite(last) | state.is_noise()
            over = bool(ended.all()) or turn == _MOST_ITERATIONS - 1
            if over or int(ended.sum()) * 8 >= len(ended):
                self._end(state, torch.ones_like(ended) if over else ended, farther)
                if over:
                    return
                state.keep(~ended)
                lengths = [length[~ended] for length in lengths]

    def _begin(self, dtype: torch.dtype) -> _State:
        import torch

        active = torch.nonzero(self.wrong)[:, 0]
        state = _State(self.fits, active, self.coef[active], self.intercept[active], dtype)
        state.pairs = [tuple(each[active].to(dtype) for each in pair) for pair in reversed(self._pairs)]
        return state

    def _end(self, state: _State, ended: torch.Tensor, farther: torch.Tensor) -> None:
        places = state.active[ended]
        self.coef[places], self.intercept[places] = state.coef[ended].double(), state.intercept[ended].double()
        self._farther[places] = farther[ended].double()
        for held, pair in zip(self._pairs, reversed(state.pairs), strict=False):
            for each, values in zip(held, pair, strict=True):
                each[places] = values[ended].float()

    def check(self) -> None:
        """Decide again in float64 which fits are wrong."""
        import torch

        state = self._begin(torch.float64)
        step, _ = state.direction()
        far = step.abs().amax(dim=(1, 2)) * self._farther[state.active].clamp_min(1.0)
        self.decided[state.active] = state.decided
        self.wrong[state.active] = ~(far <= 2 * _ENOUGH * state.size())


class _State:
    """Where some fits are, in one dtype."""

    def __init__(self, fits: Fits, active: torch.Tensor, coef: torch.Tensor, intercept: torch.Tensor, dtype: torch.dtype) -> None:
        rows = fits.rows
        folds = fits.folds[active]
        self.rows, self.active, self.dtype = rows, active, dtype
        self.penalty = fits.penalty[active, None, None].to(dtype)
        self.counts = rows.counts[folds][:, None].to(dtype)
        self.weights = rows.weights[folds][:, None].to(dtype)
        self.shift, self.inverse = rows.shift[folds][:, None].to(dtype), rows.inverse[folds][:, None].to(dtype)
        self.targets = fits.targets[active].to(dtype)
        self.coef, self.intercept = coef.to(dtype), intercept.to(dtype)
        self.pairs: list[tuple[torch.Tensor, ...]] = []
        directions, values, rest = rows.directions()
        self.directions, self.values, self.rest = directions.to(dtype), values.to(dtype), rest
        self.decided = self.decide(self.coef, self.intercept)
        self._look()

    def keep(self, which: torch.Tensor) -> None:
        """Go on with some fits only."""
        for name in ("active", "penalty", "counts", "weights", "shift", "inverse", "targets", "coef", "intercept", "decided", "missed"):
            setattr(self, name, getattr(self, name)[which])
        for name in ("curvature", "gradient", "slope"):
            setattr(self, name, getattr(self, name)[which])
        self.pairs = [tuple(each[which] for each in pair) for pair in self.pairs]

    def size(self) -> torch.Tensor:
        """The largest coefficient of each fit, at least 1."""
        return self.coef.abs().amax(dim=(1, 2)).clamp_min(1.0)

    def is_noise(self) -> torch.Tensor:
        """Which gradients are no larger than what rounding makes of them."""
        import torch

        rounding = torch.finfo(self.dtype).eps * self.missed * (self.rows.hidden * self.coef.shape[1]) ** 0.5
        return torch.le(_inner(self.gradient, self.gradient).sqrt(), 2 * rounding)

    def decide(self, coef: torch.Tensor, intercept: torch.Tensor) -> torch.Tensor:
        raw = coef * self.inverse
        found = self.rows.times(raw)
        found += (intercept - (raw * self.shift).sum(dim=-1))[..., None]
        return found

    @staticmethod
    def _chances(decided: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes. Never below 1e-18: arithmetic on numbers below 1e-38 takes a hundred times as long."""
        return decided.clamp(min=-41).sigmoid() if decided.shape[1] == 1 else decided.softmax(dim=1).clamp_(min=1e-18)

    def _look(self) -> None:
        """Gradient, and the mean curvature of each decision, where the fits are."""
        chances = self._chances(self.decided)
        wrong = (chances - self.targets) * self.weights
        self.curvature = ((chances - chances.square()) * self.weights).sum(dim=-1).div_(self.counts).clamp_min_(1e-10)
        self.missed = _inner(wrong, wrong).sqrt()
        self.slope = wrong.sum(dim=-1)
        self.gradient = _centred((self.rows.sums(wrong) - self.shift * self.slope[..., None]) * self.inverse + self.penalty * self.coef)
        self.slope = _centred(self.slope)

    def _precondition(self, gradient: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (self.curvature * self.counts)[..., None]
        others = 1 / (scale * self.rest + self.penalty)
        found = gradient * others
        if len(self.values):
            inside = gradient @ self.directions
            found += (inside * (1 / (scale * self.values + self.penalty) - others)) @ self.directions.t()
        return _centred(found), _centred(slope / scale[..., 0])

    def direction(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step of L-BFGS, of coefficients and intercepts."""
        along, slope = self.gradient.clone(), self.slope.clone()
        shares = []
        for step, step_0, change, change_0, inverse in reversed(self.pairs):
            share = inverse * (_inner(step, along) + _inner(step_0, slope))
            along -= share[:, None, None] * change
            slope -= share[:, None] * change_0
            shares.append(share)
        along, slope = self._precondition(along, slope)
        if self.pairs:
            step, step_0, change, change_0, inverse = self.pairs[-1]
            scaled, scaled_0 = self._precondition(change, change_0)
            fitted = 1 / (inverse * (_inner(change, scaled) + _inner(change_0, scaled_0)))
            fitted = fitted.nan_to_num(1.0, 1.0, 1.0).clamp(1e-3, 1e3)
            along *= fitted[:, None, None]
            slope *= fitted[:, None]
        for (step, step_0, change, change_0, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            rest = share - inverse * (_inner(change, along) + _inner(change_0, slope))
            along += rest[:, None, None] * step
            slope += rest[:, None] * step_0
        return -along, -slope

    def advance(self) -> torch.Tensor:
        """One step of every fit; the largest change of a coefficient of each."""
        import torch

        step, step_0 = self.direction()
        image = self.decide(step, step_0)
        start = _inner(self.gradient, step) + _inner(self.slope, step_0)
        length = self._search(image, step, start)
        step *= length[:, None, None]
        step_0 *= length[:, None]
        gradient, slope = self.gradient, self.slope
        self.coef = self.coef + step
        self.intercept = self.intercept + step_0
        self.decided += image.mul_(length[:, None, None])
        self._look()
        change, change_0 = self.gradient - gradient, self.slope - slope
        product = _inner(step, change) + _inner(step_0, change_0)
        # A pair that float rounding has spoiled says nothing.
        inverse = torch.where(product > 0, 1 / product, torch.zeros_like(product))
        self.pairs = [*self.pairs[-MEMORY + 1 :], (step, step_0, change, change_0, inverse)]
        return step.abs().amax(dim=(1, 2))

    def _search(self, image: torch.Tensor, step: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """How far to go along a step: where the loss no longer falls, by Newton's method between bounds. The loss is convex."""
        import torch

        length, low = torch.ones_like(start), torch.zeros_like(start)
        high = torch.full_like(start, torch.inf)
        penalty = self.penalty[:, 0, 0]
        held, own = penalty * _inner(self.coef, step), penalty * _inner(step, step)
        weighted = image * self.weights
        for _ in range(12):
            chances = self._chances(self.decided + length[:, None, None] * image)
            slope = _inner(chances - self.targets, weighted) + held + length * own
            mean = (chances * image).sum(dim=1, keepdim=True)
            bend = _inner(chances * (image - mean), weighted) + own
            low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
            following = length - slope / bend
            inside = (following > low) & (following < high)
            near = slope.abs() <= _NEAR * start.abs()
            if bool(near.all()):
                # One more step of Newton's method, from here, costs nothing.
                length = torch.where(inside, following, length)
                break
            length = torch.where(inside, following, torch.where(torch.isinf(high), 2 * length, (low + high) / 2))
        return torch.where(start < 0, length, torch.zeros_like(length))


def _centred(values: torch.Tensor) -> torch.Tensor:
    """Values of several classes less their mean. The optimum has none, and the loss does not see one, so rounding would make it up."""
    return values if values.shape[1] == 1 else values - values.mean(dim=1, keepdim=True)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner products of the fits, over all other axes."""
    return (first * second).flatten(1).sum(dim=1)
