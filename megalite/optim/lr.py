"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megalite.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) in a run of `steps`.

    Linear warm-up from lr/warmup_steps to lr; then constant, or down to lr · min_lr_ratio along a
    cosine or a line over the rest of the run, or (wsd) along a line over the last `decay_steps`.

    Source:  cosine: Loshchilov and Hutter 2017, eq. 5; wsd: Hu et al. 2024 (MiniCPM), section 4
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = steps - config.decay_steps if config.schedule == "wsd" else config.warmup_steps
    progress = min(max(step + 1 - start, 0) / max(steps - start, 1), 1.0)
    fall = (1 - math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else progress
    return config.lr * (1 - fall * (1 - config.min_lr_ratio))
