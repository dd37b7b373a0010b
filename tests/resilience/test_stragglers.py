"""A slow rank is named once, by a rule that noise does not move."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from megalite.parallel.mesh import Axis, Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.resilience.stragglers import WINDOWS, Straggler, Stragglers, spread
from megalite.trainer import Trainer
from tests.ranks import SOLO, run_ranks
from tests.trainer.runs import lay_out, tiny, write_dataset


def _judge(times: np.ndarray, window: int) -> list[tuple[int, Straggler]]:
    """The rule on own times [steps, ranks]; what it names, with the step at which it does."""
    ranks = times.shape[1]
    rule = Stragglers(window, Mesh(0, ranks, Axis(), SOLO.device))
    named = []
    for end in range(window, len(times) + 1, window):
        part = times[end - window : end]
        named += [
            (end, slow) for slow in rule.judge([spread(part[:, rank].tolist()) for rank in range(ranks)])
        ]
    return named


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("slow_s", [0.05, 0.02])
def test_a_constant_delay_is_named_after_three_windows(ranks: int, slow_s: float) -> None:
    rng = np.random.default_rng(ranks)
    times = 0.1 + rng.exponential(0.002, (30, ranks))
    times[:, 1] += slow_s
    ((step, slow),) = _judge(times, 3)
    assert (step, slow.rank) == (3 * WINDOWS, 1)
    assert slow.factor == pytest.approx(1 + slow_s / 0.1, rel=0.1)


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_noise_is_not_a_straggler(ranks: int) -> None:
    """200 steps, 20 seeds: steps of 10 ms that other processes lengthen, now and then twentyfold."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        times = 0.01 * (1 + rng.exponential(0.5, (200, ranks)))
        times *= np.where(rng.random(times.shape) < 0.05, rng.uniform(1, 20, times.shape), 1)
        assert _judge(times, 10) == []


def test_a_rank_that_is_slow_now_and_then_is_not_named() -> None:
    times = np.full((60, 4), 0.1)
    times[::10, 2] += 1.0  # a step in each window of ten
    times[:20, 3] += 0.1  # two windows, and well again
    assert _judge(times, 10) == []


def train_with_delay(mesh: Mesh, root: str, steps: int, delay_s: float) -> list[str]:
    """The events of a run in which rank 1 sleeps in each step."""
    config = tiny(Path(root), f"train.steps={steps}", f"run_dir={root}/run{delay_s}", "data.validation=[]",
                  "resilience.straggler_every_steps=3", "resilience.digest_every_steps=0")  # fmt: skip
    trainer = Trainer(config, lay_out(mesh, config))
    forward_backward = trainer.engine.forward_backward

    def slow(batches: object) -> object:
        time.sleep(delay_s * (mesh.rank == 1))
        return forward_backward(batches)  # type: ignore[arg-type]

    trainer.engine.forward_backward = slow  # type: ignore[assignment, method-assign]
    trainer.fit(PreemptionFlag())
    return (Path(config.run_dir) / "ledger.jsonl").read_text().splitlines()


def test_a_sleeping_rank_is_named_in_the_ledger(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", seed=1, documents=40)
    # The machine's other work may hide 50 ms from a window, but not from all of twenty.
    lines = run_ranks(train_with_delay, 2, str(tmp_path), 60, 0.05)[0]
    events = [event for event in map(json.loads, lines) if event["event"] == "straggler"]
    assert [event["rank"] for event in events] == [1]
    assert events[0]["own_s"] > events[0]["others_s"]
    assert events[0]["host"]
