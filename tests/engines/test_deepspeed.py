"""The DeepSpeed engine gives the native engine's answers, and moves between the two lose nothing."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalite.config import Config
from megalite.data.loader import Share
from megalite.engines.deepspeed import DeepSpeedEngine, LossModule, load
from megalite.errors import CheckpointError, ConfigError, PreemptedError
from megalite.model.init import initial_values
from megalite.model.transformer import Transformer
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.ranks import SOLO, run_ranks
from tests.trainer.runs import Curve, apart, curve, lay_out, losses, metrics, tiny, train

pytestmark = pytest.mark.slow

DS = "mesh.zero_engine=deepspeed"
STAGE = [f"mesh.zero_stage={stage}" for stage in range(4)]
SPLIT = ["mesh.tp=2", "mesh.sequence_parallel=true"]
CPU = "mesh.offload=cpu"
PATIENCE_S = 240  # a pool's first call imports deepspeed

# GQA and packed documents come with `tiny`; these make clipping active at every step.
COMMON = ["model.tie_embeddings=true", "optim.grad_clip=0.3", "train.micro_batch_size=6"]


def _run(world: int, config: Config) -> Curve:
    return curve(run_ranks(train, world, config, timeout_s=PATIENCE_S)[0])


@pytest.fixture(scope="module")
def reference(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    run = tmp_path_factory.mktemp("reference") / "run"
    found = curve(train(SOLO, tiny(datasets, *COMMON, f"run_dir={run}")))
    assert len(found) == 20
    assert min(norm for _, norm in found) > 0.3
    return found


LAYOUTS: list[tuple[int, list[str]]] = [
    *((2, [stage]) for stage in STAGE[1:]),
    *((4, [stage, "mesh.tp=2"]) for stage in STAGE[1:]),
    *((2, [stage, CPU]) for stage in STAGE[2:]),
    (1, [STAGE[2]]),
    (2, [STAGE[3], "mesh.bucket_mib=0.001", "train.recompute=full"]),
    (2, [STAGE[2], "mesh.bucket_mib=1e-7"]),
    (4, [STAGE[3], *SPLIT]),
    (
        4,
        [STAGE[2], "mesh.tp=4", "mesh.sequence_parallel=true", "train.micro_batch_size=12"],
    ),  # two ranks share each key head
]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_every_layout_gives_the_answer_of_one_native_process(
    root: Path, reference: Curve, world: int, layout: list[str]
) -> None:
    assert apart(_run(world, tiny(root, DS, *COMMON, *layout)), reference) < 1e-5


def test_untied_head_dropout_and_z_loss(root: Path, alone: Mesh) -> None:
    common = ["train.steps=6", "model.dropout=0.1", "train.z_loss=1e-3"]
    one = curve(train(alone, tiny(root, *common, f"run_dir={root}/native")))
    assert apart(_run(2, tiny(root, *common, DS, STAGE[3])), one) < 1e-5


def _train_in_fp16(mesh: Mesh, config: Config) -> list[dict[str, Any]]:
    """Have deepspeed believe in fp16 on this processor, which torch computes in any case."""
    accelerator = load(mesh.device).accelerator.get_accelerator()
    supported = {"is_fp16_supported": True, "supported_dtypes": [torch.float, torch.half, torch.bfloat16]}
    with contextlib.ExitStack() as stack:
        for name, value in supported.items():
            stack.enter_context(mock.patch.object(accelerator, name, return_value=value))
        return train(mesh, config)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2**-9), ("fp16", 2**-12)])
@pytest.mark.parametrize("layout", [[STAGE[1]], [STAGE[2], CPU], [STAGE[3]], [STAGE[1], *SPLIT]], ids=str)
def test_half_precisions_stay_near_the_native_engine(
    root: Path, layout: list[str], precision: str, bound: float
) -> None:
    common = [f"train.precision={precision}", "train.steps=5"]
    native = _run(2, tiny(root, *common, f"run_dir={root}/native"))
    config = tiny(root, *common, DS, *layout)
    ours = curve(run_ranks(_train_in_fp16, 2, config, timeout_s=PATIENCE_S)[0])
    # Native gradients of embedding, head and norms stay fp32, deepspeed's are rounded as all others.
    assert apart(losses(ours), losses(native)) < bound


def test_fp16_lowers_the_scale_until_no_gradient_overflows(root: Path) -> None:
    common = ["train.precision=fp16", f"train.loss_scale={2.0**26}", "train.steps=9"]
    config = tiny(root, *common, "resilience.max_skipped_steps=0", DS, STAGE[2])
    records = run_ranks(_train_in_fp16, 2, config, timeout_s=PATIENCE_S)[0]
    overflows = [record["events"] == ["overflow"] for record in records]
    assert overflows[:2] == [True, True]
    assert not all(overflows)
    assert records[overflows.index(False) - 1]["tokens"] == 0
    assert records[-1]["loss"] < records[0]["loss"]


# --- an oracle: deepspeed as its documentation has it -----------------------------------------------


def _train_plainly(mesh: Mesh, config: Config) -> list[float]:
    """Losses of a loop that leaves everything to deepspeed: clipping, averaging, accumulation, the step."""
    deepspeed = load(mesh.device)
    model = Transformer(config.model)
    for name, p in model.named_parameters():
        p.data = initial_values(config.model, config.seed, name, 0, p.numel()).view_as(p)
    optim = config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(mesh.dp.size),
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": {"stage": config.mesh.zero_stage},
    }
    import deepspeed.utils.groups as groups_of_deepspeed

    groups_of_deepspeed.mpu = None  # of the engine before
    engine, *_ = deepspeed.initialize(model=LossModule(model), optimizer=adamw, config=settings)
    losses = []
    loader = Trainer(config, mesh).loader
    share = Share(24, config.train.micro_batch_size, mesh.dp.rank, mesh.dp.size)
    with loader.steps(0, share, prefetch=0) as stream:
        for _ in range(config.train.steps):
            sums = torch.zeros(2, dtype=torch.float64)
            for batch in next(stream):
                total, _, tokens = engine(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels))
                engine.backward(total / tokens)
                engine.step()
                sums += torch.tensor([float(total), float(tokens)])
            torch.distributed.all_reduce(sums)
            losses.append(float(sums[0] / sums[1]))
    return losses


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_used_plainly_gives_our_losses(root: Path, alone: Mesh, stage: int) -> None:
    common = [
        *("data.document_mask=false", "optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=3e-3"),
        *("train.steps=10", "optim.grad_clip=0.3", f"mesh.zero_stage={stage}", "train.micro_batch_size=6"),
    ]
    ours = curve(train(alone, tiny(root, *common, f"run_dir={root}/native")))
    plain = run_ranks(_train_plainly, 2, tiny(root, *common), timeout_s=PATIENCE_S)[0]
    assert min(norm for _, norm in ours) > 0.3
    assert apart(plain, losses(ours)) < 1e-5


# --- steps that are not applied ---------------------------------------------------------------------


def _state(trainer: Trainer) -> list[torch.Tensor]:
    """Master weights and moments, and the compute weights as a forward pass sees them."""
    kept = [part.values.clone() for part in trainer.engine.state_slices()]
    return [*kept, torch.tensor(trainer.evaluate()["val_loss"], dtype=torch.float64)]


def _train_poisoned(mesh: Mesh, config: Config, rank: int, name: str) -> tuple[int, Curve]:
    """Six steps, in the third and fourth of which one rank's gradient is not finite."""
    trainer = Trainer(config, lay_out(mesh, config))
    step, compute = trainer.train_step, trainer.engine.forward_backward

    def poisoned(batches: Any) -> Any:
        handles = []
        if trainer.step in (2, 3) and mesh.rank == rank:
            parameter = trainer.engine.model.get_parameter(name)  # type: ignore[attr-defined]
            handles.append(parameter.register_hook(lambda grad: grad * float("nan")))
        try:
            return compute(batches)
        finally:
            for handle in handles:
                handle.remove()

    def watched(batches: Any, lr: float, wants_stop: bool = False) -> Any:
        before, applied = _state(trainer), trainer.engine.applied_steps
        report = step(batches, lr, wants_stop)
        assert report.is_applied == (trainer.step not in (2, 3))
        if not report.is_applied:
            assert all(map(torch.equal, before, _state(trainer)))
            assert trainer.engine.applied_steps == applied
        return report

    trainer.engine.forward_backward = poisoned  # type: ignore[method-assign]
    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    return trainer.engine.applied_steps, curve(metrics(Path(config.run_dir)))


@pytest.mark.parametrize(
    ("world", "layout", "name"),
    [
        (2, [STAGE[1]], "embedding"),
        (2, [STAGE[1], "train.precision=bf16"], "norm.weight"),
        (2, [STAGE[2], CPU], "embedding"),
        (2, [STAGE[3]], "embedding"),
        (2, [STAGE[3], CPU], "norm.weight"),
        (4, [STAGE[2], *SPLIT], "norm.weight"),
    ],
    ids=str,
)
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_on_any(
    root: Path, alone: Mesh, world: int, layout: list[str], name: str
) -> None:
    common = [
        "train.steps=6",
        "train.micro_batch_size=6",
        "train.eval_samples=8",
        "resilience.max_rollbacks=0",
    ]
    config = tiny(root, *common, DS, *layout)
    results = run_ranks(_train_poisoned, world, config, world - 1, name, timeout_s=PATIENCE_S)
    assert [applied for applied, _ in results] == [4] * world
    if config.train.precision == "bf16":
        return
    _, native = _train_poisoned(alone, tiny(root, *common, f"run_dir={root}/native"), 0, name)
    ours = results[0][1]
    assert [norm for _, norm in ours[2:4]] == [None, None]  # not a number, which JSON has no word for
    assert apart(ours[:2] + ours[4:], native[:2] + native[4:]) < 1e-5


# --- checkpoints ------------------------------------------------------------------------------------


def _stop_after(mesh: Mesh, config: Config, steps: int) -> None:
    """Train and save as a run that is asked to stop in its `steps`-th step."""
    trainer = Trainer(config, lay_out(mesh, config))
    step = trainer.train_step

    def stopping(batches: Any, lr: float, wants_stop: bool = False) -> Any:
        return step(batches, lr, trainer.step == steps - 1)

    trainer.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(PreemptedError):
        trainer.fit(PreemptionFlag())


CHAINS: list[list[tuple[int, list[str]]]] = [
    [(2, [STAGE[2]]), (2, [DS, STAGE[1]]), (2, [STAGE[3]])],
    [(4, ["mesh.tp=2"]), (2, [DS, STAGE[3]]), (2, [STAGE[3]])],
    [(4, [DS, STAGE[3], *SPLIT]), (4, [DS, STAGE[1]]), (2, [DS, STAGE[3], CPU])],
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_run_moves_between_engines_stages_and_layouts(
    root: Path, alone: Mesh, chain: list[tuple[int, list[str]]]
) -> None:
    common = ["train.steps=12", "train.micro_batch_size=6", "optim.warmup_steps=1"]
    whole = curve(train(alone, tiny(root, *common, f"run_dir={root}/whole")))
    for (world, layout), stop in zip(chain[:-1], (4, 8), strict=True):
        run_ranks(_stop_after, world, tiny(root, *common, *layout), stop, timeout_s=PATIENCE_S)
    world, layout = chain[-1]
    assert apart(_run(world, tiny(root, *common, *layout)), whole) < 1e-5


@pytest.mark.parametrize("layout", [[STAGE[3]], [STAGE[1], "train.precision=bf16"]], ids=str)
def test_resume_at_the_same_layout_is_bit_identical(root: Path, layout: list[str]) -> None:
    common = [DS, "train.steps=8", "train.micro_batch_size=6", *layout]
    whole = _run(2, tiny(root, *common, f"run_dir={root}/whole"))
    run_ranks(_stop_after, 2, tiny(root, *common), 4, timeout_s=PATIENCE_S)
    assert _run(2, tiny(root, *common)) == whole


def _expect_another_model(mesh: Mesh, config: Config) -> str:
    with pytest.raises(CheckpointError) as caught:
        Trainer(config, mesh)
    return str(caught.value)


def test_another_model_does_not_continue_the_run(root: Path, alone: Mesh) -> None:
    train(alone, tiny(root, "train.steps=1", "optim.warmup_steps=0"))
    config = tiny(root, "model.ffn_size=64", DS)
    for text in run_ranks(_expect_another_model, 2, config, timeout_s=PATIENCE_S):
        assert "of shape" in text


# --- evaluation, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("samples", [5, 1])
def test_ranks_with_unequal_shares_of_the_validation_samples(root: Path, alone: Mesh, samples: int) -> None:
    common = ["train.steps=4", "train.eval_every_steps=2", f"train.eval_samples={samples}"]
    common += ["train.micro_batch_size=1"]
    one = train(alone, tiny(root, *common, f"run_dir={root}/native"))
    two = run_ranks(train, 2, tiny(root, *common, DS, STAGE[3]), timeout_s=PATIENCE_S)[0]
    losses = [[record["val_loss"] for record in records[1::2]] for records in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert apart(curve(two), curve(one)) < 1e-5


def _count(mesh: Mesh, config: Config) -> tuple[int, int]:
    engine = DeepSpeedEngine(config, lay_out(mesh, config))
    return engine.num_parameters, sum(p.stop - p.start for p in engine.state.partitions)


@pytest.mark.parametrize("layout", [[STAGE[1]], [STAGE[3]]], ids=str)
def test_ranks_keep_equal_shares(root: Path, layout: list[str]) -> None:
    counts = run_ranks(_count, 2, tiny(root, DS, *layout), timeout_s=PATIENCE_S)
    total = counts[0][0]
    assert sum(share for _, share in counts) == total
    assert abs(counts[0][1] / total - 0.5) < 0.01


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([CPU], ['mesh.offload="cpu"', 'mesh.zero_engine="deepspeed"']),
        (["mesh.nvme_path=/tmp"], ["mesh.nvme_path", 'mesh.zero_engine="deepspeed"']),
        ([DS, STAGE[0]], ["mesh.zero_stage=0", "1, 2 or 3"]),
        ([DS, "mesh.zero_shard_size=2"], ["mesh.zero_shard_size=2", "use 0"]),
        ([DS, "mesh.pp=2"], ["mesh.pp=2", "use mesh.pp=1"]),
        ([DS, "train.compile=true"], ["train.compile=true", "use false"]),
        ([DS, STAGE[3], "train.recompute=selective"], ['train.recompute="selective"', '"full"']),
        ([DS, "mesh.offload=nvme", "mesh.nvme_path=/tmp"], ["mesh.zero_stage=1", "stage 3 only"]),
        ([DS, STAGE[3], "mesh.offload=nvme"], ['mesh.nvme_path=""', 'offload="nvme"']),
        ([DS, STAGE[3], CPU, "mesh.nvme_path=/tmp"], ['mesh.nvme_path="/tmp"', 'mesh.offload="cpu"']),
    ],
    ids=str,
)
def test_what_an_engine_cannot_do_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(Path("x"), *overrides)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r'pip install "megalite\[deepspeed\]"'):
        Trainer(tiny(root, DS), alone)
    assert not (root / "run").exists()
