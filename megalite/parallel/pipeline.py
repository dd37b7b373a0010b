"""The pipeline's executor: one loop that carries out any schedule on this rank.

Every rank derives its program from the whole schedule: the simulated timeline is one sequence of
actions; after each action that makes a message comes the transfer of that message; a rank's program is
what of this sequence concerns it. Hence

- any two ranks name the transfers between them in the same order, which is all that nccl, without
  tags, pairs them by (gloo is given the transfer's number as its tag);
- no deadlock, even if every send blocked until it is received: of the events not done, take the first
  of the sequence. All earlier ones are done, so each rank that takes part has come to it, and what it
  needs has been made. So it can be done.

Sends and receives run in the background. A receive is posted at its place in the sequence:
before its message is made, if ranks keep time, and ahead of its use by no more than the sender is.
As blocking sends would be safe, so is waiting for one at any time; few of their buffers are kept.

Sources: Narayanan et al. 2021 (Megatron-LM), section 2.2; Qi et al. 2023, section 2
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalite.parallel.collectives import Pending, start_receive, start_send
from megalite.parallel.deferred import WeightGradients, deferring
from megalite.parallel.mesh import Axis
from megalite.parallel.schedule import Action, Kind, Message, Schedule, consumed, count_stages, produced
from megalite.parallel.timeline import simulate

_SENDS_IN_FLIGHT = 4  # buffers kept for a receiver that is late; more would only hide a slower rank


@dataclass(frozen=True)
class Transfer:
    """A message on its way from one rank to another; `number` counts those of the whole step."""

    message: Message
    sender: int
    receiver: int
    number: int


@dataclass(frozen=True)
class Program:
    """What one rank does in a step: its actions, and the transfers it takes part in, in order."""

    rank: int
    pp: int
    stages: int
    steps: tuple[Action | Transfer, ...]


def build_programs(schedule: Schedule) -> tuple[Program, ...]:
    """Every rank's program; a rank needs only its own, and builds it once for all steps.

    Raises:  ValueError if the schedule cannot be carried out, see `simulate`
    """
    pp, stages = len(schedule), count_stages(schedule)
    spans = [span for rank in simulate(schedule).ranks for span in rank]
    steps: list[list[Action | Transfer]] = [[] for _ in range(pp)]
    number = 0
    # Every action takes time, so by their ends all come after what they need.
    for span in sorted(spans, key=lambda span: span.end):
        sender = span.action.stage % pp
        steps[sender].append(span.action)
        message = produced(span.action, stages)
        if message is not None and message.stage % pp != sender:
            transfer = Transfer(message, sender, message.stage % pp, number)
            steps[transfer.sender].append(transfer)
            steps[transfer.receiver].append(transfer)
            number += 1
    return tuple(Program(rank, pp, stages, tuple(steps[rank])) for rank in range(pp))


class StageForward(Protocol):
    """The computation of one stage."""

    def __call__(self, stage: int, micro_batch: int, x: Tensor | None, /) -> Tensor:
        """The stage's output for one micro-batch.

        `x` is the previous stage's output, None for the first stage, which reads data. The last stage
        returns in training the 0-dim loss to be differentiated, in evaluation what it likes.
        """


@dataclass
class _Kept:
    """What a stage keeps of a micro-batch between its forward and the end of its backward."""

    x: Tensor | None
    output: GradientEdge | None  # where backward begins; the values are the next stage's to keep
    gradients: WeightGradients | None


class Pipeline:
    """Runs programs on this rank's stages. It owns autograd; parameters and data are the stages' own.

    Gradients accumulate in `parameter.grad`, as after that many calls of backward, in the order of the
    micro-batches whatever the schedule.
    """

    def __init__(self, stages: Sequence[StageForward], axis: Axis, device: torch.device) -> None:
        """`stages` holds a computation for each chunk: stage `chunk * axis.size + axis.rank` of all."""
        self.stages, self.axis, self.device = list(stages), axis, device

    def run(self, program: Program, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Carry out one step, for training or for evaluation, as the program has it.

        Every rank of the axis calls it with its program of the same schedule. All activations between
        stages, and their gradients, have this one shape and dtype, for every micro-batch.

        Shapes:  returns, on the last rank, the last stage's outputs in the order of the micro-batches,
                 without their graphs; elsewhere nothing
        Comm:    one send and one receive of `shape` for each micro-batch, stage and direction
        Raises:  ValueError if the program is another rank's or has other stages, or if a stage's output
                 is not of the shape and dtype announced
        """
        expected = (self.axis.rank, self.axis.size, self.axis.size * len(self.stages))
        if (program.rank, program.pp, program.stages) != expected:
            raise ValueError(
                f"program for (rank, ranks, stages) = {(program.rank, program.pp, program.stages)}, this "
                f"pipeline's are {expected}"
            )
        is_training = any(isinstance(s, Action) and s.kind is not Kind.FORWARD for s in program.steps)
        with torch.set_grad_enabled(is_training):
            return _Run(self, program, torch.Size(shape), dtype).outputs()


class _Run:
    """One step under way."""

    def __init__(self, pipeline: Pipeline, program: Program, shape: torch.Size, dtype: torch.dtype) -> None:
        self.stages, self.axis, self.device = pipeline.stages, pipeline.axis, pipeline.device
        self.program, self.shape, self.dtype = program, shape, dtype
        split = [s for s in program.steps if isinstance(s, Action) and s.kind is Kind.WEIGHT_GRAD]
        self.split = {(action.stage, action.micro_batch) for action in split}
        self.messages: dict[Message, Tensor] = {}
        self.receiving: dict[Message, Pending] = {}
        self.sending: deque[tuple[Pending, Tensor]] = deque()
        self.kept: dict[tuple[int, int], _Kept] = {}
        self.results: dict[int, Tensor] = {}

    def outputs(self) -> list[Tensor]:
        """Perform the program; the last stage's outputs."""
        for step in self.program.steps:
            if isinstance(step, Transfer):
                self._transfer(step)
            elif step.kind is Kind.FORWARD:
                self._forward(step)
            elif step.kind is Kind.WEIGHT_GRAD:
                self._weight_grad(step)
            else:
                self._backward(step)
        self._finish_sends(0)
        return [self.results[index] for index in sorted(self.results)]

    def _forward(self, action: Action) -> None:
        key = (action.stage, action.micro_batch)
        x = self._take(action)
        if x is not None and torch.is_grad_enabled():
            x.requires_grad_()
        gradients = WeightGradients() if key in self.split else None
        with deferring(gradients):
            y = self.stages[action.stage // self.axis.size](*key, x)
        if torch.is_grad_enabled():
            # A stage without parameters that reads data has nothing to differentiate.
            self.kept[key] = _Kept(x, get_gradient_edge(y) if y.requires_grad else None, gradients)
        message = produced(action, self.program.stages)
        if message is None:
            self.results[action.micro_batch] = y.detach()
        else:
            self._check(action, y)
            self.messages[message] = y.detach()

    def _backward(self, action: Action) -> None:
        """The whole backward, or its input half: the layers know from their forward which it is."""
        key = (action.stage, action.micro_batch)
        kept = self.kept[key] if action.kind is Kind.INPUT_GRAD else self.kept.pop(key)
        # None where the output is the loss, and not ones: given a gradient, torch compares shapes by means of
        # sympy, whose import takes half a second.
        gradient = self._take(action)
        if kept.output is not None:
            with deferring(kept.gradients):
                torch.autograd.backward(kept.output, gradient)
        message = produced(action, self.program.stages)
        if message is not None and kept.x is not None:
            grad = kept.x.grad
            self.messages[message] = torch.zeros_like(kept.x) if grad is None else grad
        kept.x = kept.output = None

    def _weight_grad(self, action: Action) -> None:
        gradients = self.kept.pop((action.stage, action.micro_batch)).gradients
        if gradients is not None:
            gradients.run()

    def _take(self, action: Action) -> Tensor | None:
        """The message an action consumes, as a leaf of its own; None at the pipeline's ends."""
        message = consumed(action, self.program.stages)
        if message is None:
            return None
        if message in self.receiving:
            self.receiving.pop(message).wait()
        return self.messages.pop(message).detach()

    def _transfer(self, transfer: Transfer) -> None:
        if transfer.receiver == self.axis.rank:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.messages[transfer.message] = buffer
            pending = start_receive(buffer, transfer.sender, self.axis, transfer.number)
            self.receiving[transfer.message] = pending
        else:
            tensor = self.messages.pop(transfer.message).contiguous()
            self.sending.append((start_send(tensor, transfer.receiver, self.axis, transfer.number), tensor))
            self._finish_sends(_SENDS_IN_FLIGHT)

    def _finish_sends(self, leave: int) -> None:
        """Wait for the oldest sends, and let go of their tensors, until `leave` are under way."""
        while len(self.sending) > leave:
            pending, _tensor = self.sending.popleft()
            pending.wait()

    def _check(self, action: Action, y: Tensor) -> None:
        if y.shape != self.shape or y.dtype != self.dtype:
            raise ValueError(
                f"stage {action.stage} returned {tuple(y.shape)} {y.dtype} for micro-batch "
                f"{action.micro_batch}; the step was announced with {tuple(self.shape)} {self.dtype}"
            )
