"""One answer on every layout: the same loss and the same gradient norm before clipping."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from megalite.checkpoint.store import Checkpoint, open_checkpoint
from megalite.config import Config
from megalite.engines.native import NativeEngine
from megalite.model.flops import count_parameters
from megalite.model.transformer import Shared
from megalite.optim.buckets import ROOT
from megalite.parallel.mesh import Axis, Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.ranks import run_ranks
from tests.trainer.runs import Curve, apart, curve, lay_out, losses, tiny, train


class Reference(NamedTuple):
    """A run of one process."""

    curve: Curve
    val_loss: float
    weights: Checkpoint


def _one_process(datasets: Path, run: Path, *overrides: str) -> Reference:
    mesh = Mesh(0, 1, Axis(), torch.device("cpu"))
    config = tiny(datasets, f"run_dir={run}", "train.eval_every_steps=10", *overrides)
    records = train(mesh, config)
    return Reference(curve(records), records[-1]["val_loss"], open_checkpoint(run))


def _compare(root: Path, reference: Reference, world: int, overrides: list[str]) -> None:
    """The same curve, validation loss and final weights."""
    records = run_ranks(train, world, tiny(root, "train.eval_every_steps=10", *overrides))[0]
    assert apart(curve(records), reference.curve) < 1e-5
    assert abs(records[-1]["val_loss"] / reference.val_loss - 1) < 1e-5
    found = open_checkpoint(root / "run")
    assert sorted(found.names()) == sorted(reference.weights.names())
    for name in found.names():
        ours, theirs = found.read("weight", name), reference.weights.read("weight", name)
        # AdamW divides by the root of the second moment: where gradients are all but zero, their
        # rounding decides an update's direction, so single elements may part by a few learning rates.
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name
        assert (ours - theirs).abs().max() < 1e-2, name


@pytest.fixture(scope="module")
def reference(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return _one_process(datasets, tmp_path_factory.mktemp("reference") / "run")


LAYOUTS = [
    (1, "train.micro_batch_size=24"),
    (1, "train.micro_batch_size=1"),
    (2, "mesh.zero_stage=0"),
    (2, "mesh.zero_stage=1"),
    (2, "mesh.zero_stage=1 mesh.bucket_mib=100"),
    (2, "mesh.zero_stage=1 train.micro_batch_size=12"),
    (3, "mesh.zero_stage=1"),
    (3, "mesh.zero_stage=0 train.micro_batch_size=1"),
    (4, "mesh.zero_stage=1 mesh.bucket_mib=0.001"),
    (4, "mesh.zero_stage=0"),
    (2, "train.recompute=full"),
    (2, "train.recompute=selective"),
    (2, "mesh.zero_stage=2"),
    (2, "mesh.zero_stage=3"),
    (3, "mesh.zero_stage=2 mesh.bucket_mib=0.001"),
    (3, "mesh.zero_stage=3 mesh.bucket_mib=0.001 train.micro_batch_size=4"),
    (2, "mesh.zero_stage=3 mesh.bucket_mib=100 train.recompute=full"),
    (2, "mesh.zero_stage=3 train.recompute=selective"),
    (4, "mesh.zero_stage=1 mesh.zero_shard_size=2"),
    (4, "mesh.zero_stage=2 mesh.zero_shard_size=2"),
    (4, "mesh.zero_stage=3 mesh.zero_shard_size=2"),
    (2, "mesh.zero_stage=3 mesh.zero_shard_size=1"),
    (2, "mesh.tp=2 train.micro_batch_size=12"),
    (2, "mesh.tp=2 mesh.sequence_parallel=true train.micro_batch_size=8"),
    (2, "mesh.tp=2 train.recompute=full train.micro_batch_size=24"),
    (2, "mesh.tp=2 mesh.sequence_parallel=true train.recompute=selective train.micro_batch_size=24"),
    (4, "mesh.tp=4 train.micro_batch_size=24"),  # two ranks share each key head
    (4, "mesh.tp=4 mesh.sequence_parallel=true train.micro_batch_size=24"),
    (4, "mesh.tp=2 mesh.zero_stage=0 train.micro_batch_size=12"),
    (4, "mesh.tp=2 mesh.zero_stage=1 train.micro_batch_size=6"),
    (4, "mesh.tp=2 mesh.zero_stage=2 train.micro_batch_size=6"),
    (4, "mesh.tp=2 mesh.zero_stage=3 mesh.sequence_parallel=true train.micro_batch_size=6"),
    (4, "mesh.tp=2 mesh.sequence_parallel=true mesh.bucket_mib=0.001 train.micro_batch_size=12"),
    (2, "mesh.pp=2"),
    (2, "mesh.pp=2 mesh.pp_schedule=gpipe train.micro_batch_size=24"),
    (2, "mesh.pp=2 mesh.pp_schedule=zero_bubble train.micro_batch_size=6"),
    (2, "mesh.pp=2 mesh.pp_schedule=zero_bubble train.recompute=full train.micro_batch_size=6"),
    (4, "mesh.pp=2 mesh.zero_stage=1 train.micro_batch_size=4"),
    (4, "mesh.pp=2 mesh.zero_stage=2 train.micro_batch_size=3"),
    (4, "mesh.pp=2 mesh.zero_stage=3 train.micro_batch_size=3"),
    (4, "mesh.pp=2 mesh.zero_stage=0 mesh.pp_schedule=zero_bubble train.micro_batch_size=3"),
    (4, "mesh.pp=2 mesh.tp=2 train.micro_batch_size=8"),
    (
        4,
        "mesh.pp=2 mesh.tp=2 mesh.sequence_parallel=true mesh.pp_schedule=zero_bubble "
        "train.micro_batch_size=8",
    ),
    (8, "mesh.tp=2 mesh.pp=2 mesh.zero_stage=2 train.micro_batch_size=4"),
    (8, "mesh.tp=2 mesh.pp=2 mesh.zero_stage=3 mesh.sequence_parallel=true train.micro_batch_size=4"),
]


EVERY_DAY = (
    "mesh.zero_stage=3",
    "mesh.tp=2 mesh.sequence_parallel=true train.micro_batch_size=8",
    "mesh.pp=2",
)


def _cases(layouts: list[tuple[int, str]]) -> list[ParameterSet]:
    """A few every day, the others before a change lands."""
    return [
        pytest.param(
            world,
            keys,
            id=f"{world}-{keys}".replace(" ", ","),
            marks=[pytest.mark.slow] * (keys not in EVERY_DAY),
        )
        for world, keys in layouts
    ]


@pytest.mark.parametrize(("world", "overrides"), _cases(LAYOUTS))
def test_every_layout_gives_the_answer_of_one_process(
    root: Path, reference: Reference, world: int, overrides: str
) -> None:
    _compare(root, reference, world, overrides.split())


VARIANTS = [
    ["model.tie_embeddings=true"],
    [
        "model.position=learned",
        "model.norm=layernorm",
        "model.activation=gelu_tanh",
        "model.qkv_bias=true",
        "model.attention_out_bias=true",
        "model.mlp_bias=true",
    ],
    # At a tenth of the learning rate: AdamW's first steps turn rounding into sign changes of whole updates.
    ["model.qk_norm=true", "model.num_kv_heads=1", "optim.lr=1e-3"],
    ["model.dropout=0.2", "optim.lr=1e-3"],
    ["train.z_loss=1e-3"],
    ["data.document_mask=false"],
    ["optim.grad_clip=0.1"],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [["mesh.tp=1"], ["mesh.tp=2"], ["mesh.tp=2", "mesh.sequence_parallel=true"], ["mesh.pp=2"]],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v[0])
def test_model_variants_agree_across_layouts(
    root: Path, alone: Mesh, variant: list[str], layout: list[str]
) -> None:
    common = ["train.steps=8", "train.micro_batch_size=12", *variant]
    one = curve(train(alone, tiny(root, *common)))
    two = run_ranks(train, 2, tiny(root, *common, f"run_dir={root}/two", *layout))[0]
    assert apart(curve(two), one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mesh.zero_stage=3", "mesh.pp=3 model.num_layers=3"])
def test_validation_samples_that_do_not_divide(root: Path, alone: Mesh, layout: str) -> None:
    common = ["train.steps=3", "train.eval_every_steps=3", "train.eval_samples=4", "train.micro_batch_size=1"]
    common += ["model.num_layers=3"]
    one = train(alone, tiny(root, *common, f"run_dir={root}/one"))[-1]["val_loss"]
    three = run_ranks(train, 3, tiny(root, *common, *layout.split()))[0][-1]["val_loss"]
    assert abs(three / one - 1) < 1e-5


DEEP = ["model.num_layers=5", "model.tie_embeddings=true", "train.steps=10"]
DEEP_LAYOUTS = [
    (2, "mesh.pp=2 mesh.pp_schedule=interleaved mesh.pp_chunks=2 train.micro_batch_size=6"),
    (2, "mesh.pp=2 mesh.pp_layers=[4,1] train.micro_batch_size=12"),
    (2, "mesh.pp=2 mesh.pp_layers=[0,5] train.micro_batch_size=12"),
    (3, "mesh.pp=3 train.micro_batch_size=12"),
    (3, "mesh.pp=3 mesh.pp_layers=[2,0,3] train.micro_batch_size=12"),  # a stage without parameters
    (4, "mesh.pp=4 mesh.pp_schedule=zero_bubble train.micro_batch_size=8"),
    (4, "mesh.pp=2 mesh.pp_schedule=gpipe mesh.zero_stage=3 train.micro_batch_size=4"),
    (4, "mesh.pp=2 mesh.tp=2 mesh.pp_schedule=interleaved mesh.pp_chunks=2 train.micro_batch_size=8"),
    (
        4,
        "mesh.pp=2 mesh.pp_schedule=interleaved mesh.pp_chunks=2 mesh.zero_stage=2 mesh.bucket_mib=0.05 "
        "train.micro_batch_size=4",
    ),
    (
        4,
        "mesh.pp=2 mesh.pp_schedule=interleaved mesh.pp_chunks=2 mesh.zero_stage=3 mesh.zero_shard_size=1 "
        "train.micro_batch_size=4",
    ),
    (4, "mesh.pp=2 mesh.pp_schedule=interleaved mesh.pp_chunks=2 mesh.zero_stage=3 train.micro_batch_size=4"),
]


@pytest.fixture(scope="module")
def deep_reference(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return _one_process(datasets, tmp_path_factory.mktemp("deep") / "run", *DEEP)


@pytest.mark.parametrize(("world", "overrides"), _cases(DEEP_LAYOUTS))
def test_pipelines_of_uneven_tied_models(
    root: Path, deep_reference: Reference, world: int, overrides: str
) -> None:
    _compare(root, deep_reference, world, [*DEEP, *overrides.split()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "rounding", "between_layouts"), [("bf16", 2**-8, 2**-10), ("fp16", 2**-11, 2**-11)]
)
def test_half_precisions_stay_near_fp32_and_agree_across_layouts(
    root: Path, reference: Reference, precision: str, rounding: float, between_layouts: float
) -> None:
    common = [f"train.precision={precision}", "train.micro_batch_size=12"]
    one = curve(run_ranks(train, 1, tiny(root, f"run_dir={root}/one", *common))[0])
    # A product carries this much relative rounding; the loss averages over 768 tokens.
    assert apart(losses(one), losses(reference.curve)) < rounding
    # Tensor parallelism rounds each rank's part of a sum before it is added: once more the same rounding.
    layouts = {
        "dp": ["mesh.zero_stage=3"],
        "tp": ["mesh.tp=2"],
        "sp": ["mesh.tp=2", "mesh.sequence_parallel=true"],
        "pp": ["mesh.pp=2"],
    }
    for name, layout in layouts.items():
        two = curve(run_ranks(train, 2, tiny(root, f"run_dir={root}/{name}", *common, *layout))[0])
        assert apart(losses(two), losses(one)) < between_layouts


def _memory(mesh: Mesh, config: Config) -> int:
    """Bytes of all tensors an engine brings into the process."""
    gc.collect()
    before = _storages()
    engine = NativeEngine(config, lay_out(mesh, config))
    engine.initialize()
    return sum(size for place, size in _storages().items() if place not in before)


def _storages() -> dict[int, int]:
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize(
    ("stage", "precision", "world", "extra", "bytes_each"),
    [
        (0, "fp32", 2, [], 16),
        (0, "bf16", 2, [], 18),
        (1, "bf16", 2, [], 6 + 16 / 2),
        (1, "bf16", 4, [], 6 + 16 / 4),
        (1, "fp32", 4, [], 8 + 16 / 4),
        (2, "bf16", 4, [], 2 + 16 / 4),
        (2, "bf16", 4, ["mesh.zero_shard_size=2"], 2 + 16 / 2),
        (3, "bf16", 4, [], 18 / 4),
        (3, "fp32", 4, [], 16 / 4),
        (3, "bf16", 4, ["mesh.tp=2"], 18 / 2 / 2),
        (1, "bf16", 4, ["mesh.tp=2"], (6 + 16 / 2) / 2),
    ],
    ids=str,
)
def test_memory_a_rank_follows_the_formula(
    root: Path, stage: int, precision: str, world: int, extra: list[str], bytes_each: float
) -> None:
    config = tiny(
        root, "model.hidden_size=64", f"mesh.zero_stage={stage}", f"train.precision={precision}", *extra
    )
    expected = bytes_each * count_parameters(config.model)
    for measured in run_ranks(_memory, world, config):
        assert abs(measured / expected - 1) < 0.05


def _gathered(mesh: Mesh, config: Config) -> tuple[int, list[int]]:
    """Bytes of the largest gathered units, and those that were here at each gradient's arrival."""
    trainer = Trainer(config, lay_out(mesh, config))
    engine = trainer.engine
    assert isinstance(engine, NativeEngine)
    weights, seen = engine.optimizer.weights, []
    for parameter in engine.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(weights.gathered_bytes))  # type: ignore[no-untyped-call]
    for block in engine.model.blocks.values():
        block.register_forward_hook(lambda *_: seen.append(weights.gathered_bytes))
    trainer.fit(PreemptionFlag())
    assert weights.gathered_bytes == 0
    sizes: dict[str, int] = {}
    for bucket in engine.optimizer.layout.buckets:
        sizes[bucket.unit] = sizes.get(bucket.unit, 0) + 4 * bucket.size * bucket.decays
    return sizes[ROOT] + 2 * max(size for unit, size in sizes.items() if unit != ROOT), seen


def test_stage_3_holds_two_blocks_at_a_time(root: Path) -> None:
    config = tiny(
        root, "mesh.zero_stage=3", "model.num_layers=6", "train.steps=3", "train.eval_every_steps=3"
    )
    for limit, seen in run_ranks(_gathered, 2, config):
        assert 0 < max(seen) <= limit


def test_a_micro_batch_s_inputs_live_no_longer_than_it(root: Path, alone: Mesh) -> None:
    config = tiny(root, "train.steps=3", "train.eval_every_steps=3", "train.eval_samples=16")
    trainer = Trainer(config, alone)
    engine = trainer.engine
    assert isinstance(engine, NativeEngine)
    share, alive, seen = engine.model.share, weakref.WeakSet[torch.Tensor](), []

    def counted(*args: Any) -> Shared:
        shared = share(*args)
        assert shared.turn is not None
        alive.add(shared.turn[0])
        seen.append(len(alive))
        return shared

    engine.model.share = counted  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    assert len(seen) == 3 * 12 + 8
    assert max(seen) <= 2
