"""Tasks are done once, by any number of processes and ranks, whatever dies; and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_tools import crew as crew_module
from data_tools.crew import Crew, Place, Task, place_from_environment, read_marker
from megalite import progress as progress_module
from megalite.errors import BusyError, DataError


def note(folder: Path, name: str) -> dict[str, Any]:
    """A task that leaves a line each time it is done."""
    with (folder / name).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return {"name": name}


def fail(folder: Path, name: str) -> dict[str, Any]:
    """A task with a mistake in its input."""
    raise DataError(f"{name} is broken")


def die(folder: Path, name: str) -> dict[str, Any]:
    """A task whose process is killed, as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def tasks(folder: Path, count: int = 5, bad: int | None = None, how: Any = fail) -> list[Task]:
    """Tasks that note what they did, one of them bad."""
    folder.mkdir(exist_ok=True)
    return [Task(f"t{n}", partial(how if n == bad else note, folder, f"t{n}")) for n in range(count)]


def done(folder: Path) -> dict[str, int]:
    """How often each task was done."""
    return {path.name: len(path.read_text().splitlines()) for path in sorted(folder.iterdir())}


def run_ranks(root: Path, world: int, bad: int | None = None) -> list[Any]:
    """The same phase on several ranks, each a thread; what each returned or raised."""
    outcomes: list[Any] = [None] * world

    def rank(number: int) -> None:
        try:
            with Crew(root, 1, Place(number, world)) as crew:
                outcomes[number] = crew.run(root / "phase", tasks(root / "out", 5, bad), "test")
        except DataError as error:
            outcomes[number] = str(error)

    root.mkdir(exist_ok=True)
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return outcomes


def test_processes_do_every_task_once_and_results_keep_the_order(tmp_path: Path) -> None:
    with Crew(tmp_path, 2) as crew:
        for _ in range(2):
            results = crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "test")
            assert [result["name"] for result in results] == ["t0", "t1", "t2", "t3", "t4"]
    assert set(done(tmp_path / "out").values()) == {1}
    workers = {path.read_text().strip() for path in (tmp_path / "out").iterdir()}
    assert str(os.getpid()) not in workers


def test_a_killed_worker_is_named_and_its_task_done_by_the_next_run(tmp_path: Path) -> None:
    with (
        Crew(tmp_path, 2) as crew,
        pytest.raises(DataError, match=r"worker process died .*t3.*run the command"),
    ):
        crew.run(tmp_path / "phase", tasks(tmp_path / "out", 5, 3, die), "test")
    with Crew(tmp_path, 1) as crew:
        crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "test")
    found = done(tmp_path / "out")
    assert sorted(found) == ["t0", "t1", "t2", "t3", "t4"]
    for name in ("t0", "t1", "t2"):  # one may have been under way when the pool broke
        assert found[name] <= 2


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    (tmp_path / "phase").mkdir()
    (tmp_path / "phase/t1.json").write_text('{"na')
    with Crew(tmp_path, 1) as crew, pytest.raises(DataError, match=r"t1\.json is damaged .* remove it"):
        crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "test")


def test_ranks_share_the_tasks_and_get_the_same_results(tmp_path: Path) -> None:
    first, second, third = run_ranks(tmp_path / "a", 3)
    assert first == second == third
    assert [result["name"] for result in first] == ["t0", "t1", "t2", "t3", "t4"]
    assert done(tmp_path / "a/out") == {f"t{n}": 1 for n in range(5)}


def test_the_other_ranks_hear_of_a_failure_and_a_new_start_forgets_it(tmp_path: Path) -> None:
    outcomes = run_ranks(tmp_path, 2, bad=3)
    assert outcomes == ["rank 1 failed: t3 is broken", "t3 is broken"]
    first, second = run_ranks(tmp_path, 2)
    assert first == second
    assert len(first) == 5


@pytest.mark.parametrize("world", [1, 2])
def test_two_processes_do_not_work_in_one_place(tmp_path: Path, world: int) -> None:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            with Crew(tmp_path, 1, Place(0, world)) as crew:
                crew.hold()
                os.write(writing, b"x")
                time.sleep(60)
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    before = {path.name for path in (tmp_path / "ranks").iterdir()}
    try:
        for _ in range(2):
            with (
                pytest.raises(BusyError, match=rf"{tmp_path} is in use by process {child} on .*; wait until"),
                Crew(tmp_path, 1, Place(0, world)) as crew,
            ):
                crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "test")
        assert done(tmp_path / "out" if world == 1 else tmp_path / "ranks").keys() <= before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with Crew(tmp_path, 1, Place(0, 1)) as crew:  # the dead hold nothing
        assert len(crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "test")) == 5


def test_a_rank_that_fell_silent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "SILENT_S", 0.5)
    with Crew(tmp_path, 1, Place(0, 2)) as crew:
        time.sleep(0.02)
        alive = tmp_path / "ranks/00001-alive.json"
        alive.write_text("{}\n")
        with pytest.raises(DataError, match=r"rank 1 has not been heard of .* start the command again"):
            crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "test")
    assert read_marker(tmp_path / "phase", "t4") is not None


def test_a_rank_is_seen_again_after_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "PRESENCE_EVERY_S", 0.01)
    with Crew(tmp_path, 1, Place(0, 2)):
        (tmp_path / "ranks").rename(tmp_path / "gone")
        time.sleep(0.1)
        (tmp_path / "gone/00000-alive.json").unlink()
        (tmp_path / "gone").rename(tmp_path / "ranks")
        until = time.monotonic() + 10
        while not (tmp_path / "ranks/00000-alive.json").exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / "ranks/00000-alive.json").exists()


@pytest.mark.slow
def test_waiting_names_who_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crew_module, "TELL_EVERY_S", 0.2)
    late = threading.Timer(1.0, lambda: run_rank(tmp_path, 1))
    late.start()
    with Crew(tmp_path, 1, Place(0, 2)) as crew:
        assert len(crew.run(tmp_path / "phase", tasks(tmp_path / "out"), "minhash")) == 5
    late.join()
    assert "minhash: waiting for 2 of 5 parts, of rank 1" in capsys.readouterr().err


def run_rank(root: Path, rank: int) -> None:
    """One rank of two."""
    with Crew(root, 1, Place(rank, 2)) as crew:
        crew.run(root / "phase", tasks(root / "out"), "minhash")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"},
            Place(2, 4),
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Place(1, 2)),
    ],
)
def test_launchers_say_who_we_are(environ: dict[str, str], place: Place) -> None:
    assert place_from_environment(environ) == place


def test_ranks_of_one_machine_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert Crew(tmp_path).workers == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Crew(tmp_path).workers == 2
    assert Crew(tmp_path, 5).workers == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert Crew(tmp_path).workers == 1


def test_progress_is_of_bytes_or_of_tasks_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "QUIET_S", -1.0)
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    mine = tasks(tmp_path / "out", 2)
    with Crew(tmp_path, 1) as crew:
        crew.run(tmp_path / "counted", mine, "buckets")
        sized = [Task(task.name, task.run, (number + 1) << 20) for number, task in enumerate(mine)]
        crew.run(tmp_path / "sized", sized, "parts")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "buckets: 1 of 2 tasks",
        "buckets: 2 of 2 tasks",
        "parts: 1.0 of 3.0 MiB",
        "parts: 3.0 of 3.0 MiB",
    ]


@pytest.mark.parametrize("rank", ["4", "-1", "x"])
def test_an_impossible_place_is_refused(rank: str) -> None:
    array = {"MIN": "3", "MAX": "7", "COUNT": "2"}
    gaps = {f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()} | {"SLURM_ARRAY_TASK_ID": "3"}
    with pytest.raises(DataError, match=r"array of 2 tasks from 3 to 7 has gaps; .* --array=0-1"):
        place_from_environment(gaps)
    assert place_from_environment(gaps | {"SLURM_ARRAY_TASK_MAX": "4"}) == Place(0, 2)
    with pytest.raises(DataError, match=f"RANK='{rank}' with WORLD_SIZE='4'"):
        place_from_environment({"RANK": rank, "WORLD_SIZE": "4"})
