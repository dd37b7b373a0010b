"""The advice on how often to save: Young's optimum, and silence where it would win nothing."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from megalite.checkpoint.interval import advice, best_interval_s, estimate, lost_share
from megalite.checkpoint.writer import Writer
from megalite.config import Config
from megalite.parallel.mesh import Axis, Mesh


def test_the_best_interval_is_where_least_time_is_lost() -> None:
    for stall_s, mtbf_s in ((0.1, 3.1 * 3600), (6.3, 3.1 * 3600), (0.02, 1e7)):
        best = best_interval_s(stall_s, 0.0, mtbf_s)
        assert best == pytest.approx(math.sqrt(2 * stall_s * mtbf_s))
        least = lost_share(best, stall_s, mtbf_s)
        assert least == pytest.approx(math.sqrt(2 * stall_s / mtbf_s))
        assert all(lost_share(best * k, stall_s, mtbf_s) > least for k in (0.5, 0.9, 1.1, 2.0))
    assert round(best_interval_s(0.1, 0.0, 3.1 * 3600)) == 47
    assert round(best_interval_s(6.3, 0.0, 3.1 * 3600)) == 375


def test_saves_are_not_advised_to_overlap() -> None:
    assert best_interval_s(stall_s=0.1, write_s=600.0, mtbf_s=3.1 * 3600) == 600.0


@pytest.mark.parametrize(
    ("every_steps", "says"),
    [
        (1, "so 6.5% of the time is lost; with checkpoint.every_steps=26 0.5% would be"),
        (7, None),  # too often, but by less than 4 times
        (26, None),
        (100, None),
        (2000, "checkpoint.every_steps=2000 (2,000 s)"),
    ],
)
def test_an_interval_far_from_the_best_is_told(every_steps: int, says: str | None) -> None:
    line = advice(every_steps, step_s=1.0, stall_s=0.065, write_s=1.0, mtbf_s=5200.0)
    assert (line is None) if says is None else (line is not None and says in line)


def test_where_little_is_to_be_won_nothing_is_said() -> None:
    """A small run on one process: 27 times too often costs two minutes in a week."""
    assert advice(every_steps=100, step_s=1.0, stall_s=0.02, write_s=0.1, mtbf_s=1.8e8) is None


def test_what_a_save_will_cost_is_tried_and_nothing_stays(tmp_path: Path) -> None:
    """A disk that takes 0.1 s for 16 MiB takes 4 times as long for 64; of a smaller share all is written."""
    written, fsync = [], os.fsync

    def slow(descriptor: int) -> None:
        written.append(os.fstat(descriptor).st_size)
        fsync(descriptor)
        time.sleep(0.1)

    with mock.patch("os.fsync", slow):
        found = [estimate(tmp_path, size, torch.device("cpu")) for size in (64 * 2**20, 2**20)]
    assert written == [16 * 2**20, 2**20]
    (large_copy_s, large_s), (copy_s, small_s) = (cost for cost in found if cost is not None)
    assert large_s > 0.4
    assert 0.1 < small_s < large_s
    assert 0 < copy_s < large_copy_s
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_costs_the_advice_alone(tmp_path: Path) -> None:
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        assert estimate(tmp_path, 2**20, torch.device("cpu")) is None
    assert estimate(tmp_path / "gone", 2**20, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("keys", "mesh", "share"),
    [
        ({}, Mesh(0, 8, Axis(0, 4), torch.device("cpu"), shard=Axis(0, 4), tp=Axis(0, 2)), 12 / 8),
        ({"zero_stage": 0}, Mesh(0, 8, Axis(0, 4), torch.device("cpu"), shard=Axis(0, 4)), 12 / 2),
        (
            {"zero_shard_size": 2},
            Mesh(0, 8, Axis(0, 4), torch.device("cpu"), shard=Axis(0, 2), replicas=Axis(0, 2)),
            12 / 4,
        ),
    ],
    ids=["shards of all", "whole on each", "groups of shards"],
)
def test_what_a_rank_writes_and_how_often_a_run_fails(
    tmp_path: Path, keys: dict[str, int], mesh: Mesh, share: float
) -> None:
    """Of a model on two ranks by four; each of eight processes may be the one that fails."""
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path),
            "model": {"vocab_size": 8, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "ffn_size": 8},
            "mesh": {"tp": 2, **keys},
            "data": {"seq_len": 8, "sources": [{"path": "data"}]},
            "optim": {"lr": 1e-3},
            "train": {"steps": 9, "global_batch_size": 8, "micro_batch_size": 1},
            "resilience": {"mtbf_hours": 16.0},
        }
    )
    tried = mock.Mock(return_value=(1.0, 2.0))
    advised = mock.Mock(return_value=None)
    patched = mock.patch.multiple("megalite.checkpoint.writer", estimate=tried, advice=advised)
    with patched, Writer(config, mesh, mock.Mock(), num_parameters=800) as writer:
        for _ in range(3):
            writer.poll()
    assert tried.call_args.args[1] == share * 800
    assert advised.call_args.args[2:5] == (1.0, 2.0, 2 * 3600)
