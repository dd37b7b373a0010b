"""What the executor's steps cost: operations, activations alive, and time, against the simulation."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.parallel.collectives import all_reduce
from megalite.parallel.deferred import WeightGradients, current_gradients, linear
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.pipeline import Pipeline, build_programs
from megalite.parallel.schedule import build_schedule
from megalite.parallel.timeline import simulate
from tests.parallel.test_pipeline import LAYERS, SHAPE, WIDTH, Case, Model
from tests.ranks import SOLO, run_ranks

UNIT_S = 0.02


class Counting(TorchDispatchMode):
    """Counts products of matrices, and a step that every way from the loss to a weight passes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.tanh_backwards = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """See the base class."""
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.tanh_backwards += func is torch.ops.aten.tanh_backward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_each_product_once_and_weight_gradients_in_their_action(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products a layer and micro-batch; the third in W where the schedule has one."""
    within_w: list[tuple[int, int]] = []
    run = WeightGradients.run

    def counted(gradients: WeightGradients) -> None:
        assert len(gradients) == 2 * LAYERS  # weights and biases
        before = counting.products, counting.tanh_backwards
        run(gradients)
        within_w.append((counting.products - before[0], counting.tanh_backwards - before[1]))

    monkeypatch.setattr(WeightGradients, "run", counted)
    pipeline = Pipeline([Model(1).forward], Axis(), torch.device("cpu"))
    with Counting() as counting:
        pipeline.run(build_programs(build_schedule(name, 1, 2))[0], SHAPE, torch.float64)
    assert counting.products == 2 * 3 * LAYERS
    assert counting.tanh_backwards == 2 * LAYERS
    assert within_w == ([(LAYERS, 0), (LAYERS, 0)] if name == "zero_bubble" else [])


def watch_memory(mesh: Mesh, case: Case) -> tuple[int, int]:
    """Most activations alive at once, and how many are alive at the end.

    One activation a stage and micro-batch is watched: the input of its one product, which the
    product's weight gradient needs to the last.
    """
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    weights = [nn.Parameter(torch.eye(WIDTH)) for _ in range(case.chunks)]

    def forward(stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        nonlocal most
        start = torch.ones(SHAPE) if x is None else x
        inner = start * weights[0].sum()
        storage = inner.untyped_storage()
        alive.add(storage)
        most = max(most, len(alive))
        y = linear(inner, weights[stage // case.pp])
        return y.square().sum() if stage == case.pp * case.chunks - 1 else y

    pipeline = Pipeline([forward] * case.chunks, mesh.world, mesh.device)
    program = build_programs(build_schedule(case.name, *case[1:4]))[mesh.rank]
    pipeline.run(program, SHAPE, torch.float32)
    return most, len(alive)


def watch_memory_all(mesh: Mesh, listed: list[Case]) -> list[tuple[int, int]]:
    """Many cases in one call."""
    return [watch_memory(mesh, case) for case in listed]


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_activations_alive_are_those_of_the_schedule(pp: int) -> None:
    listed = [Case(name, pp, 6) for name in ("gpipe", "1f1b", "zero_bubble")]
    listed += [Case("interleaved", pp, 6, 2)]
    ranks = run_ranks(watch_memory_all, pp, listed) if pp > 1 else [watch_memory_all(SOLO, listed)]
    for case, results in zip(listed, zip(*ranks, strict=True), strict=True):
        peaks = simulate(build_schedule(case.name, *case[1:4])).peak_in_flight
        assert [result[0] for result in results] == list(peaks), case
        assert [result[1] for result in results] == [0] * pp, case


class Idling(torch.autograd.Function):
    """The identity, taking a unit of time forward, one for the input and one for the weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, unit_s: float) -> Tensor:
        """See the base class."""
        ctx.gradients, ctx.weight, ctx.unit_s = current_gradients(), weight, unit_s
        time.sleep(unit_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """See the base class."""

        def weight_gradient() -> Tensor:
            time.sleep(ctx.unit_s)
            return torch.zeros_like(ctx.weight)

        time.sleep(ctx.unit_s)
        if ctx.gradients is None:
            return grads[0], weight_gradient(), None
        ctx.gradients.defer(ctx.weight, weight_gradient)
        return grads[0], None, None


def time_steps(mesh: Mesh, case: Case) -> list[float]:
    """Seconds of three steps whose stages do nothing, for a known time."""
    weight = nn.Parameter(torch.zeros(1))

    def forward(stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        y = Idling.apply(torch.ones(SHAPE) if x is None else x, weight, UNIT_S / case.chunks)
        return y.sum() if stage == case.pp * case.chunks - 1 else y

    pipeline = Pipeline([forward] * case.chunks, mesh.world, mesh.device)
    program = build_programs(build_schedule(case.name, *case[1:4]))[mesh.rank]
    seconds = []
    for _ in range(3):
        all_reduce(torch.zeros(1), mesh.world)
        start = time.perf_counter()
        pipeline.run(program, SHAPE, torch.float32)
        all_reduce(torch.zeros(1), mesh.world)
        seconds.append(time.perf_counter() - start)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case("gpipe", 4, 6), Case("1f1b", 4, 6), Case("interleaved", 4, 6, 2), Case("zero_bubble", 4, 6)]
)
def test_steps_take_the_time_simulated(case: Case) -> None:
    """No send or receive makes a rank wait longer than the schedule does. One rank alone takes 72 units."""
    simulated = simulate(build_schedule(case.name, *case[1:4])).total / case.chunks * UNIT_S
    best = min(map(max, zip(*run_ranks(time_steps, 4, case), strict=True)))
    assert 0.99 * simulated < best < 1.6 * simulated
