"""What a run draws when: mixtures that change at given samples, sources that run out, ranges left out.

Everything is a function of the global sample index, worked out once from the settings. A change of
weights is a new segment whose sources continue at the cursors where the last one left them; a source
that reaches its cap is one more change, after which the others share what it had.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.config import DataConfig
from megalite.data.mixture import Mixture, temperature_weights
from megalite.errors import ConfigError, DataError

Ints = NDArray[np.int64]


class Phase(NamedTuple):
    """Weights in force from global sample `start` on, one for each source; 0 gives it nothing."""

    start: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Segment:
    """Draws from `start` on by one mixture of the sources `active`, which have had `cursors` samples."""

    start: int
    mixture: Mixture
    active: Ints
    cursors: Ints

    def cursors_at(self, index: int) -> Ints:
        cursors = self.cursors.copy()
        cursors[self.active] += self.mixture.drawn(index - self.start)
        return cursors


class Blend:
    """From global sample index to source and the number of samples it gave before.

    `phases` ascend; of those that begin with the same sample the last is in force. `limits` cap what
    each source gives (None: no cap). `origin` and `cursors` say where a run that changed its mixture
    began anew, and what each source had given by then; the phases in force before the origin are passed
    over.

    Raises:  ConfigError if no phase is in force at the origin, or its weights are unusable
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        limits: Sequence[int | None],
        origin: int = 0,
        cursors: Sequence[int] | None = None,
    ) -> None:
        self.origin = origin
        self.end: int | None = None  # the first global sample that no source can give
        self._limits = limits
        self._segments: list[_Segment] = []
        self._plan(phases, np.array(cursors or [0] * len(limits), dtype=np.int64))
        self._starts = np.array([segment.start for segment in self._segments], dtype=np.int64)

    def locate(self, index: Ints) -> tuple[Ints, Ints]:
        """Source of each global sample, and how many samples that source gave before; int64 [n] each.

        Raises:  DataError before the mixture, or past the end of all sources
        """
        if index.size:
            self.check(int(index.max()))
            if (first := int(index.min())) < self.origin:
                raise DataError(
                    f"global sample {first} was drawn before sample {self.origin}, where the mixture of "
                    "sources became another; what it was, the configuration of that time tells"
                )
        source, nth = np.empty_like(index), np.empty_like(index)
        number = np.searchsorted(self._starts, index, side="right") - 1
        for n in sorted(set(number.tolist())):
            segment = self._segments[n]
            mine = number == n
            place, drawn = segment.mixture.locate(index[mine] - segment.start)
            source[mine] = segment.active[place]
            nth[mine] = segment.cursors[segment.active[place]] + drawn
        return source, nth

    def cursors(self, index: int) -> list[int]:
        """Samples each source has given when the run stands before global sample `index`."""
        at = min(index, self.end) if self.end is not None else index
        segment = self._segments[bisect_right(self._starts.tolist(), at) - 1]
        found: list[int] = segment.cursors_at(at).tolist()
        return found

    def check(self, index: int) -> None:
        """A global sample must exist.

        Raises:  DataError past the end of all sources
        """
        if self.end is not None and index >= self.end:
            raise DataError(
                f"global sample {index} is past the data: by sample {self.end} every source with a share had "
                "given all that its max_epochs allows; train fewer steps, raise max_epochs, or add a source"
            )

    def _plan(self, phases: Sequence[Phase], cursors: Ints) -> None:
        """Fill `_segments` from the origin to the last change, and set `end`."""
        at = self.origin
        while True:
            in_force = [phase for phase in phases if phase.start <= at]
            if not in_force:
                raise ConfigError(f"data.schedule says nothing of sample {at}; its first entry comes later")
            weights = in_force[-1].weights
            if not any(weights):
                raise ConfigError(
                    f"every source has weight 0 from sample {in_force[-1].start} on; give one a share in "
                    "data.sources or data.schedule"
                )
            left = [
                None if limit is None else limit - int(cursors[s]) for s, limit in enumerate(self._limits)
            ]
            active = [
                s for s, weight in enumerate(weights) if weight > 0 and ((has := left[s]) is None or has > 0)
            ]
            if not active:
                self.end = at
                return
            mixture = Mixture([weights[s] for s in active])
            segment = _Segment(at, mixture, np.array(active, dtype=np.int64), cursors)
            self._segments.append(segment)
            changes = [phase.start for phase in phases if phase.start > at][:1]
            for place, source in enumerate(active):
                if (samples := left[source]) is not None:
                    changes.append(at + mixture.place_of(place, samples - 1) + 1)
            if not changes:
                return
            at = min(changes)
            cursors = segment.cursors_at(at)


def build_phases(config: DataConfig, tokens: Sequence[int]) -> list[Phase]:
    """The mixture from the start, by `sources` or `temperature`, and each change of it.

    `tokens` are those of each source.

    Raises:  ConfigError if there are no sources
    """
    if not tokens:
        raise ConfigError("a mixture needs at least one source; data.sources is empty")

    def weights(explicit: tuple[float, ...], temperature: float | None) -> tuple[float, ...]:
        return explicit if temperature is None else temperature_weights(tokens, temperature)

    first = weights(tuple(source.weight for source in config.sources), config.temperature)
    changes = [
        Phase(first_sample(change.tokens, config.seq_len), weights(change.weights, change.temperature))
        for change in config.schedule
    ]
    return [Phase(0, first), *changes]


def first_sample(tokens: int, seq_len: int) -> int:
    """The first global sample of which at least so many tokens lie before."""
    return -(-tokens // seq_len)


class Skips:
    """Ranges of global samples that a run leaves out, and so what it reads at a position.

    A position counts the samples a run has consumed; with nothing left out it is the global index.
    `ranges` are half-open; they may touch or overlap and come in any order.

    Raises:  ConfigError on a range that is empty or negative
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
            if not 0 <= start < stop:
                raise ConfigError(f"samples [{start}, {stop}) cannot be left out; use 0 ≤ start < stop")
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.ranges = tuple(merged)
        lengths = np.array([0, *(stop - start for start, stop in merged)], dtype=np.int64)
        self._before = np.cumsum(lengths)  # samples left out before the gap after each range
        self._positions = np.array([start for start, _ in merged], dtype=np.int64) - self._before[:-1]

    def index(self, position: Ints) -> Ints:
        """Global index of the sample at each position, int64 [n] to int64 [n]."""
        return position + self._before[np.searchsorted(self._positions, position, side="right")]

    def index_at(self, position: int) -> int:
        """`index` of one position."""
        return int(self.index(np.array([position], dtype=np.int64))[0])


class SeqLens:
    """The length of a row in the course of a run: `changes` are (first global sample, seq_len), ascending.

    A sample always has `seq_len` tokens; a step that reads shorter rows cuts each into as many as
    fit, so a step keeps its tokens, and no token is lost or repeated at a change.
    """

    def __init__(self, seq_len: int, changes: Sequence[tuple[int, int]] = ()) -> None:
        self._starts = np.array([start for start, _ in changes], dtype=np.int64)
        self._lengths = np.array([seq_len, *(length for _, length in changes)], dtype=np.int64)

    def at(self, index: Ints) -> Ints:
        """Row lengths of the steps whose first samples are these global samples; int64 [n] each."""
        lengths: Ints = self._lengths[np.searchsorted(self._starts, index, side="right")]
        return lengths
