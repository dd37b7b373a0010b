"""Which rank holds the others up: computing times compared, and who stays slow named once.

A step takes as long as its slowest rank, and the others spend the difference waiting in collectives. So each
rank's own time is what it did not wait. One slow step says nothing; a rank is a straggler when it is slower
than the others by more than the noise of both, in several windows in a row.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalite.parallel.collectives import start_all_gather
from megalite.parallel.mesh import Mesh

WINDOWS = 3  # in a row
_LEAST = 0.15  # of the others' time: less is not worth a host's repair
_DEVIATIONS = 4.0  # median absolute ones, of the rank's own times and the others'


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow, and by how much in the last window; medians of its and the others' times."""

    rank: int
    own_s: float
    others_s: float

    @property
    def factor(self) -> float:
        """How many times as long as the others it takes."""
        return self.own_s / max(self.others_s, 1e-9)


class Stragglers:
    """Collects this rank's own time of each step, and compares the ranks every `window` steps."""

    def __init__(self, window: int, mesh: Mesh) -> None:
        self.window, self.mesh = window, mesh
        self._own: list[float] = []
        self._slow_windows = [0] * mesh.size
        self._named: set[int] = set()

    def add(self, own_s: float) -> list[Straggler]:
        """Note a step; at the end of a window, the ranks that are stragglers since now, the same on all.

        Comm:  an all-gather of two numbers over the world every `window` steps
        """
        if self.window == 0 or self.mesh.size == 1:
            return []
        self._own.append(own_s)
        if len(self._own) < self.window:
            return []
        mine = torch.tensor(spread(self._own), dtype=torch.float64, device=self.mesh.device)
        self._own.clear()
        gathered = mine.new_empty(2 * self.mesh.size)
        start_all_gather(gathered, mine, self.mesh.world).wait()
        return self.judge(gathered.view(-1, 2).tolist())

    def judge(self, times: Sequence[Sequence[float]]) -> list[Straggler]:
        """Count a window in which rank r took `times[r]`: median and deviation of its steps, in seconds."""
        found = []
        for rank, (own, deviation) in enumerate(times):
            others = [pair for other, pair in enumerate(times) if other != rank]
            middle, between = spread([pair[0] for pair in others])
            noise = deviation + between + statistics.median(pair[1] for pair in others)
            is_slow = own - middle > max(_LEAST * middle, _DEVIATIONS * noise)
            self._slow_windows[rank] = self._slow_windows[rank] + 1 if is_slow else 0
            if self._slow_windows[rank] >= WINDOWS and rank not in self._named:
                self._named.add(rank)
                found.append(Straggler(rank, own, middle))
        return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the median absolute deviation from it."""
    middle = statistics.median(values)
    return middle, statistics.median(abs(value - middle) for value in values)
