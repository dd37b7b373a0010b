"""The loss scale: its course, and what a checkpoint keeps of it."""

from __future__ import annotations

from megalite.config import TrainConfig
from megalite.optim.loss_scale import LossScale


def _scale(precision: str) -> LossScale:
    sizes = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return LossScale(
        TrainConfig.model_validate(
            {**sizes, "precision": precision, "loss_scale": 4.0, "loss_scale_window": 3}
        )
    )


def test_it_doubles_after_a_window_without_an_overflow() -> None:
    scale, values = _scale("fp16"), []
    for is_applied in (*[True] * 8, False, *[True] * 3):
        scale.update(is_applied)
        values.append(scale.value)
    assert values == [4, 4, 8, 8, 8, 16, 16, 16, 8, 8, 8, 16]


def test_a_scale_that_has_come_down_to_one_stays_there() -> None:
    scale, resumed = _scale("fp16"), _scale("fp16")
    for is_applied in (False, False, False, True):
        scale.update(is_applied)
    resumed.load(scale.state())
    assert (resumed.value, resumed.good_steps) == (scale.value, scale.good_steps) == (1.0, 1)


def test_a_run_of_another_precision_has_none_to_go_on_from() -> None:
    scale = _scale("fp16")
    scale.update(False)  # of the run that goes back to a checkpoint from before it was in fp16
    scale.load(_scale("bf16").state())
    assert (scale.value, scale.good_steps) == (4.0, 0)
