"""Runs on data that changes on the way: packed, in growing rows, of a changing mixture, damaged, killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.checkpoint.store import open_checkpoint
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.errors import ConfigError, DataError
from megalite.log import read_json_lines
from megalite.parallel.mesh import Mesh, build_mesh, close_mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.ranks import join_ranks, run_ranks, spawn_ranks
from tests.trainer.runs import curve, metrics, tiny, train, write_dataset

STEP = 24 * 32  # tokens


def varied(root: Path, *overrides: str) -> Config:
    """A run on two sources whose rows grow and whose mixture changes, packed by best fit."""
    return tiny(
        root,
        f"data.sources=[{{path='{root}/train', weight=0.6}}, {{path='{root}/other', weight=0.4}}]",
        f"data.schedule=[{{tokens={5 * STEP}, weights=[0.1, 0.9]}}]",
        f"data.seq_len_schedule=[{{tokens=0, seq_len=8}}, {{tokens={4 * STEP}, seq_len=32}}]",
        "data.packing=best_fit",
        "train.steps=8",
        *overrides,
    )


@pytest.fixture
def root(root: Path) -> Path:
    """As ever, with another source beside."""
    write_dataset(root / "other", seed=3, documents=80)
    return root


LAYOUTS = {
    "dp": [],
    "tp-sp": ["mesh.tp=2", "mesh.sequence_parallel=true"],
    "pp": ["mesh.pp=2"],
    "zero-3": ["mesh.zero_stage=3", "train.micro_batch_size=3"],
}


@pytest.mark.slow
def test_rows_that_grow_and_a_mixture_that_changes_give_one_answer_on_every_layout(
    root: Path, alone: Mesh
) -> None:
    reference = train(alone, varied(root))
    assert [r["seq_len"] for r in reference] == [8] * 4 + [32] * 4
    assert len(list((root / "run/packing").iterdir())) == 2
    for name, overrides in LAYOUTS.items():
        records = run_ranks(train, 2, varied(root, f"run_dir={root}/{name}", *overrides))[0]
        assert [r["tokens"] for r in records] == [r["tokens"] for r in reference]
        for ours, theirs in zip(curve(records), curve(reference), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)


def test_the_mixture_may_change_on_resume_but_not_the_order(
    root: Path, alone: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    one = f"data.sources=[{{path='{root}/train'}}]"
    two = f"data.sources=[{{path='{root}/other'}}, {{path='{root}/train'}}]"
    train(alone, tiny(root, "train.steps=2", "optim.warmup_steps=0", one))
    with pytest.raises(
        ConfigError, match="data.seq_len=16, but this run has read its first 48 samples with 32"
    ):
        Trainer(tiny(root, "train.steps=4", one, "data.seq_len=16"), alone)
    trainer = Trainer(tiny(root, "train.steps=4", two), alone)
    assert trainer.loader.blend.cursors(48) == [0, 48]
    # Of other data another loss is to be expected, which must not be taken for a spike.
    assert len(trainer.recovery.detector.state()["losses"]) == 2
    trainer.recovery.enter(trainer.loader.regime(48))
    assert trainer.recovery.detector.state()["losses"] == []
    trainer.fit(PreemptionFlag())
    assert "mixture of sources is another from here on" in capsys.readouterr().err
    assert [e["step"] for e in read_json_lines(root / "run/ledger.jsonl") if e["event"] == "mixture"] == [2]
    again = Trainer(tiny(root, "train.steps=4", two), alone)
    assert not again.has_new_mixture
    again.recovery.enter(again.loader.regime(96))
    assert len(again.recovery.detector.state()["losses"]) == 2
    assert again.loader.blend.cursors(96) == [24, 72]
    # Back to before it was changed, with samples left out since: as a run that is started again has it.
    again.loader.skip([(48, 72)])
    assert again.loader.restore(open_checkpoint(root / "run/checkpoints/step_00000002").meta["loader"], 48)
    assert again.loader.blend.origin == 48


def test_a_run_that_its_data_does_not_last_for_does_not_start(root: Path, alone: Mesh) -> None:
    source = f"data.sources=[{{path='{root}/other', max_epochs=0.5}}]"
    with pytest.raises(DataError, match="sample 479 is past the data: by sample .* raise max_epochs"):
        Trainer(tiny(root, source), alone)
    assert not (root / "run").exists()


def test_the_data_must_last_for_the_batches_that_are_left(root: Path, alone: Mesh) -> None:
    """Ten steps were of 24 samples, the others are of 12."""
    once = f"data.sources=[{{path='{root}/train', max_epochs=1}}]"
    first = Trainer(tiny(root, once, "train.steps=10"), alone)
    first.fit(PreemptionFlag())
    most = 10 + (first.loader.samples[0] - 240) // 12
    smaller = [once, "train.global_batch_size=12"]
    assert Trainer(tiny(root, *smaller, f"train.steps={most}"), alone).position == 240
    with pytest.raises(DataError, match="is past the data"):
        Trainer(tiny(root, *smaller, f"train.steps={most + 1}"), alone)


def damage(folder: Path, blocks: list[int]) -> None:
    """Write a dataset of small record batches and flip a byte in each of these."""
    rng = np.random.default_rng(7)
    with ShardWriter(folder, ByteTokenizer(), batch_tokens=500) as writer:
        for n in range(150):
            writer.write(f"doc-{n}", "synthetic", np.append(rng.integers(0, 64, rng.integers(1, 300)), 256))
    (shard,) = Dataset(folder).manifest.shards
    data = bytearray((folder / shard.file).read_bytes())
    for block in blocks:
        data[int(shard.batches[block, 0] + shard.batches[block, 1]) - 300] ^= 1
    (folder / shard.file).write_bytes(data)


def _train_or_fail(mesh: Mesh, config: Config) -> tuple[list[dict[str, Any]], str, bool]:
    try:
        Trainer(config, mesh).fit(PreemptionFlag())
    except DataError as error:
        return metrics(Path(config.run_dir)), str(error), error.is_shared
    return metrics(Path(config.run_dir)), "", False


@pytest.mark.slow
def test_damaged_record_batches_are_replaced_reported_and_at_last_too_many(root: Path, alone: Mesh) -> None:
    damage(root / "bad", [3, 10])
    source = f"data.sources=[{{path='{root}/bad'}}]"
    common = [source, "train.steps=25", "data.max_bad_blocks=0.2", "checkpoint.every_steps=10"]
    reference = train(alone, tiny(root, *common, f"run_dir={root}/alone"))
    records, error, _ = run_ranks(_train_or_fail, 2, tiny(root, *common))[1]
    assert not error
    for ours, theirs in zip(curve(records), curve(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert records[-1]["bad_blocks"] == 2
    assert any("replaced" in r["events"] for r in records)
    ledgers = [
        [e for e in read_json_lines(run / "ledger.jsonl") if e["event"] == "bad_block"]
        for run in (root / "run", root / "alone")
    ]
    assert {(e["batch"], e["reason"][:10]) for e in ledgers[0]} == {(3, "is corrupt"), (10, "is corrupt")}
    assert all(e["samples"] and e["file"].endswith("shard_00000.arrow") for e in ledgers[0])
    assert [e["samples"] for e in ledgers[0]] == [e["samples"] for e in ledgers[1]]
    # The count goes on after a resume.
    assert Trainer(tiny(root, *common, "train.steps=30"), alone).loader.bad_blocks.keys() == {
        (e["file"], e["batch"]) for e in ledgers[0]
    }
    strict = tiny(root, source, "train.steps=25", "data.max_bad_blocks=0.001", f"run_dir={root}/strict")
    found = run_ranks(_train_or_fail, 2, strict)
    (message,) = {error for _, error, _ in found}
    assert [is_shared for _, _, is_shared in found] == [True, True]
    assert "shard_00000.arrow: record batch" in message
    assert "is corrupt: CRC" in message
    assert "data.max_bad_blocks=0.001 allows fewer" in message


def _train_until_step(config: Config, rank: int, step: int) -> None:
    """A life of a rank; one of them dies at once when it is given the batches of a certain step."""
    mesh = build_mesh(20)
    trainer = Trainer(config, mesh)
    train_step = trainer.train_step

    def dies(batches: list[Batch], lr: float, wants_stop: bool = False) -> Any:
        if mesh.rank == rank and trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(batches, lr, wants_stop)

    trainer.train_step = dies  # type: ignore[method-assign]
    with PreemptionFlag() as flag:
        trainer.fit(flag)
    close_mesh(mesh)


@pytest.mark.slow
def test_a_run_killed_ten_times_equals_the_unkilled_one_bit_for_bit(root: Path) -> None:
    """Two ranks, dropout, changing rows and mixture; a rank dies at a random step, saves lie in between."""
    rng = np.random.default_rng(0)
    common = ["train.steps=30", "model.dropout=0.1", "checkpoint.every_steps=2", "data.prefetch=3"]
    whole = run_ranks(train, 2, varied(root, *common, f"run_dir={root}/whole"), timeout_s=200)[0]
    config = varied(root, *common)
    kills = sorted(rng.choice(np.arange(1, 30), 10, replace=False).tolist())
    for step in kills:
        ranks = spawn_ranks(_train_until_step, 2, config, int(rng.integers(2)), step, comm_timeout_s=60)
        codes = join_ranks(ranks, timeout_s=200)
        assert -signal.SIGKILL in codes
        assert 0 not in codes
    assert join_ranks(spawn_ranks(_train_until_step, 2, config, 0, -1), timeout_s=200) == [0, 0]
    found = metrics(root / "run")
    for key in ("step", "position", "loss", "grad_norm", "tokens", "seq_len"):
        assert [r[key] for r in found] == [r[key] for r in whole], key
