"""The executor against a single process: the same losses and gradients, on every schedule and split."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.parallel.deferred import linear
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.pipeline import Pipeline, Program, StageForward, Transfer, build_programs
from megalite.parallel.schedule import Action, Kind, build_evaluation, build_schedule
from megalite.parallel.timeline import simulate
from tests.parallel.test_schedule import cases
from tests.ranks import SOLO, run_ranks

ROWS, WIDTH, LAYERS = 3, 5, 11
SHAPE = (ROWS, WIDTH)


class Case(NamedTuple):
    """A schedule and what it runs on."""

    name: str
    pp: int
    micro_batches: int
    chunks: int = 1
    recompute: bool = False


# --- a model to cut in stages ---------------------------------------------------------------------


class Layer(nn.Module):
    """A residual layer with a deferring product, a weight of its own kind, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(WIDTH, dtype=torch.float64))
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH, dtype=torch.float64))
        self.bias = nn.Parameter(torch.empty(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """x, returned [rows, width]."""
        return x + linear(x * self.scale, self.weight, self.bias).tanh()


class Model:
    """Layers cut unevenly in stages; the same values on every process."""

    def __init__(self, stages: int, recompute: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.layers = [Layer() for _ in range(LAYERS)]
        for layer in self.layers:
            for parameter in layer.parameters():
                parameter.data.normal_(generator=generator)
        self.stages, self.recompute = stages, recompute
        # Stage s ends after ⌊LAYERS · ((s + 1)/stages)²⌋ layers: the first has few, or none.
        ends = [int(LAYERS * ((stage + 1) / stages) ** 2) for stage in range(stages)]
        self.cut = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def inputs(self, micro_batch: int) -> Tensor:
        """A micro-batch; [rows, width]."""
        generator = torch.Generator().manual_seed(1000 + micro_batch)
        return torch.randn(SHAPE, dtype=torch.float64, generator=generator)

    def forward(self, stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        """One stage, as the executor calls it."""
        x = self.inputs(micro_batch) if x is None else x
        for layer in self.layers[self.cut[stage]]:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        if stage < self.stages - 1:
            return x
        return (x * (micro_batch + 1)).square().mean() / WIDTH

    def grads(self, stages: range) -> dict[int, list[list[float]]]:
        """Layer → gradients of its parameters, of all layers in some stages."""
        return {
            number: [
                p.grad.flatten().tolist() for p in self.layers[number].parameters() if p.grad is not None
            ]
            for stage in stages
            for number in range(LAYERS)[self.cut[stage]]
        }


def single_process(micro_batches: int) -> tuple[list[float], dict[int, list[list[float]]]]:
    """Losses and gradients by plain autograd."""
    model = Model(1)
    losses = [model.forward(0, index, None) for index in range(micro_batches)]
    torch.stack(losses).sum().backward()
    return [float(loss.detach()) for loss in losses], model.grads(range(1))


def train(mesh: Mesh, case: Case) -> tuple[list[float], dict[int, list[list[float]]], list[float]]:
    """Two steps, the first one's gradients thrown away, and an evaluation between them."""
    axis = mesh.world
    stages = case.pp * case.chunks
    model = Model(stages, case.recompute)
    pipeline = Pipeline([model.forward] * case.chunks, axis, mesh.device)
    program = build_programs(build_schedule(case.name, *case[1:4]))[axis.rank]
    pipeline.run(program, SHAPE, torch.float64)
    for layer in model.layers:
        layer.zero_grad()
    evaluation = build_programs(build_evaluation(case.pp, case.micro_batches + 1, case.chunks))[axis.rank]
    evaluated = pipeline.run(evaluation, SHAPE, torch.float64)
    losses = pipeline.run(program, SHAPE, torch.float64)
    assert not any(loss.requires_grad for loss in (*losses, *evaluated))
    own = model.grads(range(axis.rank, stages, axis.size))
    return [float(loss) for loss in losses], own, [float(loss) for loss in evaluated]


def train_all(mesh: Mesh, listed: list[Case]) -> list[object]:
    """Many cases in one call."""
    return [train(mesh, case) for case in listed]


def near(values: list[float]) -> object:
    """Equal to 1e-12, relative to the largest value where one is near zero."""
    return pytest.approx(values, rel=1e-12, abs=1e-12 * max(map(abs, values), default=0))


CASES = [
    *(
        Case(name, pp, m)
        for name in ("gpipe", "1f1b", "zero_bubble")
        for pp in (1, 2, 3, 4)
        for m in (1, 2, 5, 8)
    ),
    *(Case("interleaved", pp, m, chunks) for pp in (1, 2, 3, 4) for m in (1, 2, 5, 8) for chunks in (1, 2)),
    Case("interleaved", 2, 5, 3),
    Case("1f1b", 2, 5, recompute=True),
    Case("zero_bubble", 2, 5, recompute=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_losses_and_gradients_are_those_of_one_process(pp: int) -> None:
    listed = [case for case in CASES if case.pp == pp]
    ranks = run_ranks(train_all, pp, listed) if pp > 1 else [train_all(SOLO, listed)]
    for case, results in zip(listed, zip(*ranks, strict=True), strict=True):
        losses, grads = single_process(case.micro_batches)
        assert results[-1][0] == near(losses), case
        assert results[-1][2] == near(single_process(case.micro_batches + 1)[0]), case
        assert all(not result[0] and not result[2] for result in results[:-1]), case
        found = {number: own for result in results for number, own in result[1].items()}
        assert found.keys() == grads.keys(), case
        for number, expected in grads.items():
            assert len(found[number]) == 3, (case, number)
            for mine, theirs in zip(found[number], expected, strict=True):
                assert mine == near(theirs), (case, number)


# --- the order of messages ------------------------------------------------------------------------


def run_with_rendezvous(programs: tuple[Program, ...]) -> list[Action | Transfer]:
    """Programs in which every send waits for its receive and every receive for its send.

    The events as they happen. A transfer needs both ranks to stand at it; so this also refuses ranks
    that name their transfers in different orders.
    """
    at = [0] * len(programs)
    events: list[Action | Transfer] = []
    while True:
        heads = [p.steps[i] if i < len(p.steps) else None for p, i in zip(programs, at, strict=True)]
        if not any(heads):
            return events
        for rank, head in enumerate(heads):
            ends = {head.sender, head.receiver} if isinstance(head, Transfer) else {rank}
            if head is not None and all(heads[end] is head for end in ends):
                events.append(head)
                for end in ends:
                    at[end] += 1
                break
        else:
            raise RuntimeError(f"deadlock at {heads}")


@given(cases())
@settings(max_examples=150, deadline=None)
def test_no_deadlock_with_sends_that_block(case: tuple[str, int, int, int]) -> None:
    for schedule in (build_schedule(*case), build_evaluation(*case[1:])):
        programs = build_programs(schedule)
        events = run_with_rendezvous(programs)
        actions = [action for actions in schedule for action in actions]
        assert Counter(e for e in events if isinstance(e, Action)) == Counter(actions)
        for rank, program in enumerate(programs):
            assert tuple(s for s in program.steps if isinstance(s, Action)) == schedule[rank]
        transfers = {e.number: e for e in events if isinstance(e, Transfer)}
        assert len(transfers) == sum(isinstance(e, Transfer) for e in events)  # each number once


@given(cases())
@settings(max_examples=100, deadline=None)
def test_receives_are_posted_in_time_and_not_long_before(case: tuple[str, int, int, int]) -> None:
    """Before the message is made, in simulated time; and never more of them than the sender's lead."""
    schedule = build_schedule(*case)
    timeline = simulate(schedule)
    end = {span.action: span.end for spans in timeline.ranks for span in spans}
    for program in build_programs(schedule):
        now, posted = 0.0, set()
        for step in program.steps:
            if isinstance(step, Action):
                now = end[step]
                posted -= {(step.kind is not Kind.FORWARD, step.micro_batch, step.stage)}
            elif step.receiver == program.rank:
                message = step.message
                kinds = (Kind.BACKWARD, Kind.INPUT_GRAD) if message.is_gradient else (Kind.FORWARD,)
                stage = message.stage + 1 if message.is_gradient else message.stage - 1
                made = min(end.get(Action(k, message.micro_batch, stage), math.inf) for k in kinds)
                assert now <= made
                posted.add(tuple(message))
                assert len(posted) <= 2 * max(timeline.peak_in_flight)


# --- odd stages, and mistakes ---------------------------------------------------------------------


def one_rank(forward: StageForward, chunks: int, name: str = "interleaved") -> list[Tensor]:
    """A step of two micro-batches on this process."""
    programs = build_programs(build_schedule(name, 1, 2, chunks))
    return Pipeline([forward] * chunks, Axis(), torch.device("cpu")).run(programs[0], SHAPE, torch.float64)


def test_a_stage_that_ignores_its_input_passes_zeros_back() -> None:
    first, last = (nn.Parameter(torch.ones(SHAPE, dtype=torch.float64)) for _ in range(2))

    def forward(stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        return first * 2 if stage == 0 else last.square().sum()

    assert [float(loss) for loss in one_rank(forward, 2)] == [ROWS * WIDTH] * 2
    assert first.grad is not None
    assert not first.grad.any()
    torch.testing.assert_close(last.grad, torch.full_like(last, 4.0))


def test_a_pipeline_without_parameters() -> None:
    def forward(stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        if stage == 0:
            return torch.full(SHAPE, float(micro_batch), dtype=torch.float64)
        assert x is not None
        return x.sum() if stage == 2 else x  # a stage may hand on what it was given

    assert [float(loss) for loss in one_rank(forward, 3)] == [0, ROWS * WIDTH]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            torch.ones(2, WIDTH, dtype=torch.float64),
            r"stage 0 returned \(2, 5\) torch.float64 for micro-batch 0",
        ),
        (
            torch.ones(SHAPE),
            r"torch.float32 for micro-batch 0; the step was announced with \(3, 5\) torch.float64",
        ),
    ],
)
def test_output_of_another_shape_or_dtype_is_refused(made: Tensor, message: str) -> None:
    """Before it is sent: the receiver would take it for something else, or wait for the rest."""
    with pytest.raises(ValueError, match=message):
        one_rank(lambda stage, micro_batch, x, /: made, 2)


def test_program_of_another_rank_is_refused() -> None:
    program = build_programs(build_schedule("1f1b", 2, 2))[1]
    pipeline = Pipeline([Model(1).forward], Axis(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"= \(1, 2, 2\), this pipeline's are \(0, 1, 1\)"):
        pipeline.run(program, SHAPE, torch.float64)


def test_schedule_that_cannot_run_is_refused_before_it_does() -> None:
    with pytest.raises(ValueError, match="deadlock"):
        build_programs(((), (Action(Kind.FORWARD, 0, 1),)))


def send_narrow(mesh: Mesh) -> tuple[float, float]:
    """bf16 activations that are not contiguous; my weight's gradient and the sum of losses."""
    weight = nn.Parameter(torch.full((4,), 1.0 + mesh.rank, dtype=torch.bfloat16))

    def forward(stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        if x is None:
            return (weight * torch.ones(6, 4, dtype=torch.bfloat16)).t()
        return (x.t() * weight).float().sum()

    pipeline = Pipeline([forward], mesh.world, mesh.device)
    program = build_programs(build_schedule("1f1b", 2, 3))[mesh.rank]
    losses = pipeline.run(program, (4, 6), torch.bfloat16)
    assert weight.grad is not None
    return float(weight.grad[0]), sum(float(loss) for loss in losses)


def test_bf16_activations_of_any_stride() -> None:
    assert run_ranks(send_narrow, 2) == [(3 * 6 * 2, 0), (3 * 6, 3 * 24 * 2)]
