"""What is done about a step that was refused: leave it out, go back, or give up. Pure bookkeeping.

    one step refused              its batch is left out; weights and AdamW's step count stay as they were
    two of three steps refused    a spike: back to weights from well before its onset, and on from there
    or a slow climb of the loss   without the samples around it
    too many of either            a human must look (exit 77)

Going back to older weights and leaving out a few hundred batches around the spike is the protocol of
PaLM (Chowdhery et al. 2022, section 5.1), where the same batches did no harm to other weights: it is
the meeting of the two that is avoided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalite.checkpoint.history import Rollback
from megalite.config import Config

_CONFIRMING = 2  # steps refused …
_WITHIN = 3  # … of so many in a row make a spike
_LATELY = 1000  # steps in which `max_rollbacks_per_1000` counts


@dataclass(frozen=True)
class Spike:
    """A confirmed spike: the first step that was wrong, and the step at which that was certain."""

    onset: int
    detected: int
    reason: str


class Ladder:
    """Which steps were refused lately and which rollbacks there have been. Equal on every rank."""

    def __init__(self, config: Config) -> None:
        self._resilience, self._steps = config.resilience, config.train.steps
        self.rollbacks: list[Rollback] = []
        self.refused_in_a_row = 0
        self._refused: deque[int] = deque(maxlen=_CONFIRMING)

    @property
    def rewind_steps(self) -> int:
        """How far before the onset a run goes back at least."""
        return _or_share(self._resilience.rewind_steps, 100, self._steps)

    @property
    def skip_steps(self) -> int:
        """Batches left out around a spike, half of them before its onset."""
        return _or_share(self._resilience.skip_steps, 200, self._steps)

    def applied(self) -> None:
        """Take note of a step that was applied."""
        self.refused_in_a_row = 0

    def refused(self, step: int, reason: str) -> Spike | None:
        """Take note of step `step`, which was not applied; the spike that this confirms, if it does."""
        self.refused_in_a_row += 1
        self._refused.append(step)
        if len(self._refused) == _CONFIRMING and step - self._refused[0] < _WITHIN:
            return Spike(self._refused[0], step, reason)
        return None

    def latest_target(self, spike: Spike) -> int:
        """The last step whose weights may be gone back to.

        Twice as far at each further spike near the last one: what was gone back to was not healthy then.
        """
        return max(spike.onset - 1 - self.rewind_steps * self._times_as_far(spike), 0)

    def window(self, spike: Spike, to_step: int) -> tuple[int, int]:
        """Steps whose samples are left out, half-open, counted in steps done: none before `to_step`, and
        the steps that made it a spike among them.

        It begins earlier at each further spike near the last one: up to there the run would only come to the
        same weights again.
        """
        done, half = spike.onset - 1, self.skip_steps // 2
        start = max(done - half * self._times_as_far(spike), to_step)
        certain = min(spike.detected, spike.onset + _WITHIN)
        return start, max(start + self.skip_steps, done + self.skip_steps - half, certain)

    def _times_as_far(self, spike: Spike) -> int:
        times = 1
        for earlier in reversed(self.rollbacks):
            if abs(spike.onset - earlier.onset) > 2 * (self.rewind_steps + self.skip_steps):
                break
            times *= 2
        return times

    def exhausted(self, spike: Spike) -> str | None:
        """Why no further rollback is allowed, or None."""
        limit, lately = self._resilience.max_rollbacks, self._resilience.max_rollbacks_per_1000
        if len(self.rollbacks) >= limit:
            return f"{len(self.rollbacks)} rollbacks so far (resilience.max_rollbacks={limit})"
        recent = [r for r in self.rollbacks if spike.detected - r.detected < _LATELY]
        if len(recent) >= lately:
            return (
                f"{len(recent)} rollbacks within {_LATELY} steps (resilience.max_rollbacks_per_1000={lately})"
            )
        return None

    def lr_factor(self, step: int) -> float:
        """What the next step's learning rate is multiplied by after `step` steps: less for a while."""
        calm = self._resilience.calm_steps
        is_calm = any(r.to_step <= step < r.detected + calm for r in self.rollbacks)
        return self._resilience.calm_lr_factor if is_calm else 1.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {
            "rollbacks": [rollback.to_json() for rollback in self.rollbacks],
            "refused": list(self._refused),
            "refused_in_a_row": self.refused_in_a_row,
        }

    def load(self, state: dict[str, Any], ledger: Sequence[Rollback] = ()) -> None:
        """Go on from a checkpoint, with the rollbacks that the run's ledger knows and it may not."""
        known = [Rollback.from_json(record) for record in state["rollbacks"]]
        self.rollbacks = known + [rollback for rollback in ledger if rollback not in known]
        self.refused_in_a_row = int(state["refused_in_a_row"])
        self._refused = deque(state["refused"], maxlen=_CONFIRMING)


def _or_share(asked: int | None, usual: int, steps: int) -> int:
    """A number of steps as asked for; by default `usual`, in a short run a fiftieth but at least 8."""
    return asked if asked is not None else min(usual, max(8, steps // 50))
