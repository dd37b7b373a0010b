"""kill -9 at every line of a rollback, from the decision to the step after it, on one of two ranks.

Whatever had been done by then, the run that is started again is bit for bit the one that was not killed,
which is one that never had the batches. The lines are those of the decision, the ledger, the way back and the
step after it; where checkpoints are read, `test_kills` kills.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from megalite import log, recovery, trainer
from megalite.checkpoint import snapshots, writer
from megalite.config import Config
from megalite.data import loader
from megalite.engines import native
from megalite.errors import PreemptedError
from megalite.parallel.mesh import Mesh
from megalite.resilience import ladder
from megalite.resilience.preempt import PreemptionFlag
from megalite.run_folder import LOCK
from tests.faults.kills import OnEachLine, Point, Recorded, dies_at, meet, one_rank_each
from tests.ranks import join_ranks, run_ranks, spawn_ranks
from tests.trainer.poison import poison, rollbacks, run
from tests.trainer.runs import lay_out, tiny, write_dataset

BAD = range(8, 16)  # what the steps 3 and 4 read: the first is left out, the second makes it a spike
DETECTED = 4
FILES = tuple(str(m.__file__) for m in (trainer, recovery, ladder, log, writer, snapshots, native, loader))
FOR_PEOPLE = ("flight/", "hangs/", LOCK)  # the lock says who had it
PASSING = re.compile(rb'"(crc32|unix_s|tokens_per_s|goodput|step_s|data_wait_s)": ?"?[0-9a-f.-]+')
TOGETHER = 6  # runs that are killed at once, for their survivors wait


@dataclass(frozen=True)
class Act:
    """What a run goes back to, and the step it begins at when it is going to be killed."""

    snapshot_every_steps: int
    begins_at: int


# Back to a snapshot with newer ones in memory, or to a checkpoint with newer ones beside it. A run that is
# started again finds checkpoints alone.
ACTS = {"memory": Act(2, 1), "disk": Act(0, 3)}


def short(root: Path, act: str, name: str) -> Config:
    """A run of 6 steps, of which the 3rd and 4th are bad; it goes back to the second."""
    keys = ["train.steps=6", "train.global_batch_size=4", "train.micro_batch_size=2", "data.validation=[]"]
    keys += ["resilience.rewind_steps=0", "resilience.skip_steps=2", "resilience.rerun_steps=false"]
    keys += [f"checkpoint.snapshot_every_steps={ACTS[act].snapshot_every_steps}", "checkpoint.keep_last=9"]
    keys += ["checkpoint.every_steps=1", "model.num_layers=1"]
    return tiny(root, *keys, f"run_dir={root}/{name}")


def begin(mesh: Mesh, config: Config, step: int) -> None:
    """Train on poisoned data, and be asked to stop at this step."""
    begun, flag = trainer.Trainer(config, lay_out(mesh, config)), PreemptionFlag()
    poison(begun, BAD, "nan")
    train_step = begun.train_step
    begun.train_step = lambda batches, lr, _: train_step(batches, lr, begun.step == step - 1)  # type: ignore
    with suppress(PreemptedError):
        begun.fit(flag)


def go_back(mesh: Mesh, config: Config, lines: OnEachLine) -> None:
    """Go on with it, with `lines` entered from the decision to go back until the next step is done."""
    begun = trainer.Trainer(config, lay_out(mesh, config))
    poison(begun, BAD, "nan")
    review, reviewed = begun._review, []

    def watched(report: Any) -> Any:
        if begun.step == DETECTED and not reviewed:
            reviewed.append(lines.__enter__())
        elif reviewed:
            lines.__exit__()
        return review(report)

    begun._review = watched  # type: ignore[method-assign]
    begun.fit(PreemptionFlag())


def recorded(mesh: Mesh, config: Config) -> list[Point]:
    """The lines that ran on this rank."""
    lines = Recorded(FILES)
    go_back(mesh, config, lines)
    return lines.points


def go_back_and_die(config: Config, rank: int, at: Point) -> None:
    """On two ranks, of which `rank` is killed just before the given line."""
    mesh = meet()
    sys.stderr = StringIO()  # the survivor's traceback is expected
    go_back(mesh, config, dies_at(FILES, at) if mesh.rank == rank else OnEachLine((), lambda point: None))


class Rollbacks:
    """Runs of one act beside the one that was not killed, which is compared with the oracle first."""

    def __init__(self, root: Path, act: str) -> None:
        write_dataset(root / "train", seed=1, documents=40)
        self.root, self.act = root, act
        run_ranks(begin, 2, short(root, act, "begun"), ACTS[act].begins_at)
        self.points = run_ranks(recorded, 2, self.begun("recorded"))
        self.ledger = rollbacks(root / "recorded")
        assert [(r.detected, r.to_step, r.skipped) for r in self.ledger] == [(DETECTED, 2, (8, 16))]
        self.expected = run_ranks(run, 2, self.begun("whole"), [BAD], "nan", [])
        oracle = run_ranks(run, 2, short(root, act, "oracle"), [], "", [self.ledger[0].skipped])
        assert self.expected == oracle
        self._continued: set[str] = set()

    def begun(self, name: str) -> Config:
        """A run of its own that has come as far as this act begins at."""
        shutil.copytree(self.root / "begun", self.root / name)
        return short(self.root, self.act, name)

    def kill_at(self, cases: Sequence[tuple[Point, int]]) -> set[int]:
        """Kill a run at each point, start it again; how many rollbacks the ledgers had at their deaths."""
        found = set()
        for first in range(0, len(cases), TOGETHER):
            killed = []
            for number, (at, rank) in enumerate(cases[first : first + TOGETHER], first):
                config = self.begun(f"killed-{number}")
                killed.append((at, rank, config, spawn_ranks(go_back_and_die, 2, config, rank, at)))
            for at, rank, config, ranks in killed:
                assert join_ranks(ranks)[rank] == -signal.SIGKILL, f"rank {rank} never came to {at}"
                found.add(len(rollbacks(Path(config.run_dir))))
                self._continue(config, f"rank {rank} was killed at {at}")
        return found

    def _continue(self, config: Config, case: str) -> None:
        """Start it again, if none has been that left the same files."""
        run_dir = Path(config.run_dir)
        left = files_left(run_dir)
        if left not in self._continued:
            self._continued.add(left)
            assert run_ranks(run, 2, config, [BAD], "nan", []) == self.expected, case
            assert rollbacks(run_dir) == self.ledger, case
        shutil.rmtree(run_dir)


def files_left(run_dir: Path) -> str:
    """A digest of all that a run started again may read: its files, without the times and the run's name."""
    digest = hashlib.sha256()
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if path.is_file() and not name.startswith(FOR_PEOPLE):
            content = PASSING.sub(b"", path.read_bytes().replace(run_dir.name.encode(), b""))
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_kill_at_some_lines_of_a_rollback(act: str, tmp_path: Path) -> None:
    runs = Rollbacks(tmp_path, act)
    cases = one_rank_each(runs.points)
    found, loaded = (
        min(case for case in cases if case[0][:2] > (recovery.__file__, method.__code__.co_firstlineno))
        for method in (recovery.Recovery.target, recovery.Recovery.load)
    )  # before the ledger has its line, and after
    assert runs.kill_at([found, loaded, *cases[:: len(cases) // 4]]) == {0, 1}


@pytest.mark.slow
def test_kill_at_every_line_of_a_rollback(tmp_path: Path) -> None:
    """A line that ran in both acts or on both ranks is met in one of them, by turns."""
    acts = [Rollbacks(tmp_path / act, act) for act in ACTS]
    cases = one_rank_each([points for act in acts for points in act.points])
    assert len(cases) >= 250  # a tracer that went blind must not pass
    for number, act in enumerate(acts):
        assert act.kill_at([(at, place % 2) for at, place in cases if place // 2 == number]) == {0, 1}
