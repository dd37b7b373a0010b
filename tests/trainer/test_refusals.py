"""Runs that do not start: what is refused, on every rank alike, before anything is written."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megalite.config import Config
from megalite.data.loader import open_datasets
from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.errors import BusyError, CheckpointError, ConfigError, DataError
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.daily import one_a_day
from tests.ranks import run_ranks
from tests.trainer.runs import tiny, train, write_dataset


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["data.sources=[]"], ConfigError, ["data.sources", "tokenize"]),
        (["data.sources=[{path='/nowhere'}]"], DataError, ["/nowhere"]),
        (["model.vocab_size=200"], DataError, ["vocabulary of 257", "model.vocab_size=200"]),
        (
            [
                "train.global_batch_size=7",
                "train.micro_batch_size=7",
                "data.seq_len=64",
                "model.max_seq_len=64",
                "run_dir=/proc/nowhere",
            ],
            ConfigError,
            ["run_dir"],
        ),
    ],
)
def test_mistakes_are_named(
    root: Path, alone: Mesh, overrides: list[str], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        Trainer(tiny(root, *overrides), alone)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert not (root / "run").exists()


def _expect_indivisible(mesh: Mesh, config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(config, mesh)
    return str(caught.value)


def test_a_batch_that_does_not_divide_by_the_processes(root: Path) -> None:
    config = tiny(root, "train.global_batch_size=4", "train.micro_batch_size=4")
    for text in run_ranks(_expect_indivisible, 2, config):
        assert "train.global_batch_size=4" in text
        assert "[1, 2]" in text


def _expect_disagreement(mesh: Mesh, config: Config) -> str:
    from megalite.config_file import build_config

    values = config.model_dump()
    values["optim"]["lr"] = 0.1 + mesh.rank
    with pytest.raises(ConfigError) as caught:
        Trainer(build_config(values), mesh)
    return str(caught.value)


def _expect_a_peers_trouble(mesh: Mesh, config: Config) -> tuple[str, bool]:
    import megalite.run_data

    def gone(paths: object) -> None:
        raise DataError("this host has no data/train")

    original = megalite.run_data.open_datasets
    if mesh.rank == 1:
        megalite.run_data.open_datasets = gone  # type: ignore[assignment]
    try:
        with pytest.raises(DataError) as caught:
            Trainer(config, mesh)
    finally:
        megalite.run_data.open_datasets = original
    return str(caught.value), caught.value.is_shared


def _expect_other_code(mesh: Mesh, config: Config) -> str:
    other = mock.patch("megalite.agreement.code_version", return_value=f"0.1.0+{mesh.rank}")
    with other, pytest.raises(ConfigError) as caught:
        Trainer(config, mesh)
    return str(caught.value)


def _expect_other_data(mesh: Mesh, config: Config, others: str) -> str:
    """On rank 1 the same paths hold another dataset, as on a host with a disk of its own."""

    def open_others(paths: Iterable[str]) -> object:
        return open_datasets(others if mesh.rank == 1 else path for path in paths)

    with mock.patch("megalite.run_data.open_datasets", open_others), pytest.raises(DataError) as caught:
        Trainer(config, mesh)
    assert caught.value.is_shared
    return str(caught.value)


def test_ranks_with_other_code_or_data_do_not_start(root: Path) -> None:
    for text in run_ranks(_expect_other_code, 2, tiny(root)):
        assert text == (
            "rank 0 runs megalite 0.1.0+0 but rank 1 0.1.0+1; install the same code on every host"
        )
    others = write_dataset(root / "others", seed=9)
    here, there = (Dataset(path).manifest.digest for path in (root / "train", others))
    for text in run_ranks(_expect_other_data, 2, tiny(root), str(others)):
        assert f"has manifest {here} on rank 0 but {there} on rank 1" in text
    assert not (root / "run").exists()


def test_data_missing_on_one_rank_stops_all_with_its_reason(root: Path) -> None:
    assert run_ranks(_expect_a_peers_trouble, 2, tiny(root)) == [("this host has no data/train", True)] * 2


def _expect_no_ledger(mesh: Mesh, config: Config) -> str:
    with pytest.raises(CheckpointError) as caught:
        Trainer(config, mesh)
    return str(caught.value)


def test_a_ledger_that_cannot_be_read_stops_all_ranks(root: Path) -> None:
    (root / "run/ledger.jsonl").mkdir(parents=True)
    told = run_ranks(_expect_no_ledger, 2, tiny(root))
    assert told[0] == told[1]
    assert f"Is a directory (EISDIR) at {root}/run/ledger.jsonl" in told[0]


def test_ranks_with_different_configs_do_not_start(root: Path) -> None:
    for text in run_ranks(_expect_disagreement, 2, tiny(root)):
        assert "optim.lr=0.1 on rank 0 but 1.1 on rank 1" in text


def test_another_model_or_tokenizer_does_not_continue_the_run(root: Path, alone: Mesh) -> None:
    train(alone, tiny(root, "train.steps=3"))
    kept = {name: (root / "run" / name).read_bytes() for name in ("config.toml", "tokenizer.json")}
    with pytest.raises(CheckpointError, match="of shape"):
        Trainer(tiny(root, "model.ffn_size=64"), alone)
    other = ByteTokenizer()
    other.content = '{"megalite": "byte"}'  # the same ids, but another file
    with ShardWriter(root / "other", other) as writer:
        writer.write("a", "synthetic", np.arange(256).repeat(20))
    with pytest.raises(CheckpointError, match="was trained with tokenizer"):
        Trainer(tiny(root, f"data.sources=[{{path='{root}/other'}}]", "data.validation=[]"), alone)
    assert kept == {name: (root / "run" / name).read_bytes() for name in kept}


def test_a_full_disk_at_the_start_leaves_the_config_it_may_have_been_started_from(
    root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(alone, tiny(root, "train.steps=3"))
    before = (root / "run/config.toml").read_text()

    def write_half(path: Path, text: str, encoding: str) -> None:
        with path.open("w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(ConfigError, match="run_dir=.* cannot be written: No space left on device"):
        Trainer(tiny(root, "train.steps=4"), alone)
    assert (root / "run/config.toml").read_text() == before


def _expect_busy(mesh: Mesh, config: Config) -> str:
    with pytest.raises(BusyError) as caught:
        Trainer(config, mesh)
    assert caught.value.is_shared
    return str(caught.value)


@pytest.mark.parametrize("is_new", one_a_day(True, False))
def test_a_second_run_in_the_folder_does_not_start(root: Path, alone: Mesh, is_new: bool) -> None:
    if not is_new:
        train(alone, tiny(root, "train.steps=3"))
    first = Trainer(tiny(root), alone)
    before = (root / "run/config.toml").read_text()
    told = run_ranks(_expect_busy, 2, tiny(root, "optim.lr=0.1"))
    assert told[0] == told[1]
    assert f"run_dir='{root}/run' is in use by process {os.getpid()} on {socket.gethostname()}" in told[0]
    assert (root / "run/config.toml").read_text() == before
    first.fit(PreemptionFlag())
    assert len(run_ranks(train, 2, tiny(root, "train.steps=21"))[0]) == 21


def test_a_truncated_shard_is_named_before_anything_is_written(tmp_path: Path, alone: Mesh) -> None:
    write_dataset(tmp_path / "train", seed=1, documents=30)
    write_dataset(tmp_path / "valid", seed=2, documents=5)
    shard = next((tmp_path / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        Trainer(tiny(tmp_path), alone)
    assert shard.name in str(caught.value)
    assert not (tmp_path / "run").exists()
