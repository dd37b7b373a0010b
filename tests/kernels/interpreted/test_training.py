"""The model trained by interpreted kernels alone, beside torch's path."""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.config import ModelConfig
from megalite.model.transformer import Recompute, Transformer
from megalite.parallel.mesh import Mesh
from megalite_kernels import gpu
from tests.kernels.helpers import held_bytes
from tests.ranks import SOLO, close_pools, run_ranks
from tests.trainer.runs import Curve, apart, curve, losses, tiny, train, write_dataset

SMALL = ["model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1", "model.hidden_size=16"]
SMALL += ["data.seq_len=16", "train.global_batch_size=2", "train.eval_samples=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("training")
    write_dataset(root / "train", seed=1, documents=60)
    write_dataset(root / "valid", seed=2, documents=5)
    yield root
    close_pools()


def train_with(mesh: Mesh, implementation: str, root: str, overrides: list[str]) -> tuple[Curve, set[str]]:
    """The curve, and the names of the kernels that were started."""
    started: set[str] = set()
    modules = [import_module(f"{gpu.__name__}.{info.name}") for info in pkgutil.iter_modules(gpu.__path__)]

    def noting(start: Any) -> Any:
        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            started.add(kernel.fn.__name__)
            start(kernel, *args, **options)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALITE_KERNELS", implementation)
        for module in modules:
            if module.__name__ != "megalite_kernels.gpu.launch" and hasattr(module, "launch"):
                patch.setattr(module, "launch", noting(module.launch))
        config = tiny(
            Path(root), *SMALL, *overrides, f"run_dir={root}/{implementation}-{hash(str(overrides))}"
        )
        return curve(train(mesh, config)), started


def assert_close(ours: Curve, torchs: Curve) -> None:
    assert apart(losses(ours), losses(torchs)) < 1e-5
    assert apart(ours, torchs) < 1e-4


def test_fifty_steps_of_kernels_are_fifty_steps_of_torch(root: Path) -> None:
    steps = ["train.steps=50", "train.micro_batch_size=2", "train.z_loss=1e-4"]
    ours, started = train_with(SOLO, "triton", str(root), steps)
    torchs, none = train_with(SOLO, "torch", str(root), steps)
    assert none == set()
    assert len(started) >= 12, started
    assert_close(ours, torchs)
    assert ours[-1][0] < ours[0][0] - 0.5


@pytest.mark.parametrize(
    "layout",
    [
        ["mesh.tp=2", "mesh.sequence_parallel=true", "model.qk_norm=true"],
        ["mesh.pp=2", 'mesh.pp_schedule="zero_bubble"', "model.num_layers=2", "model.tie_embeddings=true"],
        ["mesh.zero_stage=3", "model.norm=layernorm", "model.activation=gelu", "model.dropout=0.1"],
    ],
    ids=str,
)
def test_kernels_on_every_way_of_dividing_a_model(root: Path, layout: list[str]) -> None:
    overrides = ["train.steps=3", "train.micro_batch_size=1", *layout]
    found = run_ranks(train_with, 2, "triton", str(root), overrides, timeout_s=180)
    expected = run_ranks(train_with, 2, "torch", str(root), overrides, timeout_s=180)
    for (ours, started), (torchs, none) in zip(found, expected, strict=True):
        assert len(started) >= 8, started
        assert none == set()
        assert_close(ours, torchs)


def test_kernels_in_bf16_where_activations_are_computed_again(root: Path) -> None:
    """In this process, to which the interpreter's bf16 has been taught."""
    steps = ["train.steps=4", "train.micro_batch_size=2", "train.precision=bf16", "train.recompute=selective"]
    ours, started = train_with(SOLO, "triton", str(root), steps)
    torchs, _ = train_with(SOLO, "torch", str(root), steps)
    assert len(started) >= 12, started
    assert apart(losses(ours), losses(torchs)) < 2**-8


class _Calls(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_selective_recompute_repeats_no_product_and_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hold the MLP's hidden layer, which the kernel writes beside what is kept."""
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=512
    )
    tokens = torch.arange(16)[None]
    torch.manual_seed(0)
    weights = [0.1 * torch.randn(p.shape) for p in Transformer(config).parameters()]
    calls, held, grads = {}, {}, {}
    for recompute in get_args(Recompute):
        model = Transformer(config, recompute)
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.data.copy_(weight)
        with _Calls() as counted:
            model(tokens).sum().backward()
        calls[recompute] = [counted.of[f"megalite::{name}"] for name in ("attention", "linear_activation")]
        calls[recompute].append(counted.of["aten::mm"])
        grads[recompute] = [p.grad for p in model.parameters() if p.grad is not None]
        held[recompute] = held_bytes(lambda model=model: model(tokens))
    assert calls["none"][:2] == [2, 2]
    assert calls["selective"] == calls["none"]
    assert calls["full"][:2] == [4, 4]
    hidden = 16 * 512 * 4  # bytes of one layer
    assert held["full"] < held["selective"] - 4 * hidden  # a pre-activation is two of it
    assert held["selective"] < held["none"]
    for found in (grads["selective"], grads["full"]):
        assert len(found) == len(grads["none"]) > 10
        assert all(map(torch.equal, found, grads["none"]))
