"""A slow rank is named once, by a rule that noise does not move."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.errors import PreemptedError
from megalite.log import read_json_lines
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


def train_slowly(mesh: Mesh, root: str, sleep_s: float, claimed_s: float) -> tuple[list[float], list[str]]:
    """This rank's own times, and the run's ledger; rank 1 sleeps in each step, and claims to take longer."""
    config = tiny(Path(root), "train.steps=12", f"run_dir={root}/run", "data.validation=[]",
                  "resilience.straggler_every_steps=3")  # fmt: skip
    trainer = Trainer(config, lay_out(mesh, config))
    forward_backward, stragglers = trainer.engine.forward_backward, trainer.watch.stragglers
    add, own = stragglers.add, []

    def slow(batches: Any) -> Any:
        time.sleep(sleep_s * (mesh.rank == 1))
        return forward_backward(batches)

    def note(own_s: float) -> list[Straggler]:
        own.append(own_s)
        return add(own_s + claimed_s * (mesh.rank == 1))

    trainer.engine.forward_backward = slow  # type: ignore[method-assign]
    stragglers.add = note  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    return own, (Path(config.run_dir) / "ledger.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_a_slow_rank_has_more_time_of_its_own_and_is_named_once(tmp_path: Path) -> None:
    """The time it claims beside what it sleeps makes the outcome sure, however busy the machine is."""
    write_dataset(tmp_path / "train", seed=1, documents=40)
    (one, lines), (two, _) = run_ranks(train_slowly, 2, str(tmp_path), 0.2, 20.0)
    assert spread(two)[0] > spread(one)[0] + 0.1
    events = [event for event in map(json.loads, lines) if event["event"] == "straggler"]
    assert [(event["rank"], event["step"]) for event in events] == [(1, 9)]
    assert events[0]["own_s"] > 20 > events[0]["others_s"]
    assert events[0]["host"]


def train_with_a_delay(mesh: Mesh, root: str, first: int) -> list[dict[str, Any]]:
    """Steps of 20 ms at least, in which the forward pass of rank 2 takes 50 ms more from step `first` on; the
    ledger of the run, which is asked to stop when a rank is named."""
    keys = ["train.steps=200", "train.global_batch_size=4", "train.micro_batch_size=1", "model.num_layers=1"]
    keys += ["data.validation=[]", "resilience.straggler_every_steps=5", f"run_dir={root}/run"]
    config = tiny(Path(root), *keys)
    trainer = Trainer(config, lay_out(mesh, config))
    add, train_step = trainer.watch.stragglers.add, trainer.train_step
    named: list[Straggler] = []

    def delay(*_: Any) -> None:
        time.sleep(0.02 + 0.05 * (mesh.rank == 2 and trainer.step + 1 >= first))

    def note(own_s: float) -> list[Straggler]:
        named.extend(found := add(own_s))
        return found

    trainer.engine.model.blocks["0"].register_forward_pre_hook(delay)  # type: ignore[attr-defined]
    trainer.watch.stragglers.add = note  # type: ignore[method-assign]
    trainer.train_step = lambda batches, lr, _: train_step(batches, lr, bool(named))  # type: ignore
    with suppress(PreemptedError):
        trainer.fit(PreemptionFlag())
    return read_json_lines(Path(config.run_dir) / "ledger.jsonl")


@pytest.mark.slow
def test_50_ms_more_on_one_of_four_ranks_are_named_and_nothing_before(tmp_path: Path) -> None:
    """Nobody in ten windows of five steps; then rank 2 in three, or once the machine is quiet for three."""
    write_dataset(tmp_path / "train", seed=1, documents=40)
    ledger = run_ranks(train_with_a_delay, 4, str(tmp_path), 51)[0]
    (event,) = [event for event in ledger if event["event"] == "straggler"]
    assert event["rank"] == 2
    assert event["step"] >= 50 + 5 * WINDOWS
    assert event["own_s"] > 0.07
