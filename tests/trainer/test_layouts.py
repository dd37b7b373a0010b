"""One answer on every layout: the same loss and the same gradient norm before clipping."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalite.parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.trainer.runs import curve, tiny, train


def _relative(ours: list[tuple[float, float]], reference: list[tuple[float, float]]) -> float:
    assert len(ours) == len(reference)
    return max(
        abs(a / b - 1) for x, y in zip(ours, reference, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module")
def reference(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    import torch

    from megalite.parallel.mesh import Axis

    mesh = Mesh(0, 1, Axis(), torch.device("cpu"))
    run = tmp_path_factory.mktemp("reference") / "run"
    return curve(train(mesh, tiny(datasets, f"run_dir={run}")))


LAYOUTS = [
    (1, ["train.micro_batch_size=24"]),
    (1, ["train.micro_batch_size=1"]),
    (2, ["mesh.zero_stage=0"]),
    (2, ["mesh.zero_stage=1"]),
    (2, ["mesh.zero_stage=1", "mesh.bucket_mib=100"]),
    (2, ["mesh.zero_stage=1", "train.micro_batch_size=12"]),
    (3, ["mesh.zero_stage=1"]),
    (3, ["mesh.zero_stage=0", "train.micro_batch_size=1"]),
    (4, ["mesh.zero_stage=1", "mesh.bucket_mib=0.001"]),
    (4, ["mesh.zero_stage=0"]),
    (2, ["train.recompute=full"]),
    (2, ["train.recompute=selective"]),
    (2, ["mesh.tp=2", "train.micro_batch_size=12"]),
    (2, ["mesh.tp=2", "mesh.sequence_parallel=true", "train.micro_batch_size=8"]),
    (2, ["mesh.tp=2", "train.recompute=full", "train.micro_batch_size=24"]),
    (
        2,
        [
            "mesh.tp=2",
            "mesh.sequence_parallel=true",
            "train.recompute=selective",
            "train.micro_batch_size=24",
        ],
    ),
    (4, ["mesh.tp=4", "train.micro_batch_size=24"]),  # two ranks share each key head
    (4, ["mesh.tp=4", "mesh.sequence_parallel=true", "train.micro_batch_size=24"]),
    (4, ["mesh.tp=2", "mesh.zero_stage=0", "train.micro_batch_size=12"]),
    (4, ["mesh.tp=2", "mesh.zero_stage=1", "train.micro_batch_size=6"]),
    (
        4,
        ["mesh.tp=2", "mesh.sequence_parallel=true", "mesh.bucket_mib=0.001", "train.micro_batch_size=12"],
    ),
]


@pytest.mark.parametrize(("world", "overrides"), LAYOUTS, ids=lambda v: str(v).replace(" ", ""))
def test_every_layout_gives_the_answer_of_one_process(
    root: Path, reference: list[tuple[float, float]], world: int, overrides: list[str]
) -> None:
    records = run_ranks(train, world, tiny(root, *overrides))[0]
    assert _relative(curve(records), reference) < 1e-5


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
    ["model.dropout=0.2"],
    ["train.z_loss=1e-3"],
    ["data.document_mask=false"],
    ["optim.grad_clip=0.1"],
]


@pytest.mark.parametrize(
    "layout", [["mesh.tp=1"], ["mesh.tp=2"], ["mesh.tp=2", "mesh.sequence_parallel=true"]]
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v[0])
def test_model_variants_agree_across_layouts(
    root: Path, alone: Mesh, variant: list[str], layout: list[str]
) -> None:
    common = ["train.steps=8", "train.micro_batch_size=12", *variant]
    one = curve(train(alone, tiny(root, *common)))
    two = run_ranks(train, 2, tiny(root, *common, f"run_dir={root}/two", *layout))[0]
    assert _relative(curve(two), one) < 1e-5


def test_bf16_stays_near_fp32_and_agrees_across_layouts(
    root: Path, reference: list[tuple[float, float]]
) -> None:
    layouts = {"dp": [], "tp": ["mesh.tp=2"], "sp": ["mesh.tp=2", "mesh.sequence_parallel=true"]}
    divided = [
        curve(run_ranks(train, 2, tiny(root, "train.precision=bf16", f"run_dir={root}/{name}", *layout))[0])
        for name, layout in layouts.items()
    ]
    one = curve(run_ranks(train, 1, tiny(root, "train.precision=bf16", f"run_dir={root}/one"))[0])
    # A bf16 product carries 2⁻⁸ of relative rounding; the loss averages over 768 tokens.
    assert max(abs(a[0] / b[0] - 1) for a, b in zip(one, reference, strict=True)) < 2**-8
    for two in divided:
        assert max(abs(a[0] / b[0] - 1) for a, b in zip(two, one, strict=True)) < 2**-10


def _memory(mesh: Mesh, config: object) -> int:
    from megalite.config import Config
    from megalite.engines.native import NativeEngine

    assert isinstance(config, Config)
    optimizer = NativeEngine(config, mesh).optimizer
    tensors = [optimizer.weights, optimizer.grads, optimizer.grad_shard, optimizer.master]
    tensors += [optimizer.exp_avg, optimizer.exp_avg_sq]
    return sum(size for _, size in {(t.data_ptr(), t.numel() * t.element_size()) for t in tensors})


@pytest.mark.parametrize(
    ("stage", "precision", "world", "bytes_each"),
    [
        (0, "fp32", 2, 16),
        (0, "bf16", 2, 18),
        (1, "bf16", 2, 6 + 16 / 2),
        (1, "bf16", 4, 6 + 16 / 4),
        (1, "fp32", 4, 8 + 16 / 4),
    ],
)
def test_memory_a_rank_follows_the_formula(
    root: Path, stage: int, precision: str, world: int, bytes_each: float
) -> None:
    config = tiny(root, f"mesh.zero_stage={stage}", f"train.precision={precision}")
    from megalite.model.flops import count_parameters

    expected = bytes_each * count_parameters(config.model)
    for measured in run_ranks(_memory, world, config):
        assert abs(measured / expected - 1) < 0.05
