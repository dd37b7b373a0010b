"""`megalite check`: what is right passes on any layout, and of what is wrong the part at fault is named."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from megalite import check as checking
from megalite.check import BOUNDS, Answer, Distance, build_cases, check, distance
from megalite.checkpoint.format import TensorSlice
from megalite.cli import main
from megalite.config import Config
from megalite.config_file import to_toml
from megalite.data.batch import Batch
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.engines.engine import StepSums
from megalite.engines.native import NativeEngine
from megalite.errors import DataError
from megalite.parallel.mesh import Mesh
from tests.daily import one_a_day
from tests.ranks import SOLO, run_ranks
from tests.trainer.runs import lay_out, tiny


def checked(mesh: Mesh, config: Config) -> tuple[int, str]:
    """The exit code, and what this rank printed."""
    with redirect_stdout(io.StringIO()) as printed:
        code = check(config, lay_out(mesh, config))
    return code, printed.getvalue()


LAYOUTS = [
    (2, "mesh.tp=2 mesh.sequence_parallel=true train.precision=bf16"),
    (1, "train.precision=bf16"),
    (1, "train.precision=fp16 train.loss_scale=1e18"),
    (2, "mesh.zero_stage=3 train.precision=fp16"),
    (2, "mesh.zero_stage=3 mesh.zero_shard_size=1 train.recompute=full"),
    (2, "mesh.pp=2 mesh.pp_chunks=2 mesh.pp_schedule=interleaved model.num_layers=6 model.dropout=0.1"),
    (2, "mesh.pp=2 mesh.pp_layers=[1,3] model.num_layers=4 mesh.pp_schedule=zero_bubble"),
    (2, "mesh.zero_engine=deepspeed mesh.zero_stage=2 train.precision=bf16"),
    (2, "mesh.zero_engine=deepspeed mesh.zero_stage=3 mesh.offload=cpu"),
    (3, "mesh.zero_stage=2 model.qk_norm=true train.precision=bf16"),
    (4, "mesh.pp=2 mesh.tp=2 model.tie_embeddings=true train.precision=bf16"),
    (4, "mesh.tp=4 mesh.zero_stage=1 model.qkv_bias=true model.norm=layernorm model.position=learned"),
    (2, "data.packing=best_fit train.z_loss=1e-3 optim.grad_clip=0 optim.beta1=0"),
]


@pytest.mark.parametrize(("world", "keys"), one_a_day(*LAYOUTS), ids=str)
def test_what_is_right_passes(root: Path, world: int, keys: str) -> None:
    config = tiny(root, *keys.split())
    (code, printed), *others = run_ranks(checked, world, config)
    assert code == 0, printed
    assert printed.endswith("all agree\n")
    assert others == [(0, "")] * (world - 1)
    assert not (root / "run").exists()


@pytest.mark.slow
def test_what_is_right_passes_compiled(root: Path, alone: Mesh) -> None:
    code, printed = checked(alone, tiny(root, "train.compile=true", "train.precision=bf16"))
    assert code == 0, printed
    assert [line.split()[0] for line in printed.splitlines()[2:-1]] == ["plain", "layout", "bf16", "compiled"]


class _Wrong(NativeEngine):
    """Right in the plain case, which alone has ZeRO 0."""

    @property
    def is_plain(self) -> bool:
        return self.config.mesh.zero_stage == 0

    def gradient(self, name: str) -> torch.Tensor:
        """A parameter's collected gradient, flat."""
        slots = {slot.name: slot for bucket in self.optimizer.layout.buckets for slot in bucket.slots}
        return self.optimizer.gradients.shard_values[slots[name].start : slots[name].stop]


class Doubled(_Wrong):
    """A gradient counted twice in bf16."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        if self.dtype == torch.bfloat16:
            self.gradient("blocks.1.mlp_norm.weight").mul_(2)
        super().optimizer_step(lr, grad_scale)


class Deaf(_Wrong):
    """A parameter too small for the norm to tell that its gradient is missing."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        if not self.is_plain:
            self.gradient("blocks.0.attention_norm.weight").zero_()
        super().optimizer_step(lr, grad_scale)


class Swapped(_Wrong):
    """Gradients of the right lengths in the wrong places."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        if not self.is_plain:
            weight = self.gradient("blocks.1.attention.out.weight").view(32, 32)
            weight[:2] = weight[:2].flip(0).clone()
        super().optimizer_step(lr, grad_scale)


class Scaled(_Wrong):
    """All gradients half as large, as if a sum had become a mean."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        super().optimizer_step(lr, grad_scale / (1 if self.is_plain else 2))


class Still(_Wrong):
    """An optimizer that does nothing after the first step."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        if self.is_plain or self.applied_steps == 0:
            super().optimizer_step(lr, grad_scale)


class Forgetful(_Wrong):
    """A second moment that stays what the first step made it, at which neither loss nor gradient changes."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        moment = self.optimizer.exp_avg_sq
        before = moment.clone()
        super().optimizer_step(lr, grad_scale)
        if not self.is_plain and self.applied_steps > 1:
            moment.copy_(before)


class Decaying(_Wrong):
    """Weight decay on norms as well."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        super().optimizer_step(lr, grad_scale)
        if not self.is_plain:
            self.optimizer.master[self.optimizer.layout.decayed :] *= 1 - lr * self.config.optim.weight_decay


class Empty(_Wrong):
    """A gradient that is not a number, as the norm tells; all are, a step later."""

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepSums:
        sums = super().forward_backward(micro_batches)
        if self.is_plain:
            return sums
        self.gradient("head")[7] = torch.nan
        return replace(sums, grad_norm_squared=math.nan)


@pytest.mark.parametrize(
    ("wrong", "part", "parameter"),
    one_a_day(
        (Doubled, "bf16", "blocks.1.mlp_norm.weight"),
        (Deaf, "layout", "blocks.0.attention_norm.weight"),
        (Swapped, "layout", "blocks.1.attention.out.weight"),
        (Scaled, "layout", ""),
        (Still, "layout", ""),
        (Forgetful, "layout", ""),
        (Decaying, "layout", ""),
        (Empty, "layout", "head"),
    ),
)
def test_the_part_at_fault_is_named(
    root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch, wrong: type, part: str, parameter: str
) -> None:
    monkeypatch.setattr(checking, "engine_class", lambda config, device: wrong)
    # Whatever the learning rate of the run: so small a one would hide what an update does.
    code, printed = checked(alone, tiny(root, "train.precision=bf16", "optim.lr=1e-6"))
    assert code == 1
    *_, verdict = printed.splitlines()
    assert verdict.startswith(f"{part} (")
    (row,) = [line for line in printed.splitlines()[:-1] if line.startswith(part)]
    assert row.endswith(parameter)


def test_without_plain_gradients_nothing_else_is_blamed(root: Path, alone: Mesh) -> None:
    code, printed = checked(alone, tiny(root, "model.init_std=1e30"))
    assert code == 1
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["plain", "the"]


def one_rank_is_stale(mesh: Mesh, config: Config) -> tuple[int, str]:
    """A rank that keeps the norms it began with."""

    class Stale(_Wrong):
        def optimizer_step(self, lr: float, grad_scale: float) -> None:
            norms = [values for slot, values in self.optimizer.weights.kept() if len(slot.spec.shape) == 1]
            before = [values.clone() for values in norms]
            super().optimizer_step(lr, grad_scale)
            if mesh.rank == 1 and not self.is_plain:
                for values, old in zip(norms, before, strict=True):
                    values.copy_(old)

    with mock.patch.object(checking, "engine_class", return_value=Stale):
        return checked(mesh, config)


@pytest.mark.parametrize("stage", one_a_day(3, 1, 2))
def test_weights_that_are_not_sent_show(root: Path, stage: int) -> None:
    (code, printed), _ = run_ranks(one_rank_is_stale, 2, tiny(root, f"mesh.zero_stage={stage}"))
    assert code == 1, printed
    assert "layout (dp 2" in printed


def one_rank_is_off(mesh: Mesh, config: Config) -> tuple[int, str]:
    """A rank that takes its first micro-batch again and again, in the layout."""

    class Repeating(_Wrong):
        def forward_backward(self, micro_batches: Sequence[Batch]) -> StepSums:
            if mesh.rank == 1 and not self.is_plain:
                micro_batches = [micro_batches[0]] * len(micro_batches)
            return super().forward_backward(micro_batches)

    with mock.patch.object(checking, "engine_class", return_value=Repeating):
        return checked(mesh, config)


def test_every_rank_hears_of_it(root: Path) -> None:
    (code, printed), other = run_ranks(one_rank_is_off, 2, tiny(root))
    assert code == 1
    assert "layout (dp 2" in printed
    assert other == (1, "")


def test_projections_do_not_depend_on_who_holds_what(root: Path) -> None:
    config = tiny(root)
    shapes = {"embedding": (257, 32), "blocks.1.mlp.up.weight": (96, 32), "norm.weight": (32,)}
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).flatten() for name, shape in shapes.items()}

    def cut(count: int) -> Iterable[TensorSlice]:
        for name, whole in values.items():
            edges = [len(whole) * n // count for n in range(count + 1)]
            for start, stop in zip(edges, edges[1:], strict=False):
                yield TensorSlice("exp_avg", name, shapes[name], start, stop, whole[start:stop])
                yield TensorSlice("exp_avg_sq", name, shapes[name], start, stop, whole[start:stop].square())
                yield TensorSlice("weight", name, shapes[name], start, stop, whole[start:stop])

    def projected(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return checking._project(SimpleNamespace(state_slices=lambda: cut(count)), config, SOLO)  # type: ignore[arg-type]

    lengths, projections = projected(1)
    for count in (2, 5):
        for ours, theirs in zip(projected(count), (lengths, projections), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    names = checking._parameters(config)
    for name, whole in values.items():
        found = lengths[:, names.index(name)].tolist()
        assert found == pytest.approx([float(whole.double().norm()), float(whole.double().square().norm())])
    assert float(lengths.count_nonzero()) == 2 * len(values)


def test_projections_tell_how_far_apart_gradients_are(root: Path) -> None:
    """Of 60 pairs the estimate is never off by more than a factor of 2.5, whatever the difference is."""
    config = tiny(root)
    names = checking._parameters(config)
    generator = torch.Generator().manual_seed(1)
    ratios = []
    for trial in range(60):
        gradient = torch.randn(96 * 32, generator=generator)
        sparse = (torch.rand(96 * 32, generator=generator) < (0.002, 0.1, 1)[trial % 3]).float()
        change = torch.randn(96 * 32, generator=generator) * sparse * 0.01
        answers = []
        for values in (gradient, gradient + change):
            part = TensorSlice("exp_avg", "blocks.1.mlp.up.weight", (96, 32), 0, 96 * 32, values)
            engine = SimpleNamespace(state_slices=lambda part=part: [part])
            answers.append(Answer([1.0], [1.0], *checking._project(engine, config, SOLO)))  # type: ignore[arg-type]
        found = distance(answers[1], answers[0], names)
        assert found.parameter == "blocks.1.mlp.up.weight"
        ratios.append(found.gradient / float(change.norm() / gradient.norm()))
    assert 1 / 2.5 < min(ratios) < 0.9
    assert 1.1 < max(ratios) < 2.5
    assert 0.9 < float(np.sqrt(np.mean(np.square(ratios)))) < 1.1


@pytest.mark.slow
def test_batches_without_labels_are_passed_over(root: Path, alone: Mesh) -> None:
    """As in a run, which takes no step of them."""
    tokenizer = ByteTokenizer()
    text = np.append(np.arange(63) % 50, tokenizer.eos_id)
    for name, every in (("some", 13), ("none", 1000)):
        with ShardWriter(root / name, tokenizer, has_loss_mask=True) as writer:
            for index in range(60):
                writer.write(
                    f"{index}", "masked", text, loss_spans=[(60, 63)] if index % every == every - 1 else []
                )
    keys = ["data.validation=[]", "train.micro_batch_size=1"]
    code, printed = checked(alone, tiny(root, *keys, f"data.sources=[{{path='{root}/some'}}]"))
    assert code == 0, printed
    with pytest.raises(DataError, match="of the first 100 batches of 2 samples 0 have a token to predict"):
        checked(alone, tiny(root, *keys, f"data.sources=[{{path='{root}/none'}}]"))


def test_nothing_is_within_bounds_that_is_not_a_number() -> None:
    assert not Distance(0, 0, 0).exceeds(BOUNDS["fp32"])
    for bounds in BOUNDS.values():
        for place in range(3):
            values = [0.0, 0.0, 0.0]
            values[place] = float("nan")
            assert Distance(*values).exceeds(bounds)
            values[place] = bounds[place] * 1.01  # type: ignore[operator]
            assert Distance(*values).exceeds(bounds)


def test_zero_is_no_distance_from_zero() -> None:
    zeros = Answer([2.0, 2.0], [0.0, 0.0], torch.zeros(2, 1), torch.zeros(2, 1, 16))
    assert distance(zeros, zeros, ["head"]) == (0, 0, 0, "head")
    assert distance(zeros._replace(norms=[0.0, 1.0]), zeros, ["head"]).norm == math.inf
    assert math.isnan(distance(zeros._replace(losses=[2.0, math.nan]), zeros, ["head"]).loss)
    assert distance(zeros._replace(losses=[3.0]), zeros, ["head"]).loss == 0.5


@pytest.mark.parametrize(
    ("keys", "layers", "batch"),
    [
        ("", 3, 4),
        ("model.num_layers=2", 2, 4),
        ("train.micro_batch_size=24", 3, 24),
        ("mesh.pp_layers=[8]", 8, 4),
    ],
)
def test_what_is_computed(root: Path, alone: Mesh, keys: str, layers: int, batch: int) -> None:
    cases = build_cases(tiny(root, "model.num_layers=8", *keys.split()), alone)
    assert [case.part for case in cases] == ["plain", "layout"]
    for case in cases:
        assert case.config.model.num_layers == layers
        assert case.config.train.global_batch_size == batch
    assert cases[0].config.train.micro_batch_size == 1


@pytest.mark.slow
def test_kernels_are_a_part_of_their_own(root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here those of the plain formulas take their place; the plain case has torch's, whatever is asked."""
    monkeypatch.setenv("MEGALITE_KERNELS", "reference")
    asked = []

    class Asked(NativeEngine):
        def optimizer_step(self, lr: float, grad_scale: float) -> None:
            asked.append(os.environ["MEGALITE_KERNELS"])
            super().optimizer_step(lr, grad_scale)

    monkeypatch.setattr(checking, "engine_class", lambda config, device: Asked)
    code, printed = checked(alone, tiny(root))
    assert code == 0, printed
    assert asked == ["torch"] * 3 + ["reference"] * 6
    assert re.findall(r"^(\w+) ", printed, re.M)[1:4] == ["plain", "kernels", "layout"]
    assert os.environ["MEGALITE_KERNELS"] == "reference"


@pytest.mark.slow
def test_the_command(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "tiny.toml"
    path.write_text(to_toml(tiny(root)))
    assert main(["check", str(path), "mesh.zero_stage=2"]) == 0
    assert "ZeRO 2" in capsys.readouterr().out
    monkeypatch.setattr(checking, "engine_class", lambda config, device: Scaled)
    assert main(["check", str(path)]) == 1
    assert "do not train with it" in capsys.readouterr().out
    assert main(["check", str(path), "mesh.tp=2"]) == 2
    assert "mesh.tp=2 × mesh.pp=1 does not divide" in capsys.readouterr().err
    assert main(["check", str(path), "data.sources=[]"]) == 2
    assert "data.sources is empty" in capsys.readouterr().err
