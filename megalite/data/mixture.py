"""Sources by weight, exactly: which source the next sample comes from, and which of its samples.

Weights become whole counts over a period, and one period is laid out so that after every single
draw each source has had its share to within less than one sample. The period repeats, so any
global index is looked up in O(1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from megalite.errors import ConfigError

MAX_PERIOD = 1 << 16


class Mixture:
    """An endless sequence of draws from sources with the given weights.

    Raises:  ConfigError if there are no weights, one is not positive, or they are too far apart
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = quantise(weights)
        self.period = int(self.counts.sum())
        self._source = arrange(self.counts)
        self._nth = np.empty(self.period, dtype=np.int64)
        for source, count in enumerate(self.counts):
            self._nth[self._source == source] = np.arange(count)

    def locate(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each global sample, and how many samples of that source came before it.

        Shapes:  index int64 [n], not negative; returns source [n] and index within source [n], int64
        """
        cycle, place = np.divmod(index, self.period)
        source = self._source[place]
        return source, cycle * self.counts[source] + self._nth[place]


def quantise(weights: Sequence[float]) -> NDArray[np.int64]:
    """Counts [sources] whose sum is the period that comes nearest to the weights' shares.

    Among all periods up to 65,536 the best is taken, the shortest of equals: decimal weights such as
    0.55, 0.3, 0.15 come out exact (11, 6, 3), and others with an error far below 1 / period.

    Raises:  ConfigError as for `Mixture`
    """
    if not weights:
        raise ConfigError("a mixture needs at least one source; data.sources is empty")
    for n, weight in enumerate(weights):
        if not (isfinite(weight) and weight > 0):
            raise ConfigError(f"data.sources[{n}].weight={weight}: should be finite and greater than 0")
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    periods = np.arange(len(shares), MAX_PERIOD + 1)
    rounded = np.rint(periods[:, None] * shares)
    error = np.abs(rounded / periods[:, None] - shares).max(axis=1)
    error[(rounded.sum(axis=1) != periods) | (rounded.min(axis=1) < 1)] = np.inf
    if not isfinite(error.min()):
        raise ConfigError(
            f"data.sources weights {list(weights)} are too far apart; the smallest share must be at least "
            f"1/{MAX_PERIOD}"
        )
    best = int(np.flatnonzero(error <= error.min() + 1e-13)[0])
    counts: NDArray[np.int64] = rounded[best].astype(np.int64)
    return counts


def arrange(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """One period as source numbers [sum of counts], every prefix within one sample of its shares.

    The chairman assignment (Tijdeman 1980): of the sources that are owed enough, draw the one
    whose next draw is due first. For k sources no prefix is off by more than 1 − 1/(2k − 2).
    """
    owed_by, period = [int(count) for count in counts], int(counts.sum())
    slack = max(2 * len(owed_by) - 2, 1)  # everything below is scaled by slack · period to stay whole
    drawn = [0] * len(owed_by)
    order = np.zeros(period, dtype=np.int64)
    for step in range(period):
        owed = [(step + 1) * count - period * n for count, n in zip(owed_by, drawn, strict=True)]
        ready = [s for s, debt in enumerate(owed) if slack * debt >= period]
        chosen = min(ready, key=lambda s: ((slack - 1) * period - slack * owed[s]) / owed_by[s])
        drawn[chosen] += 1
        order[step] = chosen
    return order
