"""One flipped bit of one rank's copy of a weight is found, and tensor and rank are named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite.errors import ReplicaError
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.sharding import Replica
from megalite.resilience.preempt import PreemptionFlag
from megalite.resilience.rank_watch import RankWatch
from megalite.resilience.replicas import check_replicas, digest
from megalite.trainer import Trainer
from tests.daily import one_a_day
from tests.ranks import run_ranks
from tests.trainer.runs import lay_out, tiny, write_dataset

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8]


@given(st.sampled_from(DTYPES), st.integers(1, 40), st.integers(0, 9), st.data())
def test_a_digest_sees_any_flipped_bit_wherever_the_tensor_lies(
    dtype: torch.dtype, size: int, shift: int, data: st.DataObject
) -> None:
    values = torch.arange(size).to(dtype)
    elsewhere = torch.zeros(size + shift, dtype=dtype)[shift:]
    elsewhere.copy_(values)
    assert digest(values) == digest(elsewhere)
    place = data.draw(st.integers(0, values.nbytes - 1))
    elsewhere.view(torch.uint8)[place] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(values) != digest(elsewhere)


@dataclass(frozen=True)
class Flip:
    """A bit of the sixth element of a weight (or its master) on one rank, after a step."""

    name: str
    rank: int
    step: int
    of_master: bool = False


def train_with_flip(mesh: Mesh, root: str, overrides: tuple[str, ...], flip: Flip | None) -> tuple[int, str]:
    """The step reached and what was raised."""
    config = tiny(Path(root), *overrides)
    trainer = Trainer(config, lay_out(mesh, config))
    engine = trainer.engine
    apply = engine.optimizer_step

    def faulty(lr: float, scale: float) -> None:
        apply(lr, scale)
        if flip is not None and flip.rank == mesh.rank and trainer.step + 1 == flip.step:
            _flip(engine, flip)

    engine.optimizer_step = faulty  # type: ignore[method-assign]
    try:
        trainer.fit(PreemptionFlag())
    except ReplicaError as error:
        return trainer.step + 1, str(error)
    return trainer.step, ""


def _flip(engine: object, flip: Flip) -> None:
    if flip.of_master:
        optimizer = engine.optimizer  # type: ignore[attr-defined]
        owned = next(owned for owned in optimizer.layout.owned_ranges() if owned.name == flip.name)
        values = optimizer.master[owned.shard]
    else:
        values = engine.model.get_parameter(flip.name).detach().view(-1)  # type: ignore[attr-defined]
    # Of the second byte, since the next step's rounding can swallow a difference of one unit.
    values.view(torch.uint8)[5 * values.element_size() + 1] ^= 1


NORM, MATRIX = "blocks.1.attention_norm.weight", "blocks.0.mlp.down.weight"
STEPS = ("train.steps=6", "resilience.digest_every_steps=2", "checkpoint.every_steps=2", "data.validation=[]")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("replicas") / "train", seed=1, documents=40).parent


@pytest.mark.parametrize(
    ("layout", "flip", "group"),
    one_a_day(
        (["mesh.zero_stage=0", "resilience.digest_every_steps=0"], Flip(MATRIX, 1, 3), "world"),
        (["mesh.zero_stage=1"], Flip(MATRIX, 1, 4), "world"),
        (["mesh.zero_stage=2"], Flip(NORM, 0, 4), "world"),
        (["mesh.zero_stage=3"], Flip(NORM, 1, 4), "world"),
        (["mesh.zero_stage=0", "train.precision=bf16"], Flip(MATRIX, 1, 4, of_master=True), "world"),
        (["mesh.tp=2"], Flip(NORM, 1, 3), "world"),
        (["mesh.tp=2", "mesh.sequence_parallel=true"], Flip(NORM, 0, 4), "world"),
        (["mesh.pp=2", "model.tie_embeddings=true"], Flip("embedding", 1, 4), "world"),
        (["mesh.tp=2"], None, ""),
    ),
)
def test_a_flip_is_found_before_anything_is_saved(
    root: Path, tmp_path: Path, layout: list[str], flip: Flip | None, group: str
) -> None:
    overrides = (*STEPS, *layout, f"run_dir={tmp_path}/run")
    reached = run_ranks(train_with_flip, 2, str(root), overrides, flip)
    assert reached[0] == reached[1]
    step, message = reached[0]
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    if flip is None:
        assert (step, message, len(saved)) == (6, "", 3)
        return
    # Without comparisons of its own, a run finds it when it is about to save, with that step done.
    assert step == (5 if "resilience.digest_every_steps=0" in layout else 4)
    assert f"{flip.name} (group {group}): it differs between rank" in message
    assert saved == ["step_00000002"]
    events = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events][1:] == [("replicas_differ", 4)]
    assert flip.name in events[-1]["error"]


def compare(mesh: Mesh, odd: int) -> str:
    """A tensor of which one rank of three holds other bits, and one that agrees."""
    values = torch.ones(7)
    values[3] += float(mesh.rank == odd)
    axis = mesh.world
    try:
        check_replicas([Replica("same", torch.ones(9), axis), Replica("odd one", values, axis)], mesh)
    except ReplicaError as error:
        return str(error)
    return ""


def test_the_majority_is_believed() -> None:
    for message in run_ranks(compare, 3, 1):
        assert "odd one (group world): on rank 1 it is not what ranks 0, 2 hold" in message
        assert message.count("odd one") == 1
        assert "same" not in message.split("odd one")[1].split("start the same")[0]
    assert ReplicaError.exit_code == 76


def test_a_rank_alone_has_nothing_to_compare() -> None:
    check_replicas([], Mesh(0, 1, Axis(), torch.device("cpu")))


def test_a_step_s_weights_are_compared_once_and_anew_when_it_comes_again(tmp_path: Path) -> None:
    """As after a rollback, whose first save may be of the step that was compared last."""
    config = tiny(tmp_path, "resilience.digest_every_steps=2")
    watch = RankWatch(config, Mesh(0, 2, Axis(), torch.device("cpu")), Mock(), Mock())
    counts = []
    with patch("megalite.resilience.replicas.check_replicas") as check:
        for step in (1, 2, 2):
            with watch.step(step):
                pass
            watch.check_replicas(step)
            counts.append(check.call_count)
    assert counts == [1, 2, 3]
