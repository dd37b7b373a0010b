"""What a schedule costs, without running it: times, bubble, activations held, and a drawing.

Sources: Huang et al. 2019, section 2.3; Narayanan et al. 2021, section 2.2; Qi et al. 2023, table 2
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import ConfigError
from megalite.parallel.schedule import Action, Kind, Message, Schedule, consumed, count_stages, produced

UNIT_DURATIONS: Mapping[Kind, float] = {
    Kind.FORWARD: 1,
    Kind.BACKWARD: 2,
    Kind.INPUT_GRAD: 1,
    Kind.WEIGHT_GRAD: 1,
}
"""A backward costs two forwards, its halves one each: each is one product per weight matrix."""


_MAX_CELLS = 10**7  # of a drawing: some tens of megabytes of text


@dataclass(frozen=True)
class Span:
    """An action and when it runs, in units of time from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step: the spans of every rank in order, and the most activations each rank held.

    An activation is what one stage keeps of one micro-batch from the start of its forward to the end
    of its backward (of its weight half, where the backward is split). With several chunks a rank's
    stages, and so its activations, are smaller by as much.
    """

    ranks: tuple[tuple[Span, ...], ...]
    peak_in_flight: tuple[int, ...]

    @property
    def total(self) -> float:
        """Units of time from the first action's start to the last one's end."""
        return max((span.end for spans in self.ranks for span in spans), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """The part of all ranks' time in which they are idle, 0 to 1."""
        busy = sum(span.end - span.start for spans in self.ranks for span in spans)
        return 1 - busy / (len(self.ranks) * self.total) if busy else 0.0


def simulate(schedule: Schedule, durations: Mapping[Kind, float] = UNIT_DURATIONS) -> Timeline:
    """Run a schedule on paper: each rank in its order, each action once what it needs is there.

    A message takes no time and its sender does not wait, which is what the executor does: it sends in
    the background, and in the order of this timeline, so no message waits for one made after it.

    Raises:  ValueError if an action stands on the wrong rank, comes twice or before what it needs, or
             if ranks wait for each other in a circle
    """
    stages = count_stages(schedule)
    queues = [deque(actions) for actions in schedule]
    spans: list[list[Span]] = [[] for _ in schedule]
    held: list[set[tuple[int, int]]] = [set() for _ in schedule]
    peaks = [0] * len(schedule)
    done: set[Action] = set()
    ready: dict[Message | None, float] = {None: 0.0}  # what waits for no message can always start

    awake = deque(range(len(schedule)))  # ranks that may not be waiting for a message
    while awake:
        rank = awake[0]
        if not queues[rank] or consumed(queues[rank][0], stages) not in ready:
            awake.popleft()
            continue
        action = queues[rank].popleft()
        _check_place(action, rank, len(schedule), done)
        start = max(spans[rank][-1].end if spans[rank] else 0.0, ready[consumed(action, stages)])
        span = Span(action, start, start + durations[action.kind])
        spans[rank].append(span)
        done.add(action)
        if message := produced(action, stages):
            ready[message] = span.end
            awake.append(message.stage % len(schedule))
        _account(action, held[rank])
        peaks[rank] = max(peaks[rank], len(held[rank]))
    if stuck := [f"rank {rank} at {queue[0]}" for rank, queue in enumerate(queues) if queue]:
        raise ValueError(f"deadlock: no message arrives for {', '.join(stuck)} (of {stages} stages)")
    return Timeline(tuple(map(tuple, spans)), tuple(peaks))


def draw(timeline: Timeline, title: str = "") -> str:
    """The timeline as text: a row for each rank, a column for each unit of time, and a legend.

    Durations are meant to be whole; an action is drawn from its start, rounded down, to its end. With
    several chunks a letter says which of the rank's chunks it is: a, b, …

    Raises:  ConfigError if nobody could look at it
    """
    stages = count_stages(tuple(tuple(span.action for span in spans) for spans in timeline.ranks))
    pp, columns = len(timeline.ranks), math.ceil(timeline.total)
    if pp * columns > _MAX_CELLS:
        raise ConfigError(
            f"{pp:,} ranks over {columns:,} units of time make a drawing of {pp * columns:,} cells, of which "
            f"{_MAX_CELLS:,} are the most; draw fewer ranks or micro-batches"
        )
    width = max(len(_label(span.action, pp, stages)) for spans in timeline.ranks for span in spans) + 1
    head = len(f"rank {pp - 1} ")
    lines = [title] if title else []
    lines.append(
        "time".ljust(head) + "|" + "".join(str(time).ljust(width) for time in range(columns)).rstrip()
    )
    for rank, spans in enumerate(timeline.ranks):
        cells = ["."] * columns
        for span in spans:
            for column in range(int(span.start), int(span.end)):
                cells[column] = "-" * (width - 1)
            cells[int(span.start)] = _label(span.action, pp, stages)
        lines.append(f"rank {rank}".ljust(head) + "|" + "".join(cell.ljust(width) for cell in cells).rstrip())
    lines.append(_legend({span.action.kind for spans in timeline.ranks for span in spans}, stages > pp))
    peaks = ", ".join(map(str, timeline.peak_in_flight))
    unit = f" (1/{stages // pp} of a rank's layers each)" if stages > pp else ""
    lines.append(f"total    {timeline.total:g} units of time, bubble {timeline.bubble_fraction:.1%}")
    lines.append(f"memory   activations in flight at most, by rank: {peaks}{unit}")
    return "\n".join(lines)


_MEANINGS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRAD: "backward for the inputs",
    Kind.WEIGHT_GRAD: "backward for the weights",
}


def _legend(kinds: set[Kind], has_chunks: bool) -> str:
    parts = [f"{kind.value} {meaning}" for kind, meaning in _MEANINGS.items() if kind in kinds]
    parts += ["number = micro-batch", *(["letter = chunk"] if has_chunks else []), "- goes on", ". idle"]
    return "legend   " + ", ".join(parts)


def _label(action: Action, pp: int, stages: int) -> str:
    chunk = chr(ord("a") + action.stage // pp) if stages > pp else ""
    return f"{action.kind.value}{action.micro_batch}{chunk}"


def _account(action: Action, held: set[tuple[int, int]]) -> None:
    """Keep what a forward holds, until its backward or weight half."""
    key = (action.stage, action.micro_batch)
    if action.kind is Kind.FORWARD:
        held.add(key)
    elif action.kind is not Kind.INPUT_GRAD:
        held.discard(key)


_NEEDS = {Kind.BACKWARD: Kind.FORWARD, Kind.INPUT_GRAD: Kind.FORWARD, Kind.WEIGHT_GRAD: Kind.INPUT_GRAD}


def _check_place(action: Action, rank: int, pp: int, done: set[Action]) -> None:
    if action.stage % pp != rank:
        raise ValueError(f"rank {rank} has {action}, which belongs to rank {action.stage % pp}")
    if action in done:
        raise ValueError(f"rank {rank} has {action} twice")
    own = _NEEDS.get(action.kind)
    if own is not None and Action(own, action.micro_batch, action.stage) not in done:
        raise ValueError(f"rank {rank} has {action} before {own.value}{action.micro_batch}@{action.stage}")
