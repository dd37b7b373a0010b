"""The benchmarks still run: every contender of ours, small, and those peers that the tests need anyway.

What they measure is nothing for a test; that a change of ours has not left one behind is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest

from megalite.data.tokenizer import train_bpe
from megalite.parallel.mesh import Mesh
from tests.ranks import run_ranks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other as scripts do; last on the path, where none hides a package of ours."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])


def _losses(mesh: Mesh, contenders: list[str], precision: str) -> list[list[float | None]]:
    """Three steps of each."""
    import parallel_cpu
    from parallel_ours import Shape

    shape = Shape(hidden=32, layers=2, heads=4, ffn=48, vocab=64, batch=2, seq=16, precision=precision)
    found = []
    for contender in contenders:
        step = parallel_cpu.build(contender, shape)
        found.append([step() for _ in range(3)])
    return found


def _agreed(contenders: list[str], precision: str = "fp32") -> np.ndarray:
    """Each contender's losses on the ranks that have them, [contenders, steps]."""
    ranks = run_ranks(_losses, 2, contenders, precision)
    rows = []
    for number in range(len(contenders)):
        had = [rank[number] for rank in ranks if rank[number][0] is not None]
        rows.append(np.mean(np.array(had, dtype=np.float64), axis=0))
    return np.array(rows)


@pytest.mark.slow
def test_data_parallel_contenders_take_the_same_steps():
    """Around our model, DeepSpeed apart, which the engine's own tests compare with."""
    names = ["megalite zero0", "megalite zero1", "megalite zero2", "megalite zero3"]
    losses = _agreed([*names, "ddp", "fsdp2 kept", "fsdp2 resharded"])
    np.testing.assert_allclose(losses, losses[[0]].repeat(len(losses), 0), rtol=1e-5)
    assert losses[0, 2] < losses[0, 0]


@pytest.mark.slow
def test_contenders_of_transformers_learn():
    names = ["alone", "ddp of transformers", "fsdp2 kept of transformers", "fsdp2 resharded of transformers"]
    losses = _agreed(names)
    assert (losses[:, 2] < losses[:, 0]).all()
    np.testing.assert_allclose(losses[2:], losses[[1, 1]], rtol=1e-5)


@pytest.mark.slow
def test_bf16_contenders_take_about_the_same_steps():
    names = ["megalite zero2", "fsdp2 kept", "ddp of transformers"]
    losses = _agreed(names, "bf16")
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)
    assert (losses[:, 2] < losses[:, 0]).all()


@pytest.mark.slow
def test_tensor_parallel_contenders_learn():
    losses = _agreed(["megalite tp", "megalite tp+sp", "dtensor tp", "dtensor tp+sp"])
    np.testing.assert_allclose(losses[1::2], losses[::2], rtol=1e-5)  # the tokens divided too, or not
    assert (losses[:, 2] < losses[:, 0]).all()


@pytest.mark.slow
def test_pipeline_contenders_take_the_same_steps():
    losses = _agreed(["megalite pp", "torch pp"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0, 2] < losses[0, 0]


def test_loader_contenders(tmp_path):
    import loader

    loader.prepare(tmp_path, 400_000)
    for name, opened in loader.CONTENDERS.items():
        if name.startswith(("megalite", "numpy")):
            batches, count = opened(tmp_path)
            last = list(batches(count - 2))[:2] if name == "numpy memmap" else _first(batches(count - 2), 2)
            assert [tokens.shape for tokens in last] == [(loader.BATCH, loader.SEQ)] * 2, name
    assert loader.first_batch_of_many(tokens=10**8, shards=4).keys() == {
        "first_of_1e+08_plain_cpu_s",
        "first_of_1e+08_zstd_cpu_s",
    }
    assert loader.arithmetic()["blend_worst_error"] <= 1


def _first(batches: Iterator[np.ndarray], count: int) -> list[np.ndarray]:
    return [next(batches) for _ in range(count)]


@pytest.mark.slow
def test_steps_of_corpus_tools(tmp_path, monkeypatch):
    from benchmarks import data_tools_ours as ours

    texts = sorted(topics.topics.values(), key=len)[-30:-10]  # prose of some kilobytes each
    rows = [{"id": f"d{n}", "text": text} for n, text in enumerate(texts)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gpt2.json").write_text(train_bpe(texts, 300).content)
    monkeypatch.setenv("TOKENIZER", str(tmp_path / "gpt2.json"))
    for name, run in {"ingest": ours.ingest, **ours.CONTENDERS}.items():
        folder = tmp_path / ("all.parts" if name == "ingest" else name)
        folder.mkdir()
        run(tmp_path / "all.jsonl", folder)
        assert any(folder.iterdir()), name


@pytest.mark.slow
def test_trainers_of_one_process():
    import train_cpu

    contenders = [("megalite", "eager"), ("transformers", "eager")]
    found = train_cpu.compare(contenders, "fp32", batch=1, seq=16, pairs=1, ranks=1)
    assert set(found) == {"megalite eager", "transformers eager"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["train_cpu.py", "--start", "--pairs", "1"],
        ["checkpoint_cpu.py", "--rounds", "1"],
        ["loader.py", "--tokens", "3e5", "--rounds", "1", "--only", "megalite plain"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_program_runs(arguments):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout
