"""Snapshots in host memory: bit-exact to go back to, bounded, and never used once a bit has flipped."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.snapshots import Snapshot, Snapshots, _sealer, copy_to_host
from megalite.data.loader import Share
from megalite.errors import CheckpointError
from megalite.parallel.mesh import Mesh
from megalite.trainer import Trainer
from tests.daily import one_a_day
from tests.ranks import SOLO, run_ranks
from tests.trainer.runs import lay_out, tiny, write_dataset


def of(value: float, reuse: Snapshot | None = None) -> Snapshot:
    """A snapshot of one tensor full of `value`."""
    return Snapshot(copy_to_host([("weight", torch.full((1000,), value))], reuse), (), 0, {})


def test_what_was_copied_stays_when_the_state_moves_on() -> None:
    state = torch.zeros(1000)
    snapshot = Snapshot(copy_to_host([("weight", state)]), (), 0, {})
    state.fill_(1.0)
    snapshot.verify()
    assert snapshot.tensors["weight"].count_nonzero() == 0


@pytest.mark.parametrize("bit", [0, 17, 31])
def test_a_flipped_bit_is_named(bit: int) -> None:
    snapshot = of(1.0)
    snapshot.verify()
    snapshot.tensors["weight"].view(torch.int32)[123] ^= 1 << bit if bit < 31 else -(1 << 31)
    with pytest.raises(CheckpointError, match="weight changed in host memory .* CRC"):
        snapshot.verify()


def test_the_oldest_gives_its_memory_to_the_newest() -> None:
    kept = Snapshots(10, 2, SOLO)
    assert [step for step in range(31) if kept.is_due(step)] == [10, 20, 30]
    addresses = set()
    for step in range(10, 60, 10):
        kept.take(step, step, {}, lambda reuse, step=step: of(float(step), reuse))  # type: ignore[misc]
        assert len(kept.steps) <= 2
        newest = kept.newest_before(step)
        assert newest is not None
        addresses.add(newest.state.tensors["weight"].data_ptr())
    assert kept.steps == [40, 50]
    assert len(addresses) == 2
    older = kept.newest_before(49)
    assert older is not None
    assert older.state.tensors["weight"].unique().tolist() == [40.0]
    assert kept.newest_before(39) is None
    kept.forget_after(40)
    assert kept.steps == [40]


def test_no_memory_is_given_up_before_its_crcs_are_taken() -> None:
    """They would be of the next snapshot's values, and the memory would seem to have changed."""
    begun = threading.Event()
    _sealer.submit(begun.wait)
    snapshot = of(1.0)
    threading.Timer(0.05, begun.set).start()
    snapshot.give_up()["weight"].fill_(2.0)
    with pytest.raises(CheckpointError, match="weight changed in host memory"):
        snapshot.verify()


def choose_with_a_flip_on_rank_1(mesh: Mesh) -> tuple[int, list[int]]:
    """Of snapshots at 1, 2, 3 the last has changed on rank 1 alone; what is chosen, what is left."""
    kept = Snapshots(1, 3, mesh)
    for step in (1, 2, 3):
        kept.take(step, step, {}, lambda reuse, step=step: of(float(step), reuse))  # type: ignore[misc]
    if mesh.rank == 1:
        last = kept._all[-1]
        last.state.verify()
        last.state.tensors["weight"].view(torch.int32)[0] ^= 1
    found = kept.newest_before(9)
    assert found is not None
    return found.step, kept.steps


def test_one_ranks_flipped_bit_makes_all_take_an_older_one() -> None:
    assert run_ranks(choose_with_a_flip_on_rank_1, 2) == [(2, [1, 2])] * 2


def go_back(mesh: Mesh, root: str, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Losses of steps 4 to 6, and again after going back to a snapshot of step 3."""
    config = tiny(Path(root), *overrides)
    trainer = Trainer(config, lay_out(mesh, config))

    def train(first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            share = Share(24, 2, trainer.mesh.dp.rank, trainer.mesh.dp.size)
            with trainer.loader.steps(step * 24, share, prefetch=0) as stream:
                losses.append(trainer.train_step(next(stream), 1e-2).loss)
        return losses

    train(0, 3)
    snapshot = trainer.engine.snapshot()
    saved = [part.values.clone() for part in snapshot.slices]
    once = train(3, 6)
    assert all(torch.equal(part.values, kept) for part, kept in zip(snapshot.slices, saved, strict=True))
    assert trainer.engine.applied_steps == 6
    snapshot.verify()
    trainer.engine.load_snapshot(snapshot)
    assert trainer.engine.applied_steps == 3
    return once, train(3, 6)


LAYOUTS: list[tuple[int, list[str]]] = [
    *((2, [f"mesh.zero_stage={stage}", "train.precision=bf16"]) for stage in (2, 0, 1, 3)),
    (1, []),
    (1, ["train.precision=bf16"]),
    (2, ["mesh.tp=2"]),
    (2, ["mesh.pp=2", "model.tie_embeddings=true"]),
]


@pytest.mark.parametrize(("world", "layout"), one_a_day(*LAYOUTS), ids=str)
def test_going_back_gives_the_same_losses_bit_for_bit(tmp_path: Path, world: int, layout: list[str]) -> None:
    for name in ("train", "valid"):
        write_dataset(tmp_path / name, seed=1, documents=30)
    for once, again in run_ranks(go_back, world, str(tmp_path), layout):
        assert once == again


def test_the_loss_scale_goes_back_with_the_weights(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write_dataset(tmp_path / name, seed=1, documents=30)
    engine = Trainer(tiny(tmp_path, "train.precision=fp16"), SOLO).engine
    begun, snapshot = engine.loss_scale.state(), engine.snapshot()
    for go in (lambda: engine.load_snapshot(snapshot), engine.initialize):  # to a snapshot, to the seed
        engine.loss_scale.update(False)
        assert engine.loss_scale.state() != begun
        go()
        assert engine.loss_scale.state() == begun


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_deepspeed_engine_goes_back_too(tmp_path: Path, stage: int) -> None:
    for name in ("train", "valid"):
        write_dataset(tmp_path / name, seed=1, documents=30)
    layout = ["mesh.zero_engine=deepspeed", f"mesh.zero_stage={stage}", "train.precision=bf16"]
    for once, again in run_ranks(go_back, 2, str(tmp_path), layout, timeout_s=240):
        assert once == again
