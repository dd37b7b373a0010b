"""Who is to blame when ranks wait for each other for ever: what each did last, compared.

Every rank's flight log numbers what it began on each group, so a rank that began less than another is one
that the other waits for. Whoever is waited for and waits for nobody is behind. Before that comes what
explains more: a rank that left with an error of its own, ranks that began different collectives under the
same number (one of them left one out), a rank that is gone or stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megalite.parallel.flight import AWAITED, BACKGROUND, Entry

_BEFORE = 3  # how many collectives must have come before as they did now, for history to tell what comes next


@dataclass(frozen=True)
class RankState:
    """What is known of a rank: what it says itself, or what can be seen of one that says nothing.

    `error` is what made it leave, other than a peer; `silence` how it looks from outside if it did not
    answer; `stacks` each thread's frames, innermost first. `is_host_bound` says that the host waits for
    communications (gloo); on CUDA the device does, and what was begun last counts as awaited.
    """

    rank: int
    host: str
    step: int
    entries: Sequence[Entry]
    stacks: dict[str, list[str]]
    error: str = ""
    silence: str = ""
    is_host_bound: bool = True

    @property
    def awaited(self) -> list[Entry]:
        """What it waits for."""
        entries = [entry for entry in self.entries if entry.group != BACKGROUND]
        if self.is_host_bound:
            return [entry for entry in entries if entry.ended == AWAITED]
        return list({_series(entry): entry for entry in entries}.values())

    def last_number(self, entry: Entry) -> int:
        """The last number it has begun of what `entry` is one of; 0 for none."""
        return max((e.number for e in self.entries if _series(e) == _series(entry)), default=0)


@dataclass(frozen=True)
class Verdict:
    """The ranks to blame, and one sentence for a person."""

    culprits: tuple[int, ...]
    text: str


def judge(states: Sequence[RankState]) -> Verdict:
    """Name who is behind, and what the others wait in."""
    left = [state for state in states if state.error]
    if left:
        return _verdict(states, left, "; ".join(f"{_who(s)} left with {s.error}" for s in left))
    difference = first_difference(states)
    if difference is not None:
        return _different(difference)
    silent = [state for state in states if state.silence]
    if silent:
        return _verdict(states, silent, "; ".join(f"{_who(s)} {s.silence}{_last(s)}" for s in silent))
    behind = _behind(states)
    if behind:
        return _verdict(states, behind, "; ".join(f"{_who(s)} is behind, {_where(s)}" for s in behind))
    if any(state.awaited for state in states):
        return _verdict(states, [], "no rank is behind: they wait for one another, or for the network")
    return _verdict(
        states, [], "no rank waits for another; " + "; ".join(f"{_who(s)} {_where(s)}" for s in states)
    )


def first_difference(states: Sequence[RankState]) -> dict[int, Entry] | None:
    """The first communication that ranks began differently under one number, by rank."""
    numbered: dict[tuple[Any, int], dict[int, Entry]] = {}
    for state in states:
        for entry in state.entries:
            numbered.setdefault((_series(entry), entry.number), {})[state.rank] = entry
    different = [found for found in numbered.values() if len({entry.what for entry in found.values()}) > 1]
    if not different:
        return None
    first = min(different, key=lambda found: min(entry.begun for entry in found.values()))
    return _with_history(first, states)


def _with_history(found: dict[int, Entry], states: Sequence[RankState]) -> dict[int, Entry]:
    """The same, with the ranks that did something unusual first."""
    votes = Counter(entry.what for entry in found.values())
    if len(votes) == 2 and len(set(votes.values())) == 1:  # a draw: what came there in earlier steps?
        for state in states:
            if state.rank in found:
                votes.update(_usual(found[state.rank], state.entries))
    return dict(sorted(found.items(), key=lambda item: votes[item[1].what]))


def _usual(entry: Entry, entries: Iterable[Entry]) -> list[tuple[str, int, str]]:
    """What came, in earlier steps, after the same predecessors as this one's."""
    mine = {e.number: e.what for e in entries if _series(e) == _series(entry) and e.number < entry.number}
    before = [mine.get(entry.number - k) for k in range(1, _BEFORE + 1)]
    if None in before:
        return []
    return [
        what
        for number, what in mine.items()
        if [mine.get(number - k) for k in range(1, _BEFORE + 1)] == before
    ]


def _series(entry: Entry) -> tuple[bool, str, tuple[int, ...]]:
    """What is numbered together: a group's collectives, or the messages from one rank to another."""
    return entry.what[0] == "message", entry.group, entry.ranks  # two groups may have the same ranks


def _different(found: dict[int, Entry]) -> Verdict:
    whats: dict[tuple[str, int, str], list[int]] = {}
    for rank, entry in found.items():
        whats.setdefault(entry.what, []).append(rank)
    odd, *others = whats.values()
    entry, other = found[odd[0]], found[others[0][0]]
    is_named = len(odd) < len(others[0]) or len(found) == 2
    text = (
        f"{name_ranks(odd)} began {_brief(entry)} as number {entry.number} of group {entry.group}, where "
        f"{name_ranks([rank for part in others for rank in part])} began {_brief(other)}: "
        f"{name_ranks(odd)} left one out, or did one too many"
    )
    return Verdict(tuple(sorted(odd)) if is_named else tuple(sorted(found)), text)


def _behind(states: Sequence[RankState]) -> list[RankState]:
    if len(states) == 1:
        return list(states)
    waits_for = {
        state.rank: {
            other.rank
            for entry in state.awaited
            for other in states
            if other.rank in entry.ranks and other.last_number(entry) < entry.number
        }
        for state in states
    }
    waited_for = set().union(*waits_for.values())
    return [state for state in states if state.rank in waited_for and not waits_for[state.rank]]


def _verdict(states: Sequence[RankState], culprits: list[RankState], text: str) -> Verdict:
    """Adds what the others wait in; the same wait is told once."""
    blamed = tuple(state.rank for state in culprits)
    waits: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for state in states:
        for entry in state.awaited[-1:]:
            if state.rank not in blamed:
                waits.setdefault((str(entry), entry.ranks), []).append(state.rank)
    told = [
        f"{name_ranks(ranks)} wait{'s' * (len(ranks) == 1)} in {what}" for (what, _), ranks in waits.items()
    ]
    return Verdict(blamed, "; ".join([text, *told[:3]]))


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 1", or "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _who(state: RankState) -> str:
    return f"rank {state.rank} on {state.host}"


def _last(state: RankState) -> str:
    return f" (its last: {state.entries[-1]})" if state.entries else ""


def _brief(entry: Entry) -> str:
    return f"{entry.op} of {entry.bytes:,} bytes ({entry.dtype} {list(entry.shape)})"


def _where(state: RankState) -> str:
    """Where its main thread is; if that waits for another thread, where the others are."""
    main = state.stacks.get("MainThread", [])
    waits = bool(main) and _is_wait(main[0])
    others = [frames for name, frames in state.stacks.items() if waits and name != "MainThread"]
    tops = [next((frame for frame in main if not _is_wait(frame)), "")]
    tops += [frames[0] for frames in others if not _is_wait(frames[0])]
    places = " and ".join(f"at {top}" for top in tops if top)
    return f"in step {state.step} {places}".rstrip()


def _is_wait(frame: str) -> bool:
    return "/threading.py:" in frame
