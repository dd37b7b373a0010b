"""The loss scale of fp16: what keeps small gradients from vanishing in a format that ends at 6e-8.

The loss is multiplied before backward, and the gradients are divided by as much in fp32. The scale is as
large as gradients allow: halved whenever one overflows (that step is not applied), doubled after a run of
steps that did not. It changes by the decision all ranks agreed on, so it is the same everywhere.

Source:  Micikevicius et al. 2018, section 3.2
"""

from __future__ import annotations

from megalite.config import TrainConfig


class LossScale:
    """A power of two times the first scale; without fp16 it is 1 and stays so."""

    def __init__(self, config: TrainConfig) -> None:
        self.is_dynamic = config.precision == "fp16"
        self._first = config.loss_scale if self.is_dynamic else 1.0
        self._window = config.loss_scale_window
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.value = self._first
        self.good_steps = 0  # since it last changed

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale is left to try."""
        return self.value > 1.0

    def update(self, is_applied: bool) -> None:
        """Take note of a step that was applied, or had to be left out."""
        if not self.is_dynamic:
            return
        if not is_applied:
            self.value, self.good_steps = max(self.value / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self._window:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; without fp16 there is nothing."""
        return {"value": self.value, "good_steps": self.good_steps} if self.is_dynamic else {}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint; from one of a run in another precision as from the start."""
        self.reset()
        if self.is_dynamic and state:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
