"""The last step: every document's tokens lie in its group's datasets, the same however the step was run."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_tools import encoding, pieces, tokenize_parts, verify
from data_tools.bpe import Encoded
from data_tools.bpe.encoder import BpeEncoder
from data_tools.documents import SCHEMA, texts
from data_tools.hold_out import Split, exceptions, place
from data_tools.mix.groups import read_groups
from data_tools.pieces import unigram_entropy
from data_tools.step import read_report, step_parts
from data_tools.tokenize_parts import TokenizeSettings, run
from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, train_bpe
from megalite.errors import DataError

from .corpora import crew, files_of, rows_of, write_rows, write_step

WORDS = ["tokens", "naïve", "漢字", "don't", "🙂", "12345", "\n\n", "Straße", "мир"]


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(tokenize_parts, "SMALL_TASK_BYTES", 2000)


@pytest.fixture
def source(tmp_path) -> Path:
    """Five parts, one empty, of three sources; one has a single document."""
    rng = np.random.default_rng(0)
    parts = [
        [
            (f"{part}-{row}", ["web", "books"][row % 2], " ".join(rng.choice(WORDS, 8).tolist()))
            for row in range(40)
        ]
        for part in range(4)
    ]
    parts[2] += [("only", "one/of a kind", "alone"), ("empty", "web", "")]
    return write_step(tmp_path / "source", [*parts, []])


def settings(**changed: object) -> TokenizeSettings:
    return TokenizeSettings.model_validate({"tokenizer": "byte", "valid_fraction": 0.1, **changed})


def stored(out: Path) -> dict[tuple[str, str, str], list[int]]:
    """(group, kind, id) → tokens, of all datasets."""
    return {
        (folder.parent.name, folder.name, document.doc_id): document.tokens.tolist()
        for folder in sorted((out / "data").glob("*/*"))
        for document in Dataset(folder).documents()
    }


def expected(source: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    return {row["id"]: [*tokenizer.encode(row["text"]).tolist(), tokenizer.eos_id] for row in rows_of(source)}


def bpe(folder: Path) -> JsonTokenizer:
    folder.mkdir()
    tokenizer = train_bpe([" ".join(WORDS)] * 50, 300)
    tokenizer.save(folder)
    return tokenizer


def test_datasets_and_report(tmp_path, source, capsys):
    out = tmp_path / "out"
    with crew(tmp_path) as one:
        flow = run(settings(), source, out, one)
        assert run(settings(), source, out, one).to_json() == flow.to_json()
    found, documents = stored(out), rows_of(source)
    wanted = expected(source, load_tokenizer(out / "tokenizer"))
    assert {name: tokens for (_, _, name), tokens in found.items()} == wanted
    groups = {"web": "web", "books": "books", "one/of a kind": "one%2Fof a kind"}
    for row in documents:
        is_near = place(row["source"], row["id"]) < 0.1
        kind = "valid" if is_near and row["id"] != "only" else "train"
        assert (groups[row["source"]], kind, row["id"]) in found
    assert sorted(path.name for path in out.iterdir()) == [
        *("data", "done", "report.json", "step.json", "timing.json", "tokenizer")
    ]
    report = read_report(out)
    web = report["groups"]["web"]
    assert web["train"]["documents"] == Dataset(out / "data/web/train").manifest.documents
    assert web["valid"]["tokens"] == Dataset(out / "data/web/valid").total_tokens
    sizes = [len(row["text"].encode()) for row in documents if row["source"] == "web"]
    assert web["train"]["bytes"] + web["valid"]["bytes"] == sum(sizes)
    assert web["bytes_per_token"] == sum(sizes) / (sum(sizes) + len(sizes))
    counts = [
        np.bincount(np.concatenate([found[key] for key in found if key[:2] == ("web", kind)]), minlength=257)
        for kind in ("train", "valid")
    ]
    assert web["unigram_entropy"] == pytest.approx(unigram_entropy(*counts))
    alone = report["groups"]["one%2Fof a kind"]
    assert (alone["train"]["documents"], alone["valid"]["documents"], alone["unigram_entropy"]) == (
        1,
        0,
        None,
    )
    assert not (out / "data/one%2Fof a kind/valid").exists()
    assert report["tokenizer"]["engine"] == "bytes"
    assert flow.totals()[:2] == (len(documents), len(documents))
    for group in groups.values():
        assert verify.run(out / "data" / group) == 0


def test_whatever_a_source_is_called_its_datasets_stay_and_are_mixed_by_its_name(tmp_path):
    names = [
        "notes.tmp",
        ".tmp",
        "日本",
        "a/b.tmp",
        "100%",
        "x.tmp.q",
        "..",
        "plain",
        "news.q1",
        "news.q2",
        "news",
    ]
    source = write_step(tmp_path / "source", [[(f"{n}", name, "text") for name in names for n in range(2)]])
    with crew(tmp_path) as one:
        run(settings(), source, tmp_path / "out", one)
    assert sorted(group.source for group in read_groups(tmp_path / "out")) == sorted(names)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])  # the rule alone would hold out none, or all
def test_a_family_is_on_one_side_whatever_bucket_its_documents_are_in(tmp_path, fraction):
    schema = SCHEMA.append(pa.field("bucket", pa.string()))
    ends = ("", "#docstrings")
    rows = [
        {"id": f"m{n}.py{end}", "source": source, "text": "text", "bucket": f"q{(n + 3 * len(end)) % 4}"}
        for source in "abcde"
        for n in range(40)
        for end in ends
    ]
    source = write_rows(tmp_path / "source", [rows[::3], rows[1::3], rows[2::3]], schema)
    with crew(tmp_path) as one:
        run(settings(valid_fraction=fraction), source, tmp_path / "out", one)
    found = stored(tmp_path / "out")
    assert {key[:2] for key in found} == {
        (f"{name}.q{n}", kind) for name in "abcde" for n in range(4) for kind in ("train", "valid")
    }
    sides = {(group.partition(".")[0], name.removesuffix(ends[1]), kind) for group, kind, name in found}
    assert len(sides) == 5 * 40


def test_neighbouring_parts_are_one_task_as_long_as_they_are_small(monkeypatch):
    monkeypatch.setattr(tokenize_parts, "SMALL_TASK_BYTES", 8 << 20)
    paths = [Path(str(number)) for number in range(10)]
    small = tokenize_parts._plan(paths, [3 << 20] * 10)
    assert [(name, [path.name for path in some]) for name, some, _ in small[:2]] == [
        ("piece-00000", ["0", "1"]),
        ("piece-00001", ["2", "3"]),
    ]
    assert [size for _, _, size in small] == [6 << 20] * 5
    large = tokenize_parts._plan(paths, [100 << 20] * 9 + [300 << 20])
    assert [len(some) for _, some, _ in large] == [1] * 10


def test_a_sample_is_as_large_as_wanted_though_few_parts_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_parts, "SCAN", 1)
    rows = [[(f"{part}-{n}", "s", f"{part}" * 100) for n in range(20)] for part in range(8)]
    parts = step_parts(write_step(tmp_path / "in", rows))
    found = list(tokenize_parts._sample(parts, [2000] * 8, Split(1e-9, {"s": {}}), 4000))
    assert found == ["0" * 100] * 20 + ["4" * 100] * 20
    # Of a few huge documents none may be chosen; then it is the first that is not held out.
    few = list(tokenize_parts._sample(parts, [10**9] * 8, Split(1e-9, {"s": {"0-0": True}}), 1))
    assert few == ["0" * 100]


def test_the_check_of_a_long_document_ends_between_characters(monkeypatch):
    monkeypatch.setattr(encoding, "CHECK_BYTES", 8)
    encoder = encoding.build_encoder(ByteTokenizer(), encoding.BYTES)
    check = encoding.SampleCheck(ByteTokenizer(), encoder, encoding.COMPILED)
    column = texts(pa.array(["a" + "é" * 9]))
    assert check.look(column, encoder.encode(column)) == []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: np.zeros(7, np.int64))
    assert check.look(column, encoder.encode(column)) == [0]


def test_a_held_out_token_that_training_has_not_is_as_one_seen_once():
    found = unigram_entropy(np.array([3, 0, 1]), np.array([2, 1, 0]))
    assert found == pytest.approx(-(2 * np.log(4 / 7) + np.log(1 / 7)) / 3)


def test_a_bucket_keeps_what_it_trains_on_though_another_holds_that_family_out():
    def found(*families):
        nearest, farthest = (list(end(families)) for end in (min, max))
        return {"source": "s", "documents": 9, "held": 0, "nearest": nearest, "farthest": farthest}

    near, far = (0.3, "near"), (0.9, "far")
    surveys = [{"s.q0": found(near, far), "s.q1": found(near)}, {"s.q2": found((0.2, "new"), near)}]
    assert exceptions(surveys) == {
        "s.q0": {"near": True, "new": True},
        "s.q1": {"new": True},
        "s.q2": {"new": True},
    }


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
@pytest.mark.parametrize("key", ["pattern", "eos_token"])
def test_what_is_of_a_tokenizers_file_is_refused_without_one(tokenizer, key):
    with pytest.raises(ValidationError, match=f"{key}='x' is of a tokenizer's file, not of tokenizer="):
        settings(tokenizer=tokenizer, **{key: "x"})


def test_any_group_of_two_holds_out_one_and_keeps_one(tmp_path):
    rows = [(f"{source}{n}", source, "text") for source in ("a", "b", "c") for n in range(2)]
    for fraction in (1e-9, 1 - 1e-9):
        source = write_step(tmp_path / f"source {fraction}", [rows[:3], rows[3:]])
        out = tmp_path / f"out {fraction}"
        with crew(tmp_path) as one:
            run(settings(valid_fraction=fraction), source, out, one)
        kinds = sorted(key[:2] for key in stored(out))
        assert kinds == [(group, kind) for group in "abc" for kind in ("train", "valid")]


def test_a_module_and_its_docstrings_are_on_one_side(tmp_path):
    rows = [(f"m{n // 2}.py{'#docstrings' * (n % 2)}", "py", "text") for n in range(80)]
    for fraction in (0.3, 1e-9, 1 - 1e-9):  # also where the rule alone would hold out none, or all
        source = write_step(tmp_path / f"source {fraction}", [rows[::2], rows[1::2]])
        out = tmp_path / f"out {fraction}"
        with crew(tmp_path) as one:
            run(settings(valid_fraction=fraction), source, out, one)
        held = {name for _, kind, name in stored(out) if kind == "valid"}
        assert 0 < len(held) < len(rows)
        assert {name.removesuffix("#docstrings") for name in held} == {
            name for name in held if not name.endswith("#docstrings")
        }
        assert len(held) % 2 == 0


def test_buckets_are_groups(tmp_path):
    schema = SCHEMA.append(pa.field("bucket", pa.string()))
    rows = [{"id": str(n), "source": "web", "text": "t", "bucket": f"q{n % 2}"} for n in range(8)]
    source = write_rows(tmp_path / "source", [rows], schema)
    with crew(tmp_path) as one:
        run(settings(), source, tmp_path / "out", one)
    assert {(group, name) for group, _, name in stored(tmp_path / "out")} == {
        (f"web.{row['bucket']}", row["id"]) for row in rows
    }


@pytest.mark.slow
def test_one_process_two_processes_and_two_ranks_give_the_same_bytes(tmp_path, source):
    bpe(tmp_path / "bpe")
    how = settings(tokenizer=str(tmp_path / "bpe"), compression="zstd")
    outs = [tmp_path / name / "out" for name in ("one", "two")]
    with crew(outs[0].parent) as one:
        run(how, source, outs[0], one)

    def work(rank: int) -> None:
        with crew(outs[1].parent, rank=rank, world=2) as mine:
            run(how, source, outs[1], mine)

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    first, second = map(files_of, outs)
    assert first == second
    assert any(name.endswith(".arrow") for name in first)


@pytest.mark.slow
def test_killed_at_any_rename_it_goes_on_to_the_same_bytes(tmp_path, source):
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    with crew(whole.parent) as one:
        run(settings(), source, whole, one)

    def attempt(renames: int) -> bool:
        """Run in a child that is gone before its rename of that number; whether it finished."""
        child = os.fork()
        if child == 0:
            rename, left = Path.rename, [renames]

            def dying(path: Path, target: Path) -> Path:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(3)
                return rename(path, target)

            Path.rename = dying  # type: ignore[method-assign]
            try:
                with crew(killed.parent) as one:
                    run(settings(), source, killed, one)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 3)
        return code == 0

    kills = 0
    while not attempt(kills):
        kills += 1
        assert kills < 60
    assert kills > 8
    found = {name: data for name, data in files_of(killed).items() if not name.endswith(".tmp")}
    assert files_of(whole) == found


def test_other_ids_than_the_reference_are_told_and_replaced(tmp_path, source, monkeypatch, capsys):
    tokenizer = bpe(tmp_path / "bpe")
    how, out = settings(tokenizer=str(tmp_path / "bpe")), tmp_path / "out"
    right = BpeEncoder.encode

    def wrong(self, texts) -> Encoded:
        encoded = right(self, texts)
        encoded.ids[:1] += 1
        return encoded

    pieces._at_work.cache_clear()
    with monkeypatch.context() as broken, crew(tmp_path) as one:
        broken.setattr(BpeEncoder, "encode", wrong)
        run(how, source, out, one)
    assert "all is encoded again by the reference" in capsys.readouterr().err
    assert {name: tokens for (_, _, name), tokens in stored(out).items()} == expected(source, tokenizer)
    said = read_report(out)["tokenizer"]
    assert said["engine"] == "tokenizers"
    assert said["documents_different"] >= 4
    assert said["documents_checked"] >= said["documents_different"]


def test_engines_by_tokenizer(tmp_path, source, capsys):
    tokenizer = bpe(tmp_path / "bpe")
    table = json.loads(tokenizer.content) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(table))
    out = tmp_path / "out"
    with crew(tmp_path) as one:
        run(settings(tokenizer=str(tmp_path / "bpe")), source, out, one)
    assert (
        "by the reference tokenizer, which is slow: the tokenizer normalizes text" in capsys.readouterr().err
    )
    said = read_report(out)["tokenizer"]
    assert (said["engine"], said["documents_checked"]) == ("tokenizers", 0)
    assert {name: tokens for (_, _, name), tokens in stored(out).items()} == expected(source, tokenizer)
    assert encoding.choose_engine(tokenizer) == ("compiled", "")


def test_a_trained_bpe_sees_no_held_out_text_and_is_the_same_again(tmp_path):
    rows = [(str(n), "web", f"common words and secret{n}x") for n in range(60)]
    source = write_step(tmp_path / "source", [rows[:30], rows[30:]])
    made = []
    for name in ("a", "b"):
        with crew(tmp_path) as one:
            run(settings(tokenizer="bpe", vocab_size=400), source, tmp_path / name, one)
        made.append(load_tokenizer(tmp_path / name / "tokenizer"))
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].vocab_size > 300
    assert read_report(tmp_path / "a")["tokenizer"]["documents_checked"] >= 1
    split = tokenize_parts.Split(0.1, {"web": {}})
    paths = sorted((source / "parts").iterdir())
    texts = list(tokenize_parts._sample(paths, [1, 1], split, 10**6))
    assert texts == [text for n, _, text in rows if place("web", n) >= 0.1]


def test_bad_input(tmp_path, source, monkeypatch):
    with crew(tmp_path) as one:
        with pytest.raises(DataError, match="no documents came in"):
            run(settings(), write_step(tmp_path / "none", [[]]), tmp_path / "a", one)
        with pytest.raises(DataError, match="no tokenizer .*missing"):
            run(settings(tokenizer=str(tmp_path / "missing")), source, tmp_path / "b", one)
        run(settings(), source, tmp_path / "c", one)
        with pytest.raises(DataError, match="was made with settings.valid_fraction=0.1, not 0.2"):
            run(settings(valid_fraction=0.2), source, tmp_path / "c", one)
        monkeypatch.setattr("data_tools.hold_out.MAX_GROUPS", 2)
        with pytest.raises(DataError, match="3 sources or buckets .*at most 2 can"):
            run(settings(), source, tmp_path / "d", one)
        long = write_step(tmp_path / "long", [[("1", "s" * 300, "text")]])
        with pytest.raises(DataError, match="folder's name of 300 bytes"):
            run(settings(), long, tmp_path / "e", one)
