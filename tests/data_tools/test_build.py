"""The whole recipe: the same bytes on any ranks and after any kill, and mistakes told beforehand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_tools.build import build
from data_tools.recipe import Recipe, load_recipe
from data_tools.step import read_report
from data_tools.steps import STEPS, find_step
from megalite.cli import main
from megalite.config_file import load_toml, to_toml
from megalite.data.shards import Dataset
from megalite.errors import ConfigError, DataError
from tests import early
from tests.data_tools.builds import recipe, write_corpus
from tests.data_tools.corpora import crew

ROOT = Path(__file__).parents[2]


_builds: dict[str, Future[early.Done]] = {}


def begin_early(items: Sequence[pytest.Function]) -> None:
    """Both long looks, if they were asked for."""
    asked = {item.name for item in items}
    for name, what in (
        ("test_ranks_make_the_same_bytes_as_one_process", ["ranks"]),
        ("test_killed_anywhere_and_built_again_it_is_the_same", ["kills", "149"]),
    ):
        if name in asked:
            folder = Path(tempfile.mkdtemp(prefix="megalite-builds-"))
            _builds[name] = early.begin(
                [sys.executable, "-m", "tests.data_tools.builds", folder / "work", *what]
            )
            _builds[name].add_done_callback(partial(_clear, folder))


def _clear(folder: Path, _: object) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def found_by(name: str) -> dict[str, Any]:
    """What `tests.data_tools.builds` found."""
    done = _builds[name].result()
    assert done.returncode == 0, done.stdout[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_ranks_make_the_same_bytes_as_one_process(request: pytest.FixtureRequest) -> None:
    assert found_by(request.node.name)["wrong"] == {"2": [], "4": []}


@pytest.mark.slow
def test_killed_anywhere_and_built_again_it_is_the_same(request: pytest.FixtureRequest) -> None:
    found = found_by(request.node.name)
    assert found["acts"] > 500  # that the acts are still seen
    assert found["wrong"] == {}


@pytest.mark.slow
def test_every_document_is_accounted_for_and_the_shards_are_read(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    out = tmp_path / "out"
    with crew(out) as work:
        page = build(recipe(tmp_path / "text", out), work)
        assert page.exists()
        with pytest.raises(DataError, match=r"no step 'taste'; it has ingest, clean, filter"):
            build(recipe(tmp_path / "text", out), work, until="taste")
    dropped = {}
    for step in ("ingest", "filter", "exact", "near", "spans", "decontaminate"):
        report = read_report(out / step)
        for counts in report["sources"].values():
            for reason, number in counts["dropped"].items():
                dropped[f"{step} {reason}"] = number["documents"]
    assert dropped == {
        "ingest malformed JSON": 1,
        "filter gopher_words": 1,
        "exact exact duplicate": 1,
        "near near duplicate": 1,
        "spans too few words left": 1,
        "decontaminate contaminated": 1,
    }
    groups = read_report(out / "tokenize")["groups"]
    assert sum(group[half]["documents"] for group in groups.values() for half in ("train", "valid")) == 50
    assert Dataset(out / "tokenize/data/web.q0/train").num_documents > 0
    assert "data.mixture" in (out / "mix/data.toml").read_text()


def test_a_changed_threshold_reads_the_statistics_again_and_measures_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    out = tmp_path / "out"
    first = recipe(tmp_path / "text", out)
    with crew(out) as work:
        build(first, work, until="filter")
        (out / "report.html.1.tmp").touch()  # of a kill
        before = (out / "clean/report.json").stat().st_mtime_ns, (out / "filter/report.json").read_text()
        assert first.filter is not None
        lower = first.filter.model_copy(update={"thresholds": {"gopher_words": (150.0, 1000.0)}})
        build(first.model_copy(update={"filter": lower}), work, until="filter")
    assert (out / "clean/report.json").stat().st_mtime_ns == before[0]
    assert (out / "filter/report.json").read_text() != before[1]
    assert not list(out.glob("*.tmp"))


def write_recipe(path: Path, more: str) -> Path:
    """A recipe file of one source with more in it."""
    path.write_text(f'out = "out"\n[ingest]\nsources = [{{name = "web", path = "web.jsonl"}}]\n{more}\n')
    return path


def test_a_step_by_itself_is_that_of_a_recipe() -> None:
    for name in STEPS:
        section, run = find_step(name)
        assert run.__name__ == "run"
        assert section in (kind := Recipe.model_fields[name].annotation, *getattr(kind, "__args__", ()))


def test_a_dry_run_prints_what_a_recipe_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path / "r.toml", "[exact]\n[near]\n[tokenize]\n")
    assert main(["data", "build", str(path), "--dry-run", "--until", "near"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("# steps: ingest, exact, near\n")
    (tmp_path / "again.toml").write_text(told)
    assert load_recipe(tmp_path / "again.toml", []) == load_recipe(path, [])
    assert main(["data", "build", str(path), "--dry-run", "--until", "spans"]) == 2
    assert "no step 'spans'; it has ingest, exact, near, tokenize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tokenize in --to out --vocab-size 300", "--vocab-size goes with --text; of a step say KEY=VALUE"),
        ("tokenize in --to out --max-mib 1", "--max-mib goes with --text"),
        ("tokenize --text in --to out --recipe r.toml", "--recipe goes with a step's folder, not --text"),
        ("tokenize --text in --to out --workers 2", "--workers goes with a step's folder"),
        ("tokenize --text in --to out vocab_size=9", "give either the folder of a step, or text"),
        ("tokenize --text in --to out --tokenizer byte --vocab-size 9", "--vocab-size is of --tokenizer bpe"),
        ("filter in --preview --to out", "--to does nothing with --preview"),
        ("filter in --preview --workers 2", "--workers does nothing with --preview"),
        ("show in --rows 2", "--rows is of rows; give --seq-len"),
        ("show in --start 0", "--start is of rows; give --seq-len"),
        ("show in --seq-len 9 --tokens 3", "--tokens is of documents; leave --seq-len out"),
        ("dedup near a.txt --to out", "a.txt is a file, not a step's folder"),
    ],
)
def test_what_would_do_nothing_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a text")
    (tmp_path / "a.txt").write_text("a text")
    assert main(["data", *command.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["ingest", "dedup exact"])
def test_a_step_by_itself_does_not_load_the_others(step: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text\n")
    assert main(["data", "ingest", str(tmp_path / "a.txt"), "--to", str(tmp_path / "in")]) == 0
    source = tmp_path / ("a.txt" if step == "ingest" else "in")
    command = ["data", *step.split(), str(source), "--to", str(tmp_path / "out"), "--workers", "1"]
    program = (
        "import sys\nfrom megalite.cli import main\n"
        f"assert main({command!r}) == 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith(('data_tools.', 'numba'))))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = set(loaded.stdout.splitlines()[-1].split())
    assert ("numba" in names) == (step != "ingest")
    assert not {"data_tools.clean", "data_tools.mix.search", "data_tools.tokenize_parts"} & names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[neer]", r"unknown key neer; did you mean near\?"),
        ("[near]\ntreshold = 0.7", r"unknown key near\.treshold; did you mean near\.threshold\? \(.*:5\)"),
        ("[near]\nthreshold = 7", r"near\.threshold=7: should be less than or equal to 1"),
        ("[clean.pii]\nemial = false", r"unknown key clean\.pii\.emial; did you mean clean\.pii\.email\?"),
        (
            "[clean]\n[filter.thresholds]\ngopher_wrods = [1, 2]",
            r"gopher_wrods'; did you mean 'gopher_words'",
        ),
        ("[filter]", r"filter: .*add a \[clean\] table"),
        (
            '[clean]\n[near]\nkeep = "best"\nbest_column = "quality"',
            r"\[clean\] has no column of numbers 'quality'; there are 46, such as [^,]+(, [^,]+){4} \(",
        ),
        (
            '[clean]\n[filter]\nkeep_statistics = false\n[buckets]\nby = "gopher_words"',
            r"buckets\.by: \[clean\] has no column of numbers 'gopher_words'",
        ),
        ('[buckets]\nby = "quality"', r"buckets\.by: a corpus without \[clean\] has no column"),
        (
            "[tokenize]\n[mix.weights]\nweb = 1\nbooks = 2",
            r"mix\.weights names 'books', which is no source; there (is|are) web",
        ),
        ("[tokenize]\n[search.target]\nwep = 1", r"search\.target names 'wep'.*web"),
        ("[tokenize]\n[mix.curriculum]", r"mix\.curriculum orders buckets; add a \[buckets\] table"),
        ("[spans]\nmin_words = 0", r"spans\.min_words=0: should be greater than or equal to 1"),
        ("[tokenize]\neos_token = '</s>'", r"eos_token='</s>' is of a tokenizer's file"),
        ("[mix]", r"mix: there is nothing to mix without shards; add a \[tokenize\] table"),
    ],
)
def test_a_misspelt_recipe_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    path = write_recipe(tmp_path / "recipe.toml", more)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)
    assert main(["data", "build", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[tokenize]\ntokenizer = "gone.json"', r"gone\.json"),
        ('[decontaminate]\nfiles = [{path = "gone.jsonl", fields = ["a"]}]', r"evaluation file gone\.jsonl"),
        (
            '[decontaminate]\nfiles = [{path = "exam.jsonl", fields = ["a"]}]',
            r"exam\.jsonl:1 has no text",
        ),
        ('[clean.quality]\nmodel = "gone.bin"\nlabel = "good"', r"gone\.bin|fasttext"),
        ("[tokenize]", r"needs the tokenizers package"),
    ],
)
def test_what_a_later_step_needs_is_missed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_recipe(tmp_path / "recipe.toml", more)
    (tmp_path / "web.jsonl").write_text('{"text": "One."}\n')
    (tmp_path / "exam.jsonl").write_text('{"b": "One."}\n')
    with crew(tmp_path / "out") as work, pytest.raises(DataError, match=message):
        build(load_recipe(tmp_path / "recipe.toml"), work)
    assert not (tmp_path / "out/ingest").exists()


@pytest.mark.parametrize(
    ("path", "more", "is_refused"),
    [
        (".", {}, True),
        ("..", {}, True),
        ("out", {}, True),
        (".", {"format": "code"}, True),
        (".", {"include": ["*.txt"]}, False),
        (".", {"exclude": ["out/*"]}, False),
        ("other", {}, False),
        ("out-of-it", {}, False),
    ],
)
def test_a_corpus_does_not_read_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, more: dict[str, Any], is_refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"out": "out", "ingest": {"sources": [{"name": "all", "path": path, **more}]}}
    (tmp_path / "link").symlink_to(tmp_path)
    for out in ("out", "link/out", str(tmp_path / "out")):
        if is_refused:
            with pytest.raises(
                ValidationError, match=r"source 'all': .* holds .*out, so that what is written"
            ):
                Recipe.model_validate(values | {"out": out})
        else:
            Recipe.model_validate(values | {"out": out})
    if path == ".":
        Recipe.model_validate(values | {"out": ".work/out"})  # hidden folders are not read


def test_a_recipe_is_printed_as_it_is_read(tmp_path: Path) -> None:
    found = load_recipe(ROOT / "configs/corpus.toml")
    (tmp_path / "again.toml").write_text(to_toml(found))
    assert load_toml(type(found), tmp_path / "again.toml") == found


def test_one_step_at_a_time_is_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text")
    alone = ["--workers", "1"]
    assert main(["data", "ingest", "text/web.jsonl", "text/plays", "--to", "a", *alone]) == 0
    assert main(["data", "dedup", "near", "a", "--to", "b", "threshold=0.9", *alone]) == 0
    assert main(["data", "tokenize", "b", "--to", "c", "tokenizer=byte", "valid_fraction=0.2", *alone]) == 0
    assert main(["data", "mix", "c", "--to", "d", "seq_len=32", *alone]) == 0
    assert "near: 37 → " in capsys.readouterr().out
    assert main(["data", "verify", "c/data/web"]) == 0
    for wrong, message in (
        (["dedup", "near", "text", "--to", "x"], "text is not a finished step"),
        (["dedup", "near", "a", "--to", "x", "threshold=abc"], "threshold='abc': should be"),
        (["dedup", "near", "a", "--to", "x", "--rank", "1"], "--rank and --world go together"),
        (["ingest", "gone.txt", "--to", "x"], "gone.txt"),
        (["ingest", "text", "--to", "text/x"], "source 'text': text holds text/x, so that what is written"),
        (["ingest", "n" * 201, "--to", "x"], "a source cannot have the name 'nnn"),
        (["ingest", "", "--to", "x"], "a source cannot have the path ''"),
        (["ingest", "caf\udce9", "--to", "x"], "a source cannot have the name 'caf\\udce9'"),
        (["tokenize", "--to", "x"], "give either the folder of a step, or text with --text"),
    ):
        assert main(["data", *wrong]) == 2
        assert message in capsys.readouterr().err
    for size in ("nan", "inf", "0", "-1"):
        with pytest.raises(SystemExit):
            main(["data", "tokenize", "--text", "text", "--to", "x", "--max-mib", size])
        assert "is not a size above 0" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
