"""A step's folder says how it was made, is made again only when asked, and accounts for every document."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from data_tools.crew import Crew, Place, Task
from data_tools.documents import read_part
from data_tools.flow import KEPT, Flow
from data_tools.step import Step, read_report, step_parts
from megalite.config.section import Section
from megalite.errors import DataError
from tests.data_tools.corpora import files_of, texts_of, write_step

PARTS = [[("a", "x", "one"), ("b", "y", "three")], [("c", "x", "seven"), ("d", "x", "")]]


class Limits(Section):
    """Of the step below."""

    most: int = 4


def keep_short(most: int, path: Path, flow: Flow) -> Iterator[pa.RecordBatch]:
    """Documents of at most so many bytes."""
    for batch in read_part(path):
        long = pc.greater(pc.binary_length(batch.column("text")), most).to_numpy(zero_copy_only=False)
        flow.pass_batch(batch, long.astype(int) + KEPT, ["long"], why=["too long"] * batch.num_rows)
        yield batch.filter(pa.array(~long))


def run(source: Path, out: Path, most: int = 4, *, renew: bool = False, place: Place | None = None) -> Flow:
    """A whole step."""
    with Crew(out, 1, place) as crew:
        settings = Limits(most=most)
        step = Step(out, "short", 1, settings, [source], crew, renew=renew)
        if step.is_finished:
            return Flow.from_json(read_report(out))
        return step.finish(step.map_parts(step_parts(source), partial(keep_short, most)), limit=most)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four documents of two sources in two parts."""
    return write_step(tmp_path / "in", PARTS)


def test_a_step_hands_on_what_it_kept_and_counts_the_rest(tmp_path: Path, source: Path) -> None:
    flow = run(source, tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one", ""]
    assert flow.totals() == (4, 2, 13, 3)
    report = read_report(tmp_path / "out")
    assert report["limit"] == 4
    assert report["sources"]["x"] == {
        "in_documents": 3,
        "in_bytes": 8,
        "out_documents": 2,
        "out_bytes": 3,
        "dropped": {"long": {"documents": 1, "bytes": 5}},
    }
    assert report["examples"]["long"] == [
        {"source": "y", "id": "b", "text": "three", "why": "too long"},
        {"source": "x", "id": "c", "text": "seven", "why": "too long"},
    ]


def test_a_finished_step_is_left_alone_and_one_made_otherwise_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/parts")
    run(source, tmp_path / "out")
    assert not (tmp_path / "out/parts").exists()  # nothing was done
    with pytest.raises(DataError, match=r"out was made with settings\.most=4, not 5; name another folder"):
        run(source, tmp_path / "out", 5)
    run(source, tmp_path / "out", 5, renew=True)
    assert "short: made again, was made with settings.most=4, not 5" in capsys.readouterr().err
    assert texts_of(tmp_path / "out") == ["one", "three", "seven", ""]
    run(source, tmp_path / "out", 4, renew=True)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("last", ["data", "done", "parts"])
def test_what_a_killed_removal_left_is_not_taken_for_the_step_it_was(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    run(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out/data").mkdir()
    (tmp_path / "out/data/half").touch()
    remove = shutil.rmtree

    def remove_and_die(path: Path) -> None:
        if path.name == last:
            raise InterruptedError
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(shutil, "rmtree", remove_and_die)
        run(source, tmp_path / "out", 5, renew=True)
    run(source, tmp_path / "out", renew=True)  # as it was before
    assert files_of(tmp_path / "out") == before


def test_another_input_makes_another_step(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    run(source, tmp_path / "short", 3)
    run(tmp_path / "short", tmp_path / "out2", 4)
    with pytest.raises(DataError, match="was made with inputs="):
        run(source, tmp_path / "out2", 4)


def test_a_fingerprint_that_is_not_that_of_its_file_is_told(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    path = tmp_path / "out/step.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(DataError, match=r"another fingerprint than its step\.json gives"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("which", ["part-000000.parquet", "part-000001.parquet", "*"])
def test_parts_that_are_gone_are_no_empty_corpus(tmp_path: Path, source: Path, which: str) -> None:
    run(source, tmp_path / "out")
    for path in (source / "parts").glob(which):
        path.unlink()
    left = 0 if which == "*" else 1
    message = rf"in/parts has {left} of 2 parts; remove .* makes it again"
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "out", 5, renew=True)
    assert texts_of(tmp_path / "out") == ["one", ""]  # what is there is not given up for what cannot be made
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "new")


def test_a_step_without_documents_hands_on_none(tmp_path: Path) -> None:
    assert step_parts(write_step(tmp_path / "in", [])) == []


def test_the_leftovers_of_kills_go(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / "report.json").unlink()
    (out / "tokenizer.tmp/deeper.tmp").mkdir(parents=True)
    (out / "parts/part-000000.parquet.17.tmp").write_text("half")
    run(source, out)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_time_and_memory_of_workers_is_told(tmp_path: Path, workers: int) -> None:
    began = time.process_time()
    with Crew(tmp_path, workers) as crew:
        step = Step(tmp_path / "out", "busy", 1, Limits(), [], crew)
        step.run("work", [Task(f"t{n}", work_for_a_while) for n in range(2)])
        step.finish([])
    timing = json.loads((tmp_path / "out/timing.json").read_text())
    assert timing["cpu_s"] >= 0.4
    assert timing["cpu_s"] - (time.process_time() - began) <= (0.0 if workers == 1 else timing["wall_s"] * 2)
    assert 20 << 20 < timing["peak_process_bytes"] < 100 << 30


def work_for_a_while() -> dict[str, int]:
    """A task that takes 0.2 seconds of a processor."""
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    return {}


def test_an_unfinished_input_is_refused(tmp_path: Path, source: Path) -> None:
    (source / "report.json").unlink()
    with pytest.raises(DataError, match=r"in is not a finished step \(no report\.json\)"):
        run(source, tmp_path / "out")


def test_what_no_step_made_is_not_touched(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="out is in the way, no step made it"):
        run(source, tmp_path / "out", renew=True)
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("gone", ["report.json", "done/parts/part-000001.json", "parts/part-000001.parquet"])
def test_a_step_goes_on_where_it_stopped_to_the_same_bytes(tmp_path: Path, source: Path, gone: str) -> None:
    run(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out/report.json").unlink()
    if gone != "report.json":
        (tmp_path / "out/done/parts/part-000001.json").unlink()
        (tmp_path / "out" / gone).unlink(missing_ok=True)
    run(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_a_part_that_is_gone_before_the_step_is_finished_is_missed(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    for name in ("report.json", "parts/part-000001.parquet"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(DataError, match=r"part-000001\.parquet is gone, though it was made; remove"):
        run(source, tmp_path / "out")


def test_a_document_that_vanished_is_a_bug_and_said_so() -> None:
    flow = Flow()
    flow.sources = {
        "s": {"in_documents": 2, "in_bytes": 9, "out_documents": 1, "out_bytes": 9, "dropped": {}}
    }
    with pytest.raises(
        DataError, match=r"short: 2 documents of s came in, but 1 went out and 0 were dropped"
    ):
        flow.check("short")
