"""Pipeline schedules as data: which action each rank performs, in which order.

The model is cut into `pp * chunks` stages; stage s lives on rank s % pp, so with several chunks a
micro-batch goes round the ranks once for each. A schedule is nothing but every rank's list of actions.
What is true of it (no deadlock, bubble, memory) is read off by `timeline.simulate`; it is carried out
by `pipeline.Pipeline`. No torch here.

    name          backward     activations in flight, rank r        idle time, m micro-batches
    gpipe         whole        m                                    (pp - 1) · (F + B)
    1f1b          whole        pp - r                               (pp - 1) · (F + B)
    interleaved   whole        2(pp - r - 1) + (chunks - 1)pp + 1   (pp - 1) · (F + B), chunk-sized F, B
    zero_bubble   I, then W    pp (those waiting for W included)    (pp - 1) · (F + I - W)

Sources: Huang et al. 2019 (GPipe); Narayanan et al. 2019 (PipeDream), 2021a (PipeDream-Flush, here
         1f1b) and 2021b (Megatron-LM, section 2.2, interleaved); Qi et al. 2023 (ZB-H1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megalite.errors import ConfigError


class Kind(Enum):
    """What is computed; a backward is either whole, or its two halves at different times."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"


@dataclass(frozen=True)
class Action:
    """One computation of one stage (counted over the whole pipeline) for one micro-batch."""

    kind: Kind
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}@{self.stage}"


Schedule = tuple[tuple[Action, ...], ...]
"""The actions of every rank, in rank order; the rank of a stage is its remainder by the ranks."""


class Message(NamedTuple):
    """What one stage hands to the next: an activation upwards, or a gradient downwards."""

    is_gradient: bool
    micro_batch: int
    stage: int  # the one that consumes it


def build_schedule(name: str, pp: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Each rank's actions for one training step.

    Raises:  ConfigError if the schedule is unknown, a number is below one, or `chunks` exceeds one
             with a schedule that is not interleaved
    """
    if name not in _BUILDERS:
        raise ConfigError(f"mesh.pp_schedule={name!r} is not known; use {', '.join(_BUILDERS)}")
    _check_numbers(pp, micro_batches, chunks)
    if chunks > 1 and name != "interleaved":
        raise ConfigError(
            f"mesh.pp_chunks={chunks} does not go with mesh.pp_schedule={name!r}; use pp_chunks=1, or "
            "pp_schedule='interleaved'"
        )
    return tuple(tuple(_BUILDERS[name](rank, pp, micro_batches, chunks)) for rank in range(pp))


def build_evaluation(pp: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Each rank's forwards, in the order in which an interleaved schedule performs them.

    Raises:  ConfigError if a number is below one
    """
    _check_numbers(pp, micro_batches, chunks)
    return tuple(
        tuple(_round_trips(Kind.FORWARD, rank, pp, micro_batches, range(chunks))) for rank in range(pp)
    )


def count_stages(schedule: Schedule) -> int:
    """Stages of the whole pipeline; every one of them has actions."""
    return 1 + max(action.stage for actions in schedule for action in actions)


def consumed(action: Action, stages: int) -> Message | None:
    """The message an action waits for. The first stage reads data, the last one's gradient is 1."""
    if action.kind is Kind.FORWARD:
        return Message(False, action.micro_batch, action.stage) if action.stage > 0 else None
    if action.kind is Kind.WEIGHT_GRAD or action.stage == stages - 1:
        return None
    return Message(True, action.micro_batch, action.stage)


def produced(action: Action, stages: int) -> Message | None:
    """The message an action makes for a neighbouring stage."""
    if action.kind is Kind.FORWARD:
        return Message(False, action.micro_batch, action.stage + 1) if action.stage < stages - 1 else None
    if action.kind is Kind.WEIGHT_GRAD or action.stage == 0:
        return None
    return Message(True, action.micro_batch, action.stage - 1)


# --- the schedules --------------------------------------------------------------------------------


def _gpipe(rank: int, pp: int, micro_batches: int, chunks: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019, section 2.3).

    Backwards go in the order of the forwards, not reversed: the time is the same, and so is then the
    order in which every schedule adds up gradients, hence the bits of the result.
    """
    return _alternate(*_whole(rank, micro_batches), warm_up=micro_batches)


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int, chunks: int) -> list[Action]:
    """Forwards until the first backward is due, then by turns (Narayanan et al. 2021a, section 3.2)."""
    return _alternate(*_whole(rank, micro_batches), warm_up=pp - rank - 1)


def _interleaved(rank: int, pp: int, micro_batches: int, chunks: int) -> list[Action]:
    """Groups of pp micro-batches go through chunk after chunk (Narayanan et al. 2021b, section 2.2).

    The published order wants whole groups. A last group that is not whole is filled up, and the
    actions of micro-batches that do not exist are left out of the finished order: a micro-batch
    depends on no other, so what is left waits for nothing new and deadlocks as little. (Applied to a
    shorter last group itself, the order deadlocks for 5 micro-batches on 4 ranks with 3 chunks.)
    """
    if chunks == 1:
        return _one_forward_one_backward(rank, pp, micro_batches, chunks)
    whole = -(-micro_batches // pp) * pp
    forwards = _round_trips(Kind.FORWARD, rank, pp, whole, range(chunks))
    backwards = _round_trips(Kind.BACKWARD, rank, pp, whole, range(chunks)[::-1])
    actions = _alternate(forwards, backwards, warm_up=2 * (pp - rank - 1) + (chunks - 1) * pp)
    return [action for action in actions if action.micro_batch < micro_batches]


def _zero_bubble(rank: int, pp: int, micro_batches: int, chunks: int) -> list[Action]:
    """ZB-H1: 1f1b with the weight half put off by `rank` micro-batches (Qi et al. 2023, section 2.1).

    Input gradients so reach the earlier ranks sooner, and the weight halves that wait fill the time
    in which the pipeline drains. Rank r holds pp - r micro-batches before their input gradient, as in
    1f1b, and r between the halves: pp in all, what 1f1b holds on its first rank.
    """
    actions: list[Action] = []
    waiting: list[Action] = []
    for action in _one_forward_one_backward(rank, pp, micro_batches, chunks):
        if action.kind is Kind.FORWARD:
            actions.append(action)
            continue
        actions.append(Action(Kind.INPUT_GRAD, action.micro_batch, rank))
        waiting.append(Action(Kind.WEIGHT_GRAD, action.micro_batch, rank))
        if len(waiting) > rank:
            actions.append(waiting.pop(0))
    return actions + waiting


_BUILDERS: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zero_bubble": _zero_bubble,
}
SCHEDULES = tuple(_BUILDERS)


def _whole(stage: int, micro_batches: int) -> tuple[list[Action], list[Action]]:
    """A stage's forwards and backwards, each in the order of the micro-batches."""
    forwards = [Action(Kind.FORWARD, index, stage) for index in range(micro_batches)]
    return forwards, [Action(Kind.BACKWARD, index, stage) for index in range(micro_batches)]


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then forward and backward by turns, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    turns = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return forwards[:warm_up] + [action for pair in turns for action in pair] + backwards[steady:]


def _round_trips(kind: Kind, rank: int, pp: int, micro_batches: int, chunks: Sequence[int]) -> list[Action]:
    """Groups of up to pp micro-batches, each through all the rank's chunks in the order given."""
    return [
        Action(kind, index, chunk * pp + rank)
        for start in range(0, micro_batches, pp)
        for chunk in chunks
        for index in range(start, min(start + pp, micro_batches))
    ]


def _check_numbers(pp: int, micro_batches: int, chunks: int) -> None:
    for what, value in (("mesh.pp", pp), ("mesh.pp_chunks", chunks)):
        if value < 1:
            raise ConfigError(f"{what}={value} must be at least 1")
    if micro_batches < 1:
        raise ConfigError(
            f"{micro_batches} micro-batches a step must be at least 1; raise train.global_batch_size or "
            "lower train.micro_batch_size"
        )
