"""The clean step as a whole, and the quality classifier."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_tools.clean import CleanSettings, added_columns, run
from data_tools.fasttext_model import FastTextModel
from data_tools.flow import Flow
from data_tools.quality import Quality, QualitySettings
from data_tools.step import read_report
from megalite.config_file import load_toml
from megalite.errors import ConfigError, DataError
from tests.data_tools.corpora import crew, files_of, rows_of, texts_of, write_step

PARTS = [
    [
        ("a", "web", "Write to me at anna@host.de, she said.\r\nThe end of the story is near.\n"),
        ("b", "web", " \t\n\u200b\ufeff"),
        ("c", "books", "Der Hund schlÃ¤ft \nauf dem Sofa und träumt vom Wald.\n"),
    ],
    [],
    [("d", "books", ""), ("e", "web", "The server 93.184.216.34 answered at last.")],
]
CLEAN = [
    "Write to me at <EMAIL>, she said.\nThe end of the story is near.\n",
    "Der Hund schläft\nauf dem Sofa und träumt vom Wald.\n",
    "The server <IP> answered at last.",
]
PLAIN = CleanSettings(statistics=None)


@pytest.mark.slow
def test_documents_are_cleaned_and_accounted_for(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", PARTS)
    with crew(tmp_path) as work:
        flow = run(PLAIN, source, tmp_path / "out", work)
        again = run(PLAIN, source, tmp_path / "out", work)
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == CLEAN
    assert [(row["language"], row["pii_count"]) for row in rows] == [("en", 1), ("de", 0), ("en", 1)]
    assert "quality" not in rows[0]
    assert flow.dropped() == {"empty": 2}
    assert flow.totals()[:2] == (5, 3)
    assert flow.totals()[3] == sum(len(text.encode()) for text in CLEAN)
    assert flow.histograms["language"] == {"de": 1, "en": 2}
    assert flow.counters["pii: email"] == flow.counters["normalise: mojibake"] == 1
    assert again.to_json() == flow.to_json()
    assert read_report(tmp_path / "out")["step"] == "clean"


@pytest.mark.slow
def test_the_columns_that_are_added_are_known_beforehand(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", PARTS)
    with crew(tmp_path) as work:
        run(CleanSettings(), source, tmp_path / "out", work)
    before = {"id", "source", "text", "meta"}
    assert set(added_columns(CleanSettings()).names) == set(rows_of(tmp_path / "out")[0]) - before


def test_each_operation_can_be_left_out(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", PARTS)
    settings = CleanSettings.model_validate(
        {"normalise": False, "language": False, "pii": {"ip": False}, "statistics": False}
    )
    with crew(tmp_path) as work:
        run(settings, source, tmp_path / "out", work)
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows][1:] == [PARTS[0][1][2], PARTS[0][2][2], PARTS[2][1][2]]
    assert rows[0]["text"].startswith("Write to me at <EMAIL>, she said.\r\n")
    assert set(rows[0]) == {"id", "source", "text", "meta", "pii_count"}


def test_a_document_of_which_no_line_stays_is_dropped(tmp_path: Path) -> None:
    parts = [[("b", "web", "\n"), ("a", "web", "Yes.\nNo.\n"), ("c", "web", "This line has words enough.")]]
    source = write_step(tmp_path / "in", [*parts, [("d", "web", "Ok.")]])
    settings = CleanSettings.model_validate({"language": False, "pii": False})
    with crew(tmp_path) as work:
        flow = run(settings, source, tmp_path / "out", work)
    assert texts_of(tmp_path / "out") == ["This line has words enough."]
    assert flow.dropped() == {"empty": 1, "every line removed": 2}
    assert [example["id"] for example in flow.examples["every line removed"]] == ["a", "d"]
    assert flow.totals() == (4, 1, 9 + 1 + 27 + 3, 27)


def test_what_the_filter_judges_is_measured_before_masks_are_put_in(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", PARTS)
    settings = CleanSettings.model_validate({"statistics": {"c4": False}})
    with crew(tmp_path) as work:
        run(settings, source, tmp_path / "out", work)
    rows = rows_of(tmp_path / "out")
    assert [row["text"] for row in rows] == CLEAN
    assert rows[0]["gopher_words"] == 14
    letters = "Writetomeatanna@host.de,shesaid.Theendofthestoryisnear."
    assert rows[0]["gopher_mean_word_length"] == pytest.approx(len(letters) / 14)
    assert [row["gopher_stop_words"] for row in rows] == [3, None, 1]  # none are known for German
    assert "fineweb_short_lines" in rows[0]
    assert "c4_sentences" not in rows[0]


def test_cleaning_the_clean_changes_nothing(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", PARTS)
    with crew(tmp_path) as work:
        run(PLAIN, source, tmp_path / "out", work)
        flow = run(PLAIN, tmp_path / "out", tmp_path / "twice", work)
    assert texts_of(tmp_path / "twice") == CLEAN
    assert not flow.counters


def test_the_same_bytes_on_one_rank_and_two_and_after_a_loss(tmp_path: Path) -> None:
    source = write_step(tmp_path / "in", PARTS)
    one, two = tmp_path / "one", tmp_path / "two"
    with crew(one) as work:
        run(PLAIN, source, one / "out", work)
    with crew(two, rank=0, world=2) as first, crew(two, rank=1, world=2) as second:
        other = threading.Thread(target=run, args=(PLAIN, source, two / "out", second))
        other.start()
        run(PLAIN, source, two / "out", first)
        other.join()
    assert files_of(one / "out") == files_of(two / "out")
    expected = files_of(one / "out")
    for lost in ("report.json", "done/parts/part-000002.json", "parts/part-000002.parquet"):
        (one / "out" / lost).unlink()
    with crew(one) as work:
        run(PLAIN, source, one / "out", work)
    assert files_of(one / "out") == expected


def test_switches_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('pii = false\nlanguage = true\n[normalise]\nform = "NFKC"\n')
    settings = load_toml(CleanSettings, path)
    assert settings.pii is None
    assert settings.normalise is not None
    assert settings.normalise.form == "NFKC"
    assert settings.language == CleanSettings().language
    path.write_text("[pii]\nemial = false\n")
    with pytest.raises(
        ConfigError, match=r"unknown key pii.emial; did you mean pii.email\? \(.*recipe.toml:2\)"
    ):
        load_toml(CleanSettings, path)
    with pytest.raises(ValidationError, match=r"quality.model"):
        CleanSettings.model_validate({"quality": True})


def test_a_missing_package_or_model_is_told_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_step(tmp_path / "in", PARTS)
    model = tmp_path / "model.bin"
    settings = CleanSettings(quality=QualitySettings(model=str(model), label="good"))
    with crew(tmp_path) as work:
        with pytest.raises(DataError, match="cannot read the model .*model.bin"):
            run(settings, source, tmp_path / "out", work)
        assert not (tmp_path / "out").exists()
        model.write_bytes(b"")
        monkeypatch.setitem(sys.modules, "fasttext", None)
        with pytest.raises(DataError, match=r"megalite\[fasttext\]"):
            run(settings, source, tmp_path / "out", work)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_quality_is_the_probability_of_a_label(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext", reason="fastText is not installed")
    lines = [
        "__label__good a theorem and its proof in full\n",
        "__label__bad click here buy now cheap\n",
    ] * 60
    (tmp_path / "train.txt").write_text("".join(lines))
    trained = fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=20, dim=8, thread=1, verbose=0)
    path = tmp_path / "quality.bin"
    trained.save_model(str(path))

    rows = ["a proof\nof the\r\ntheorem", "buy\ncheap here", "", "click " * 50 + "theorem"]
    batch = pa.RecordBatch.from_pydict({"text": pa.array(rows, pa.string())})
    flow = Flow()
    out = Quality(QualitySettings(model=str(path), label="good"))(batch, flow)
    for text, score in zip(rows, out.column("quality").to_pylist(), strict=True):
        pairs = trained.f.predict(" ".join(text.split()) + "\n", 2, 0.0, "strict")
        expected = next((p for p, label in pairs if label == "__label__good"), 0.0)
        assert score == pytest.approx(min(expected, 1.0), abs=1e-6)
    scores = out.column("quality").to_pylist()
    assert scores[0] > 0.5 > scores[1]
    assert sum(flow.histograms["quality"].values()) == len(rows)
    short = Quality(QualitySettings(model=str(path), label="bad", max_chars=5))(batch.slice(3), Flow())
    assert short.column("quality")[0].as_py() > 0.5
    with pytest.raises(DataError, match="has no label 'fine'; there are "):
        Quality(QualitySettings(model=str(path), label="fine"))

    # The step knows the model by what it is: elsewhere it is the same step.
    source = write_step(tmp_path / "in", PARTS)
    moved = tmp_path / "moved.bin"
    settings = CleanSettings(quality=QualitySettings(model=str(path), label="good"))
    with crew(tmp_path) as work:
        run(settings, source, tmp_path / "out", work)
        shutil.move(path, moved)
        settings = CleanSettings(quality=QualitySettings(model=str(moved), label="good"))
        run(settings, source, tmp_path / "out", work)
    assert all(0 <= row["quality"] <= 1 for row in rows_of(tmp_path / "out"))


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext", reason="fastText is not installed")
    words = [f"__label__{'ab'[i % 2]} w{i} v{i}\n" for i in range(400)]
    (tmp_path / "train.txt").write_text("".join(words))
    trained = fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=1, dim=4, thread=1, verbose=0)
    trained.save_model(str(tmp_path / "dense.bin"))
    trained.quantize(input=str(tmp_path / "train.txt"), qnorm=True, cutoff=300, retrain=False, verbose=0)
    trained.save_model(str(tmp_path / "small.ftz"))
    for path in (tmp_path / "dense.bin", tmp_path / "small.ftz"):
        assert set(FastTextModel(str(path)).labels) == {"a", "b"}
        whole = path.read_bytes()
        cut = path.with_name("cut.bin")
        for size in (4, 30, 92, 100, 300, len(whole) // 2, len(whole) - 1):
            cut.write_bytes(whole[:size])
            with pytest.raises(DataError, match="cut.bin"):
                FastTextModel(str(cut))
    (tmp_path / "none.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is not a fastText model"):
        FastTextModel(str(tmp_path / "none.bin"))
