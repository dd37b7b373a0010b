"""From what tiny runs lost on mixtures to a mixture that should lose less, and how sure that is.

Ridge regression on features of the shares; which features and how much shrinkage is decided by
leave-one-out, and what the choice is worth by folds that took no part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOG_FLOOR = 0.01  # shares are told apart by their logarithm down to about here
RIDGES = tuple(10.0**power for power in range(-4, 3))
FOLDS = 5


def _quadratic(x: Floats) -> Floats:
    """The columns and all products of two of them."""
    first, second = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, first] * x[:, second]], axis=1)


def _log(x: Floats) -> Floats:
    logs: Floats = np.log(x + LOG_FLOOR)
    return logs


# Each maps shares [n, sources] to features [n, features].
FEATURES: dict[str, Callable[[Floats], Floats]] = {
    "shares": lambda x: x,
    "roots of shares": np.sqrt,
    "log shares": _log,
    "shares, quadratic": _quadratic,
    "roots of shares, quadratic": lambda x: _quadratic(np.sqrt(x)),
    "log shares, quadratic": lambda x: _quadratic(_log(x)),
}


@dataclass(frozen=True)
class Ridge:
    """Losses as a linear function of standardised features, one of FEATURES; `ridge` · runs shrinks."""

    features: str
    ridge: float
    mean: Floats
    scale: Floats
    coefficients: Floats
    intercept: float

    def predict(self, shares: Floats) -> Floats:
        """Losses [n] at shares [n, sources]."""
        x = (FEATURES[self.features](shares) - self.mean) / self.scale
        losses: Floats = x @ self.coefficients + self.intercept
        return losses


def fit(shares: Floats, losses: Floats, features: str, ridge: float) -> Ridge:
    """Least squares of losses [runs] on features of shares [runs, sources], the intercept not shrunk."""
    x, mean, scale = _standard(shares, features)
    gram = x.T @ x + ridge * len(x) * np.eye(x.shape[1])
    coefficients = np.linalg.solve(gram, x.T @ (losses - losses.mean()))
    return Ridge(features, ridge, mean, scale, coefficients, float(losses.mean()))


def select(shares: Floats, losses: Floats) -> tuple[str, float]:
    """The features and the ridge with the least error in predicting each run from the others.

    The errors of leaving one out are r / (1 − h), r the residuals of one fit and h the diagonal of its hat
    matrix (Allen 1974).
    """
    best, found = np.inf, ("shares", RIDGES[-1])
    centred = losses - losses.mean()
    for features in FEATURES:
        x = _standard(shares, features)[0]
        left, values, _ = np.linalg.svd(x, full_matrices=False)
        for ridge in RIDGES:
            shrink = values**2 / (values**2 + ridge * len(x))
            hat = np.square(left) @ shrink + 1 / len(x)
            residuals = centred - left @ (shrink * (left.T @ centred))
            error = float(np.mean(np.square(residuals / np.maximum(1 - hat, 1e-9))))
            if error < best * (1 - 1e-9):
                best, found = error, (features, ridge)
    return found


@dataclass(frozen=True)
class Power:
    """How well runs are predicted that neither the fit nor `select` has seen.

    `error` is the root mean square of what predictions are off, in nats.
    """

    r2: float
    spearman: float
    error: float


def cross_validate(shares: Floats, losses: Floats, seed: int) -> Power:
    """The predictive power of `fit` with `select`, by folds."""
    order = np.random.default_rng([seed, 1]).permutation(len(losses))
    predicted = np.empty_like(losses)
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        rest = np.setdiff1d(order, out)
        model = fit(shares[rest], losses[rest], *select(shares[rest], losses[rest]))
        predicted[out] = model.predict(shares[out])
    error, spread = float(np.square(losses - predicted).mean()), float(losses.var())
    r2 = 1 - error / spread if spread > 0 else 0.0
    return Power(r2, spearman(losses, predicted), error**0.5)


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; 0 where one does not vary. Equal values share their mean rank."""
    ranks = np.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.square(ranks).sum(axis=1)).prod()
    return float(ranks[0] @ ranks[1] / norm) if norm > 0 else 0.0


@dataclass(frozen=True)
class Proposal:
    """A mixture and its uncertainty, each interval the middle 90 % of the bootstrap.

    `gain` is the predicted loss of the baseline less that of the proposal; its interval allows both
    predictions the error they have on runs not fitted, too.

    Shapes:  weights [sources]; intervals [sources, 2]
    """

    weights: Floats
    intervals: Floats
    gain: float
    gain_interval: tuple[float, float]


def propose(
    shares: Floats,
    losses: Floats,
    candidates: Floats,
    baseline: Floats,
    *,
    error: float,
    best: int,
    bootstraps: int,
    seed: int,
) -> Proposal:
    """The mean of the `best` candidates by the fit, and how it moves when the runs are drawn anew.

    `error` is that of `cross_validate`.

    Shapes:  shares [runs, sources]; losses [runs]; candidates [n, sources]; baseline [sources]
    Source:  Liu et al. 2024, section 3 (mean of the top simulated mixtures)
    """
    features, ridge = select(shares, losses)
    pair = np.empty((2, shares.shape[1]))

    def top(model: Ridge) -> Floats:
        chosen = np.argsort(model.predict(candidates), kind="stable")[:best]
        mean: Floats = candidates[chosen].mean(axis=0)
        return mean

    def gain(model: Ridge) -> float:
        at_baseline, at_proposal = model.predict(pair).tolist()
        return float(at_baseline - at_proposal)

    whole = fit(shares, losses, features, ridge)
    pair[0], pair[1] = baseline, top(whole)
    rng = np.random.default_rng([seed, 2])
    tops, gains = [], []
    for _ in range(bootstraps):
        rows = rng.integers(0, len(losses), len(losses))
        model = fit(shares[rows], losses[rows], features, ridge)
        tops.append(top(model))
        gains.append(gain(model) + 2**0.5 * error * rng.standard_normal())
    intervals = np.quantile(np.stack(tops), [0.05, 0.95], axis=0).T
    low, high = np.quantile(gains, [0.05, 0.95]).tolist()
    return Proposal(pair[1].copy(), intervals, gain(whole), (low, high))


def _standard(shares: Floats, features: str) -> tuple[Floats, Floats, Floats]:
    """Features of zero mean and unit spread, [runs, features], and what makes them so."""
    x = FEATURES[features](shares)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12] = 1.0
    return (x - mean) / scale, mean, scale


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[inverse].astype(np.float64)
    return ranks
