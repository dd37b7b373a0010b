"""What is done about refused steps: counted, confirmed, capped; and whom a second run blames."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megalite.checkpoint.commit import save
from megalite.checkpoint.history import Rollback, abandoned_from
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.store import newest, open_checkpoint
from megalite.errors import CheckpointError
from megalite.recovery import Recovery
from megalite.resilience.ladder import Ladder, Spike
from megalite.resilience.rerun import Blame, blame
from tests.checkpoint.helpers import owned
from tests.ranks import SOLO
from tests.trainer.runs import tiny

ASKED = ("resilience.rewind_steps=100", "resilience.skip_steps=40", "train.steps=100000")


def ladder(tmp_path: Path, *overrides: str) -> Ladder:
    return Ladder(tiny(tmp_path, *(overrides or ASKED)))


def rollback(onset: int, to_step: int = 0) -> Rollback:
    return Rollback(onset, onset + 1, "wild", to_step, (onset, onset + 10))


def go_back(found: Ladder, to: Rollback) -> None:
    """As a run does that reads it in its ledger."""
    found.load(found.state(), [to])


@pytest.mark.parametrize(
    ("refused", "confirmed"),
    [
        ([50], None),
        ([50, 51], Spike(50, 51, "wild")),
        ([50, 52], Spike(50, 52, "wild")),
        ([50, 53], None),
        ([50, 53, 55], Spike(53, 55, "wild")),
    ],
)
def test_two_refused_steps_of_three_are_a_spike(
    tmp_path: Path, refused: list[int], confirmed: Spike | None
) -> None:
    found = ladder(tmp_path)
    assert [found.refused(step, "wild") for step in refused][-1] == confirmed


def test_how_far_back_and_which_batches(tmp_path: Path) -> None:
    found, spike = ladder(tmp_path), Spike(1000, 1001, "wild")
    assert found.latest_target(spike) == 899
    # Steps done: 979 before the window, 1019 after it, the 1000th and the 1001st inside.
    assert found.window(spike, 800) == (979, 1019)
    assert found.window(spike, 990) == (990, 1030)
    assert found.window(Spike(1000, 1200, "slow"), 800) == (979, 1019)


def test_a_spike_near_the_last_one_goes_back_twice_as_far(tmp_path: Path) -> None:
    found = ladder(tmp_path)
    go_back(found, rollback(1000))
    assert found.latest_target(Spike(1100, 1101, "wild")) == 1099 - 200
    assert found.window(Spike(1100, 1101, "wild"), 800) == (1099 - 40, 1099 + 20)
    go_back(found, rollback(1100))
    assert found.latest_target(Spike(1150, 1151, "wild")) == 1149 - 400
    assert found.window(Spike(1150, 1151, "wild"), 700) == (1149 - 80, 1149 + 20)
    assert found.window(Spike(1150, 1151, "wild"), 1140) == (1140, 1180)
    assert found.latest_target(Spike(5000, 5001, "wild")) == 4899
    assert found.latest_target(Spike(150, 151, "wild")) == 49


@pytest.mark.parametrize(
    ("steps", "rewind", "skip"), [(100_000, 100, 200), (1000, 20, 20), (400, 8, 8), (20, 8, 8)]
)
def test_short_runs_have_smaller_defaults(tmp_path: Path, steps: int, rewind: int, skip: int) -> None:
    found = ladder(tmp_path, f"train.steps={steps}")
    assert (found.rewind_steps, found.skip_steps) == (rewind, skip)


def test_too_many_rollbacks_are_not_allowed(tmp_path: Path) -> None:
    found = ladder(tmp_path, *ASKED, "resilience.max_rollbacks=5", "resilience.max_rollbacks_per_1000=2")
    for onset in (1000, 1500):
        assert found.exhausted(Spike(onset, onset + 1, "wild")) is None
        go_back(found, rollback(onset))
    assert "2 rollbacks within 1000 steps" in str(found.exhausted(Spike(1900, 1901, "wild")))
    for onset in (2000, 4500, 6000):
        assert found.exhausted(Spike(onset, onset + 1, "wild")) is None
        go_back(found, rollback(onset))
    assert "5 rollbacks so far" in str(found.exhausted(Spike(9000, 9001, "wild")))


def test_the_learning_rate_is_lower_for_a_while(tmp_path: Path) -> None:
    found = ladder(tmp_path, *ASKED, "resilience.calm_lr_factor=0.5", "resilience.calm_steps=50")
    go_back(found, rollback(1000, to_step=800))
    factors = [found.lr_factor(step) for step in (799, 800, 1000, 1050, 1051)]
    assert factors == [1.0, 0.5, 0.5, 0.5, 1.0]


def test_the_state_goes_through_a_checkpoint_and_the_ledger_adds_to_it(tmp_path: Path) -> None:
    first, second = ladder(tmp_path), ladder(tmp_path)
    go_back(first, rollback(1000, 800))
    first.refused(1200, "wild")
    later = rollback(2000, 1800)
    second.load(first.state(), [rollback(1000, 800), later])
    assert second.rollbacks == [rollback(1000, 800), later]
    assert second.refused(1201, "wild") == Spike(1200, 1201, "wild")
    assert second.refused_in_a_row == 2


def test_from_the_seed_nothing_has_been_refused(tmp_path: Path) -> None:
    """The steps of the life that ended there are to come again."""
    recovery = Recovery(tiny(tmp_path, *ASKED), SOLO)
    for step in (13, 14):
        recovery.ladder.refused(step, "wild")
    recovery.load(None, [rollback(13)])
    assert recovery.ladder.refused(12, "wild") is None
    assert recovery.ladder.refused_in_a_row == 1


def test_a_step_that_is_applied_ends_a_row_of_refused_ones(tmp_path: Path) -> None:
    recovery = Recovery(tiny(tmp_path, *ASKED), SOLO)
    recovery.ladder.refused(13, "wild")
    recovery.applied(14, 2.0, 1.0)
    assert recovery.ladder.refused_in_a_row == 0


def test_the_newest_checkpoint_of_no_future_that_was_left(tmp_path: Path) -> None:
    """Back from step 1000 to 800, from 2000 to 1800 and to 1700, to snapshots; few checkpoints lie between.

    That of 1850 was committed last, by a run that was killed before it had removed the later one.
    """
    a, b, c = rollback(1000, 800), rollback(2000, 1800), rollback(2000, 1700)
    for step, known in ((700, []), (900, []), (1850, [a, b]), (1900, [a])):
        ladder = {"rollbacks": [each.to_json() for each in known]}
        meta = {"recovery": {"ladder": ladder}}
        save(*(tmp_path / "run/checkpoints", step, 0, lambda: owned(0, 1, 0), meta, SOLO, Retention(9)))
    ledgers, root = ([], [a], [a, b], [a, b, c]), tmp_path / "run/checkpoints"
    found = [newest(root, SOLO, ledger=each) for each in ledgers]
    assert [each.step for each in found if each] == [1900, 1900, 1850, 700]
    for n, path in ((3, root), (3, root.parent), (2, root)):  # `generate` and `export` take the same
        lines = [json.dumps({"event": "rollback", "step": 0} | each.to_json()) for each in ledgers[n]]
        (tmp_path / "run/ledger.jsonl").write_text("\n".join(lines) + "\n")
        assert open_checkpoint(path).step == (700 if n == 3 else 1850)
    assert open_checkpoint(root / "step_00001900").step == 1900  # unless they are given another
    (tmp_path / "run/ledger.jsonl").write_text(json.dumps({"event": "rollback"} | rollback(9).to_json()))
    with pytest.raises(CheckpointError, match="only checkpoints of a future .*, step_00001900 the newest"):
        open_checkpoint(root.parent)


def test_checkpoints_of_a_future_that_was_left_are_known_by_the_ledger() -> None:
    a, b = rollback(1000, 800), rollback(2000, 1800)
    assert abandoned_from([a, b], [a, b]) is None
    assert abandoned_from([a, b], [a]) == 1800
    assert abandoned_from([a, b], []) == 800


CALM = [(1.0, 2.0), (1.5, 2.5)]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ((CALM, CALM), Blame("data")),
        (([(math.nan, math.nan)], [(math.nan, math.nan)]), Blame("data")),
        (([(1.0, 2.0), (9.0, 2.5)], CALM, CALM), Blame("transient", (1,))),
        (([(1.0, 7.0), (1.5, 8.5)], CALM, CALM), Blame("transient", (0, 1))),
        (([(1.0, 7.0), (9.0, 8.5)], CALM, CALM), Blame("transient", (1,))),  # the norms follow from the loss
        (([(math.nan, 2.0), (1.5, 2.5)], CALM, CALM), Blame("transient", (0,))),
        ((CALM, [(1.0, 2.0), (9.0, 2.5)], CALM), Blame("transient", (1,))),
        ((CALM, [CALM[0], (7.0, 2.5)], [CALM[0], (5.0, 2.5)]), Blame("persistent", (1,))),
        (([(1.0, 2.0), (9.0, 2.5)], CALM, [(4.0, 2.0), (1.5, 2.5)]), Blame("persistent", (0,))),
    ],
)  # fmt: skip
def test_a_second_run_tells_data_from_hardware(
    runs: tuple[list[tuple[float, float]], ...], expected: Blame
) -> None:
    assert blame(*runs) == expected
