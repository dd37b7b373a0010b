"""Loss spikes: is this step's loss or gradient norm one that healthy training would not produce?

Judged before the optimizer step, against the steps that were accepted lately. Both values are taken
as logarithms, since both err by factors, and compared with the window's median in units of its median
absolute deviation (MAD). Neither statistic moves when a few values are wild, and what is refused
never enters the window: a first spike cannot hide a second.

A slower fault shows in no single step: the loss turns and climbs for hundreds of them. That is a matter
of block medians, compared with the best block so far and with how much neighbouring blocks differ anyway.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from megalite.config import ResilienceConfig

Verdict = Literal["healthy", "not finite", "wild"]

WINDOW = 256  # accepted steps the statistics are made of
MIN_HISTORY = 64  # with fewer, only what is not finite is refused
BLOCK = 32  # steps whose median counts once in the slow test
SLOW_BLOCKS = 4  # in a row that must lie too high
_BLOCKS = 64  # whose differences tell the noise of a block
_BLOCK_NOISES = 8.0  # the best of many blocks is low by three of them

# However calm a run is, smaller rises are no spike: 5% of loss, twice the gradient norm.
_LEAST_LOSS_RISE = math.log(1.05)
_LEAST_NORM_RISE = math.log(2.0)


class SpikeDetector:
    """The accepted steps' recent values, and the questions asked of them. Equal on every rank.

    `judge` asks, `accept` remembers: between the two the caller decides whether the step is applied.
    """

    def __init__(self, config: ResilienceConfig) -> None:
        self._threshold = config.spike_threshold
        self._slow_rise = config.slow_divergence
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._block: list[float] = []
        self._blocks: deque[float] = deque(maxlen=_BLOCKS)  # medians
        self._best: tuple[float, int] | None = None  # the lowest of all medians so far, and its last step

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """What to think of a step's mean loss and gradient norm."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "not finite"
        if len(self._losses) < MIN_HISTORY or not self._threshold:
            return "healthy"
        is_wild = _is_above(_log(loss), self._losses, self._threshold, _LEAST_LOSS_RISE) or _is_above(
            _log(grad_norm), self._norms, self._threshold, _LEAST_NORM_RISE
        )
        return "wild" if is_wild else "healthy"

    def accept(self, step: int, loss: float, grad_norm: float) -> None:
        """Remember a step that was applied; `step` counts it."""
        self._losses.append(_log(loss))
        self._norms.append(_log(grad_norm))
        self._block.append(self._losses[-1])
        if len(self._block) < BLOCK:
            return
        value = median(self._block)
        self._block.clear()
        self._blocks.append(value)
        if self._best is None or value <= self._best[0]:
            self._best = (value, step)

    @property
    def slow_onset(self) -> int | None:
        """The step after which the loss has been climbing away for good, or None while it has not."""
        if self._best is None or not self._slow_rise or len(self._blocks) < 2 * SLOW_BLOCKS:
            return None
        best, step = self._best
        blocks = list(self._blocks)
        changes = median(abs(after - before) for before, after in pairwise(blocks))
        noise = 1.4826 * changes / math.sqrt(2)
        limit = best + max(math.log1p(self._slow_rise), _BLOCK_NOISES * noise)
        return step if min(blocks[-SLOW_BLOCKS:]) > limit else None

    def forget(self) -> None:
        """Start over, where data or sequence length change and another loss is to be expected."""
        self._losses.clear()
        self._norms.clear()
        self._block.clear()
        self._blocks.clear()
        self._best = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "block": list(self._block),
            "blocks": list(self._blocks),
            "best": self._best,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["norms"], maxlen=WINDOW)
        self._block, self._blocks = list(state["block"]), deque(state["blocks"], maxlen=_BLOCKS)
        self._best = (float(state["best"][0]), int(state["best"][1])) if state["best"] else None


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


def _is_above(value: float, window: Iterable[float], threshold: float, least: float) -> bool:
    """Whether a value lies `threshold` deviations, and by `least`, above the window's median."""
    values = list(window)
    middle = median(values)
    deviation = median(abs(other - middle) for other in values)
    return value - middle > max(threshold * deviation, least)
