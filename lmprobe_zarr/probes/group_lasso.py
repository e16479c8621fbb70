"""Logistic regression with a group lasso over layers: which layers a label can be read from. Never layer numbers, folds or files."""

from __future__ import annotations

from typing import Final

import numpy as np

from lmprobe_zarr.typing import Array, Floats

__all__ = ["fit_group_lasso"]

#: How far the solution may be from optimal, as a share of alpha: the largest norm, over layers, of the gradient that is left.
_TOLERANCE: Final = 1e-4
_MOST_STEPS: Final = 20_000
#: After how many steps the distance from the optimum is measured, which costs a product with the whole matrix.
_LOOK: Final = 5


def fit_group_lasso(rows: Array, codes: Array, n_layers: int, alpha: float) -> tuple[Floats, bool]:
    """Coefficients of a logistic regression whose penalty sets whole layers to exactly zero.

    They minimise ``mean(log(1 + exp(−s·(rows @ w)))) + alpha · Σ_l ‖w_l‖``, with s = −1 for the first class and 1 for the second, and
    ``w_l`` the coefficients of layer l. There is no intercept, as in lmprobe, so rows are centred beforehand.

    Parameters
    ----------
    rows : ndarray of float, shape (prompt, layer × hidden)
    codes : ndarray of int, shape (prompt,)
        0 or 1.
    n_layers : int
    alpha : float
        Positive.

    Returns
    -------
    coef : ndarray of float64, shape (layer, hidden)
    converged : bool
        Whether the optimality conditions hold: for layers with coefficients ‖g_l + alpha · w_l / ‖w_l‖‖, and for the others
        ‖g_l‖ − alpha, are at most 1e-4 · alpha, where g is the gradient of the loss.

    Notes
    -----
    Accelerated proximal gradient descent with restarts. Sources: M. Yuan and Y. Lin, "Model selection and estimation in regression with
    grouped variables", JRSS B 68 (2006); A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging
    Sciences 2 (2009); B. O'Donoghue and E. Candès, "Adaptive restart for accelerated gradient schemes" (2015), arXiv:1204.3982.
    """
    from scipy.special import expit

    blocks, bases = zip(*(_shortened(block) for block in np.split(np.asarray(rows, np.float64), n_layers, axis=1)), strict=True)
    matrix = np.concatenate(blocks, axis=1)
    width, sign = blocks[0].shape[1], np.where(codes == 0, -1.0, 1.0)

    def gradient(products: Floats) -> tuple[float, Floats]:
        margin = sign * products
        return float(np.logaddexp(0, -margin).mean()), matrix.T @ (-sign * expit(-margin)) / len(matrix)

    def shrink(w: Floats, by: float) -> Floats:
        by_layer = w.reshape(n_layers, width)
        norms = np.linalg.norm(by_layer, axis=1, keepdims=True)
        return np.asarray(by_layer * np.maximum(0, 1 - by / np.where(norms > 0, norms, np.inf))).ravel()

    def distance(w: Floats, slope: Floats) -> float:
        by_layer, left = w.reshape(n_layers, width), slope.reshape(n_layers, width)
        norms = np.linalg.norm(by_layer, axis=1, keepdims=True)
        used = norms[:, 0] > 0
        left = left + alpha * by_layer / np.where(norms > 0, norms, 1)
        return float(np.where(used, np.linalg.norm(left, axis=1), np.linalg.norm(left, axis=1) - alpha).max())

    w = ahead = np.zeros(matrix.shape[1])
    of_w = of_ahead = np.zeros(len(matrix))
    momentum, curvature, converged = 1.0, 1e-3, False
    for step in range(_MOST_STEPS):
        loss, slope = gradient(of_ahead)
        curvature *= 0.9
        while True:
            found = shrink(ahead - slope / curvature, alpha / curvature)
            of_found, moved = matrix @ found, found - ahead
            after = float(np.logaddexp(0, -sign * of_found).mean())
            if after <= loss + slope @ moved + curvature / 2 * (moved @ moved) + 1e-14:
                break
            curvature *= 1.5
        if step % _LOOK == 0 and distance(found, gradient(of_found)[1]) <= _TOLERANCE * alpha:
            w, converged = found, True
            break
        if (ahead - found) @ (found - w) > 0:
            # The momentum points uphill: start anew from here.
            momentum, ahead, of_ahead = 1.0, found, of_found
        else:
            grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            share = (momentum - 1) / grown
            ahead, of_ahead, momentum = found + share * (found - w), of_found + share * (of_found - of_w), grown
        w, of_w = found, of_found
    return np.stack([part if basis is None else basis @ part for part, basis in zip(np.split(w, n_layers), bases, strict=True)]), converged


def _shortened(block: Floats) -> tuple[Floats, Floats | None]:
    """A layer with more units than prompts in a basis of its rows, which the best coefficients lie in; norms do not change."""
    if block.shape[1] <= len(block):
        return block, None
    basis, triangle = np.linalg.qr(block.T)
    return np.ascontiguousarray(triangle.T), basis
