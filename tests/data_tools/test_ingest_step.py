"""The ingest step: what is planned, what is read, and the same bytes however it is run."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from data_tools.flow import Flow
from data_tools.ingest import STDLIB, IngestSettings, SourceSettings, plan, step
from data_tools.ingest.aside import AsideWriter
from data_tools.ingest.plan import divide, list_source
from megalite.errors import DataError

from .corpora import crew, files_of, rows_of


def ingest(out: Path, *sources: dict[str, Any], workers: int = 1, rank: int = 0, world: int = 1) -> Flow:
    settings = IngestSettings(sources=tuple(SourceSettings(**source) for source in sources))
    with crew(out, workers, rank, world) as hands:
        return step.run(settings, out, hands)


def aside_of(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted((out / "aside").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks and parts of a few kB."""
    monkeypatch.setattr(plan, "RANGE_BYTES", 4000)
    monkeypatch.setattr(plan, "GROUP_BYTES", 1000)
    monkeypatch.setattr(step, "PART_BYTES", 1500)
    monkeypatch.setattr(step, "BATCH_BYTES", 500)


@pytest.fixture
def mixed(tmp_path: Path) -> list[dict[str, Any]]:
    """Three sources with a bit of everything, good and bad."""
    web = tmp_path / "in" / "web"
    (web / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": f"line {n} " * (n % 13 + 1), "n": n}) for n in range(300)]
    lines[100] = "nonsense"
    (web / "big.jsonl").write_text("\n".join(lines))
    (web / "sub" / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:50]).encode(), mtime=0)[:-9])
    pq.write_table(pa.table({"text": ["a table's row"], "url": ["u"]}), web / "t.parquet")
    (web / "page.html").write_text("<title>T</title><main><p>words on a page</p></main>")
    (web / "note.md").write_text("# Note\n")
    (web / "image.png").write_bytes(b"\x89PNG\0\0")
    (web / "pack.zip").write_bytes(b"PK")
    (web / os.fsdecode(b"odd\xff.txt")).write_text("odd name")
    (web / ".hidden").write_text("hidden")
    (web / "out.txt").symlink_to("/etc/hostname")
    (web / "in.txt").symlink_to(web / "note.md")
    (web / "gone.txt").symlink_to(web / "nowhere")
    code = tmp_path / "in" / "code"
    (code / "node_modules").mkdir(parents=True)
    (code / "node_modules" / "theirs.js").write_text("x")
    (code / "main.py").write_text("print(1)\n")
    (code / "data.csv").write_text("1,2")
    (code / "jquery.min.js").write_text("x")
    (code / "Makefile").write_text("all:\n")
    (code / "old.c.gz").write_bytes(gzip.compress(b"int x;\n", mtime=0))
    return [{"name": "web", "path": str(web)}, {"name": "code", "path": str(code), "format": "code"}]


@pytest.mark.usefixtures("small")
def test_everything_is_read_or_accounted_for(tmp_path: Path, mixed: list[dict[str, Any]]) -> None:
    out = tmp_path / "out"
    flow = ingest(out, *mixed)
    rows = rows_of(out)
    by_id = {(row["source"], row["id"]): row for row in rows}
    assert len(by_id) == len(rows) == flow.totals()[1]
    assert by_id["web", "note.md"]["text"] == "# Note\n"
    assert by_id["web", "in.txt"]["text"] == "# Note\n"
    assert by_id["web", "odd\\xff.txt"]["text"] == "odd name"
    assert by_id["web", "page.html"]["meta"] == '{"title": "T"}'
    assert by_id["web", "t.parquet:1"]["meta"] == '{"url": "u"}'
    assert by_id["code", "main.py"]["meta"] == '{"language": "python", "path": "main.py"}'
    assert {row["id"] for row in rows if row["source"] == "code"} == {"main.py", "Makefile", "old.c.gz"}
    assert by_id["code", "old.c.gz"]["meta"] == '{"language": "c", "path": "old.c.gz"}'
    assert sum(row["id"].startswith("big.jsonl@") for row in rows) == 299
    assert [json.loads(row["meta"])["n"] for row in rows if row["id"].startswith("big.jsonl@")] == [
        n for n in range(300) if n != 100
    ]
    assert flow.dropped() == {
        "archive to unpack": 1,
        "binary file": 1,
        "cannot be read": 1,
        "damaged or cut off": 1,
        "link out of the source": 1,
        "malformed JSON": 1,
    }
    assert flow.counters == {
        "files that are not source code": 2,
        "folders of others' code": 1,
        "hidden files": 1,
    }
    aside = {item["place"]: item for item in aside_of(out)}
    assert sum(flow.dropped().values()) == len(aside)
    assert aside["image.png"]["head"] == "\\x89PNG\0\0"
    assert {(i["reason"], i["head"]) for i in aside.values() if i["place"].startswith("big.jsonl@")} == {
        ("malformed JSON", "nonsense\n")
    }
    assert str(tmp_path) not in json.dumps([rows, aside_of(out), flow.to_json()])
    assert len(list((out / "parts").iterdir())) > 10
    assert ingest(out, *mixed).to_json() == flow.to_json()
    (tmp_path / "in" / "web" / "note.md").write_text("# Changed")
    with pytest.raises(DataError, match="was made with"):
        ingest(out, *mixed)


def test_a_file_of_another_size_or_time_is_another_input(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    source = SourceSettings(name="s", path=str(path))

    def told(text: str, time: int) -> str:
        path.write_text(text)
        os.utime(path, ns=(time, time))
        return list_source(source).fingerprint(source)

    assert told("one", 5) == told("two", 5)
    assert len({told("one", 5), told("one", 6), told("three", 5)}) == 3


def test_a_batch_is_bounded_by_its_meta_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "BATCH_BYTES", 500)
    row = {"text": "x", "page": "p" * 200}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(row)] * 7))
    source = SourceSettings(name="s", path=str(tmp_path / "a.jsonl"))
    batches = step._batches(source, list_source(source).pieces, AsideWriter(tmp_path / "aside"), Flow())
    assert [batch.num_rows for batch in batches] == [3, 3, 1]


@pytest.mark.usefixtures("small")
def test_the_same_bytes_on_several_ranks(tmp_path: Path, mixed: list[dict[str, Any]]) -> None:
    ingest(tmp_path / "one", *mixed)
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(ingest, tmp_path / "two", *mixed, rank=rank, world=2) for rank in range(2)]
        assert ranks[0].result().to_json() == ranks[1].result().to_json()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_same_bytes_with_two_workers(tmp_path: Path, mixed: list[dict[str, Any]]) -> None:
    ingest(tmp_path / "one", *mixed)
    ingest(tmp_path / "two", *mixed, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


KILLED = """
import os, signal, sys
from pathlib import Path
from data_tools.crew import Crew
from data_tools.documents import PartWriter
from data_tools.ingest import IngestSettings, SourceSettings, plan, step
plan.RANGE_BYTES, plan.GROUP_BYTES, step.PART_BYTES, step.BATCH_BYTES = 4000, 1000, 1500, 500
out, path, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
leave = PartWriter.__exit__
def dies(self, *error):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return leave(self, *error)
PartWriter.__exit__ = dies
settings = IngestSettings(sources=[SourceSettings(name="web", path=path)])
with Crew(out, workers=1) as crew:
    step.run(settings, out, crew)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_same_bytes_after_a_kill(tmp_path: Path, mixed: list[dict[str, Any]]) -> None:
    ingest(tmp_path / "whole", mixed[0])
    killed = tmp_path / "killed"
    for writes in (3, 6):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, killed, mixed[0]["path"], str(writes)], check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert not (killed / "report.json").exists()
    ingest(killed, mixed[0])
    left = {name: data for name, data in files_of(killed).items() if not name.endswith(".tmp")}
    assert left == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("small")
def test_tasks_are_even_and_in_order(tmp_path: Path) -> None:
    for n, size in enumerate([10, 990, 1, 5000, 30, 9000]):
        (tmp_path / f"{n}.jsonl").write_bytes(b"\n" * size)
    (tmp_path / "5.jsonl.gz").write_bytes(b"\n" * 9000)
    pieces = list_source(SourceSettings(name="s", path=str(tmp_path))).pieces
    tasks = [[(piece.name[0], piece.start, piece.end) for piece in task] for task in divide(pieces)]
    assert sorted(item for task in tasks for item in task if item[2]) == [
        ("3", 0, 2500),
        ("3", 2500, 5000),
        ("5", 0, 3000),
        ("5", 3000, 6000),
        ("5", 6000, 9000),
    ]
    assert [("0", 0, None), ("1", 0, None)] in tasks
    assert [("5", 0, None)] in tasks


def test_files_are_chosen_by_pattern(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "sub/c.txt", "sub/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(**more: Any) -> list[str]:
        return [
            piece.name for piece in list_source(SourceSettings(name="s", path=str(tmp_path), **more)).pieces
        ]

    assert names() == ["a.txt", "b.md", "sub/c.txt", "sub/d.md"]
    assert names(include=("*.txt",)) == ["a.txt", "sub/c.txt"]
    assert names(include=("sub/*",), exclude=("*.md",)) == ["sub/c.txt"]


def test_links_are_followed_on_request(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("text")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x.txt").symlink_to(tmp_path / "blobs" / "x")
    source = {"name": "s", "path": str(tmp_path / "snapshot")}
    with pytest.raises(
        DataError, match=r"no text in source 's'.*1 link out of the source.*follow_links = true"
    ):
        ingest(tmp_path / "out", source)
    source["follow_links"] = True
    ingest(tmp_path / "out", source)
    assert [row["text"] for row in rows_of(tmp_path / "out")] == ["text"]


def test_links_to_folders_are_never_followed_and_it_is_said(tmp_path: Path) -> None:
    for folder in ("far", "in/sub"):
        (tmp_path / folder).mkdir(parents=True)
    for number, target in enumerate((tmp_path / "far", "sub", ".", tmp_path)):
        (tmp_path / "in" / f"link{number}").symlink_to(target)
    source = {"name": "s", "path": str(tmp_path / "in"), "follow_links": True}
    told = (
        r"has nothing to read \(4 link to a folder\); links to folders are not followed: name each folder as"
    )
    with pytest.raises(DataError, match=told):
        ingest(tmp_path / "out", source)
    (tmp_path / "in/sub/x.txt").write_text("x")
    flow = ingest(tmp_path / "out", source)
    assert flow.dropped() == {"link to a folder": 4}
    assert flow.totals()[1] == 1


def test_what_has_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "x.txt").write_text(" ")
    (tmp_path / "x.zip").write_bytes(b"PK")
    for path, why in (
        ("missing", "source 's': nothing at .*missing"),
        ("empty", "no text in source 's': .*empty is empty"),
        ("blank", "no text in source 's': .*blank has 1 empty; see .*aside"),
        ("x.zip", "x.zip is an archive; unpack it"),
    ):
        for _ in range(2):
            with pytest.raises(DataError, match=why):
                ingest(tmp_path / f"out-{path}", {"name": "s", "path": str(tmp_path / path)})
    assert not (tmp_path / "out-empty" / "step.json").exists()


LINES = b'{"text": "a line"}\n' * 50
TAR = gzip.compress(b"x" * 512, mtime=0)[:20]
CUT_OFF, ARCHIVE = "damaged or cut off", "archive to unpack"
# Content that breaks, by the name it is under; why it is set aside in a folder.
BROKEN = {
    "cut.jsonl.gz": (gzip.compress(LINES, mtime=0)[:15], CUT_OFF),
    "cut.jsonl.zst": (zstandard.compress(LINES)[:10], CUT_OFF),
    "plain.jsonl.gz": (LINES, CUT_OFF),  # of another format than its name says
    "plain.jsonl.zst": (LINES, CUT_OFF),
    "noise.txt.gz": (b"\x93noise", CUT_OFF),
    "noise.md.zst": (b"\x93noise", CUT_OFF),
    "noise.html.gz": (b"\x93noise", CUT_OFF),
    "noise.warc.gz": (b"\x93noise", CUT_OFF),
    "noise.py.zst": (b"\x93noise", CUT_OFF),
    "noise.parquet": (b"\x93noise" * 9, CUT_OFF),
    "noise.arrow": (b"\x93noise" * 9, CUT_OFF),
    "empty.parquet": (b"", CUT_OFF),
    "empty.jsonl": (b"", "empty"),
    "empty.jsonl.zst": (b"", "empty"),
    "empty.gz": (b"", "empty"),
    "cut.zip": (b"PK\3\4", ARCHIVE),
    "cut.tar": (b"x" * 9, ARCHIVE),
    "cut.tar.gz": (TAR, ARCHIVE),
    "cut.tgz": (TAR, ARCHIVE),
    "table.parquet.gz": (TAR, ARCHIVE),
    "pack.txt": (b"PK\3\4\0\0", "binary file"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_broken_file_is_named_wherever_it_stands(tmp_path: Path, name: str, place: int) -> None:
    content, reason = BROKEN[name]
    sources = []
    for number in range(3):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        (folder / "good.txt").write_text("text")
        sources.append({"name": f"s{number}", "path": str(folder)})
    bad = tmp_path / f"in{place}" / name
    bad.write_bytes(content)
    # In a folder it is set aside and counted, and all else is read.
    flow = ingest(tmp_path / "out", *sources)
    assert flow.sources[f"s{place}"]["dropped"] == {reason: {"documents": 1, "bytes": mock.ANY}}
    assert [counts["out_documents"] for counts in flow.sources.values()] == [1, 1, 1]
    (told,) = aside_of(tmp_path / "out")
    assert told["source"] == f"s{place}"
    assert told["place"].split(":")[0] == name
    # As a source of its own, or with nothing beside it, it is refused; an archive before any work.
    for alone in (bad, bad.parent):
        (bad.parent / "good.txt").unlink(missing_ok=True)
        sources[place]["path"] = str(alone)
        out = tmp_path / f"out-{alone.name}"
        with pytest.raises(DataError, match=rf"source 's{place}': .*{alone.name}"):
            ingest(out, *sources)
        assert out.joinpath("step.json").exists() == (reason != ARCHIVE)
        assert not (out / "report.json").exists()


def test_pages_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.html").write_text("<p>x")
    source = {"name": "s", "path": str(tmp_path / "x.html")}
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(DataError, match=r"pip install 'megalite\[trafilatura\]'"):
        ingest(tmp_path / "out", source | {"html_extractor": "trafilatura"})
    monkeypatch.setitem(sys.modules, "resiliparse", None)
    with pytest.raises(DataError, match=r"pip install 'megalite\[data\]'"):
        ingest(tmp_path / "out", source)


def test_pages_are_read_again_by_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("page.html", "<p>One page."), ("text.txt", "One text.")):
        (tmp_path / name).write_text(text)
    page, text_source = ({"name": name, "path": str(tmp_path / name)} for name in ("page.html", "text.txt"))
    ingest(tmp_path / "page", page)
    ingest(tmp_path / "text", text_source)
    monkeypatch.setattr("data_tools.ingest.html.version", lambda _: "0.0")
    ingest(tmp_path / "text", text_source)
    with pytest.raises(DataError, match=r"was made with inputs=.*resiliparse .*, not .*resiliparse 0\.0"):
        ingest(tmp_path / "page", page)


@pytest.mark.slow
def test_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = list_source(SourceSettings(name="py", path=STDLIB))
    chosen = [piece for piece in listing.pieces if piece.name in ("topics", "json/decoder.py")]
    monkeypatch.setattr(step, "list_source", lambda _: plan.Listing(chosen))
    ingest(tmp_path / "out", {"name": "py", "path": STDLIB})
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert rows["json/decoder.py#docstrings"]["text"].startswith("Implementation of JSONDecoder")
    assert rows["json/decoder.py"]["text"].startswith('"""Implementation of JSONDecoder')
    assert "topics/lambda" in rows


def test_settings_that_contradict_themselves() -> None:
    with pytest.raises(ValidationError, match="two sources are named 'a'"):
        IngestSettings(sources=(SourceSettings(name="a", path="x"), SourceSettings(name="a", path="y")))
    with pytest.raises(ValidationError, match="both 'x'"):
        SourceSettings(name="a", path="x", text_field="x", id_field="x")
