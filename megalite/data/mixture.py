"""Sources by weight, exactly: which source the next sample comes from, and which of its samples.

Weights become whole counts over a period, and one period is laid out so that after every single
draw each source has had its share to within less than one sample. The period repeats, so any
global index is looked up in O(1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import heappop, heappush
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from megalite.errors import ConfigError

MAX_PERIOD = 1 << 16

Ints = NDArray[np.int64]


class Mixture:
    """An endless sequence of draws from sources with the given weights, all greater than zero.

    Raises:  ConfigError if there are no weights, one is not positive, or they are too far apart
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts, self._source, self._nth = _period(tuple(weights))
        self.period = len(self._source)
        by_source = np.argsort(self._source, kind="stable")
        self._places = np.split(by_source, np.cumsum(self.counts)[:-1])  # of each source's draws in a period

    def locate(self, index: Ints) -> tuple[Ints, Ints]:
        """The source of each draw, and how many draws of that source came before it.

        Shapes:  index int64 [n], not negative; returns source [n] and index within source [n], int64
        """
        cycle, place = np.divmod(index, self.period)
        source = self._source[place]
        return source, cycle * self.counts[source] + self._nth[place]

    def drawn(self, draws: int) -> Ints:
        """How many of the first `draws` draws fell on each source, int64 [sources]."""
        cycles, rest = divmod(draws, self.period)
        return cycles * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))

    def place_of(self, source: int, nth: int) -> int:
        """Which draw is the n-th, counted from 0, of a source."""
        cycle, rest = divmod(nth, int(self.counts[source]))
        return cycle * self.period + int(self._places[source][rest])


@lru_cache(maxsize=64)
def _period(weights: tuple[float, ...]) -> tuple[Ints, Ints, Ints]:
    """Counts [sources]; and for each draw of a period its source and the source's draws before it."""
    counts = quantise(weights)
    source = arrange(counts)
    nth = np.empty_like(source)
    for number, count in enumerate(counts):
        nth[source == number] = np.arange(count)
    return counts, source, nth


def temperature_weights(tokens: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Weights in proportion to tokens^(1/T): T = 1 follows the sizes, a large T evens them out.

    Source:  Arivazhagan et al. 2019, section 3
    """
    largest = max(tokens)
    return tuple((count / largest) ** (1 / temperature) for count in tokens)


def quantise(weights: Sequence[float]) -> Ints:
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
    if len(weights) == 1:
        return np.ones(1, dtype=np.int64)
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
    # Equal ratios have equal quotients to the last bit, so the first least error is of the shortest period.
    counts: Ints = rounded[error.argmin()].astype(np.int64)
    return counts


def arrange(counts: Ints) -> Ints:
    """One period as source numbers [sum of counts], every prefix within one sample of its shares.

    The chairman assignment (Tijdeman 1980): of the sources that are owed enough, draw the one
    whose next draw is due first. For k sources no prefix is off by more than 1 − 1/(2k − 2).
    """
    period, slack = int(counts.sum()), max(2 * len(counts) - 2, 1)
    # A source with count c may have its draw n at the first step t with slack · (t·c − n·period) ≥ period,
    # and is due it by (slack − 1 + slack·n) · period / (slack·c).
    opens: list[list[int]] = [[] for _ in range(period)]
    for source, count in enumerate(counts.tolist()):
        for step in (-(-period * (1 + slack * n) // (slack * count)) for n in range(count)):
            opens[step - 1].append(source)
    ready: list[tuple[float, int]] = []
    drawn = [0] * len(counts)
    order = np.empty(period, dtype=np.int64)
    for step in range(period):
        for source in opens[step]:
            due = (slack - 1 + slack * drawn[source]) / int(counts[source])  # exact enough: equals stay equal
            heappush(ready, (due, source))
            drawn[source] += 1
        order[step] = heappop(ready)[1]
    return order
