"""Schedules against the papers' formulas, and against every way in which an order can be wrong."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.cli import main
from megalite.errors import ConfigError
from megalite.parallel.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    build_evaluation,
    build_schedule,
    consumed,
    count_stages,
    produced,
)
from megalite.parallel.timeline import draw, simulate

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD  # noqa: E741
SIZES = [(pp, m) for pp in range(1, 7) for m in range(1, 13)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A legal (schedule, pp, micro_batches, chunks)."""
    name = draw(st.sampled_from(SCHEDULES))
    chunks = draw(st.integers(1, 3)) if name == "interleaved" else 1
    return name, draw(st.integers(1, 6)), draw(st.integers(1, 12)), chunks


def most_in_flight(name: str, rank: int, pp: int, micro_batches: int, chunks: int) -> int:
    """The bound on a rank's activations that the sources give."""
    if name == "interleaved" and chunks > 1:
        return min(2 * (pp - rank - 1) + (chunks - 1) * pp + 1, micro_batches * chunks)
    bounds = {"gpipe": micro_batches, "zero_bubble": pp}
    return min(bounds.get(name, pp - rank), micro_batches)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_action_once_in_an_order_that_can_be_run(case: tuple[str, int, int, int]) -> None:
    name, pp, micro_batches, chunks = case
    schedule = build_schedule(*case)
    kinds = (F, I, W) if name == "zero_bubble" else (F, B)
    expected = Counter(
        Action(kind, m, s) for kind in kinds for m in range(micro_batches) for s in range(pp * chunks)
    )
    assert Counter(action for actions in schedule for action in actions) == expected
    assert count_stages(schedule) == pp * chunks
    timeline = simulate(schedule)  # raises on a deadlock or an unmet dependency
    end = {span.action: span.end for spans in timeline.ranks for span in spans}
    start = {span.action: span.start for spans in timeline.ranks for span in spans}
    back = I if name == "zero_bubble" else B
    for action in end:
        needs = {
            F: [Action(F, action.micro_batch, action.stage - 1)],
            back: [
                Action(F, action.micro_batch, action.stage),
                Action(back, action.micro_batch, action.stage + 1),
            ],
            W: [Action(I, action.micro_batch, action.stage)],
        }[action.kind]
        assert all(end[need] <= start[action] for need in needs if 0 <= need.stage < pp * chunks)
    for spans in timeline.ranks:
        assert all(before.end <= after.start for before, after in pairwise(spans))
    for rank, peak in enumerate(timeline.peak_in_flight):
        assert peak <= most_in_flight(name, rank, pp, micro_batches, chunks)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_gradients_add_up_in_the_order_of_the_micro_batches(case: tuple[str, int, int, int]) -> None:
    for actions in build_schedule(*case):
        for kind in (B, I, W):
            for stage in {action.stage for action in actions}:
                order = [a.micro_batch for a in actions if a.kind is kind and a.stage == stage]
                assert order == sorted(order)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_evaluation_is_every_forward_once(case: tuple[str, int, int, int]) -> None:
    _, pp, micro_batches, chunks = case
    schedule = build_evaluation(pp, micro_batches, chunks)
    actions = Counter(action for actions in schedule for action in actions)
    assert actions == Counter(Action(F, m, s) for m in range(micro_batches) for s in range(pp * chunks))
    simulate(schedule)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_every_message_is_made_by_one_action_and_used_by_one(case: tuple[str, int, int, int]) -> None:
    schedule = build_schedule(*case)
    stages = count_stages(schedule)
    actions = [action for actions in schedule for action in actions]
    made = Counter(message for action in actions if (message := produced(action, stages)))
    used = Counter(message for action in actions if (message := consumed(action, stages)))
    assert made == used
    assert all(count == 1 for count in made.values())


# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name: str) -> None:
    """(p - 1) / (m + p - 1) of the time: Huang et al. 2019, section 2.3; Narayanan et al. 2021b, 2.2.1."""
    for pp, m in SIZES:
        bubble = simulate(build_schedule(name, pp, m)).bubble_fraction
        assert bubble == pytest.approx((pp - 1) / (m + pp - 1), abs=1e-12)


def test_bubble_of_interleaved() -> None:
    """1/v · (p - 1)/m over the ideal time: Narayanan et al. 2021b, section 2.2.2, for m a multiple of p."""
    for pp in range(1, 7):
        for m in range(pp, 4 * pp + 1, pp):
            for chunks in (2, 3):
                ideal = 3 * m * chunks
                total = simulate(build_schedule("interleaved", pp, m, chunks)).total
                assert Fraction(int(total) - ideal, ideal) == Fraction(pp - 1, m * chunks)


def test_interleaved_cut_short_without_filling_up_would_deadlock() -> None:
    """Why a last group is filled up first: 5 micro-batches on 4 ranks, 3 chunks each."""
    whole = build_schedule("interleaved", 4, 8, 3)
    assert simulate(build_schedule("interleaved", 4, 5, 3)).total < simulate(whole).total
    cut = []
    for rank, actions in enumerate(whole):
        forwards, backwards = (
            [a for a in actions if a.kind is kind and a.micro_batch < 5] for kind in (F, B)
        )
        turns = [a for pair in zip(forwards[14 - 2 * rank :], backwards, strict=False) for a in pair]
        cut.append((*forwards[: 14 - 2 * rank], *turns, *backwards[1 + 2 * rank :]))
    with pytest.raises(ValueError, match="deadlock"):
        simulate(tuple(cut))


def test_interleaved_with_a_broken_group_is_still_better_than_1f1b() -> None:
    """The paper asks for whole groups; with fewer the bubble may be larger than the formula's."""
    for pp in range(2, 7):
        for m in range(pp, 13):
            interleaved = simulate(build_schedule("interleaved", pp, m, 2)).total / 2
            assert interleaved <= simulate(build_schedule("1f1b", pp, m)).total


def test_bubble_of_zero_bubble() -> None:
    """(p - 1)(F + I - W), a third of 1f1b's (p - 1)(F + I + W): Qi et al. 2023, table 2, for m ≥ p.

    Below p micro-batches there are too few weight halves to fill the time in which it drains.
    """
    for pp, m in SIZES:
        total = simulate(build_schedule("zero_bubble", pp, m)).total
        plain = simulate(build_schedule("1f1b", pp, m)).total
        if m >= pp:
            assert total - 3 * m == pp - 1 == (plain - 3 * m) / 3
        assert total < plain or pp == 1


def test_zero_bubble_hides_weight_gradients_of_other_lengths() -> None:
    durations = {F: 4, B: 9, I: 5, W: 4}
    for pp, m in [(2, 4), (4, 8), (4, 16), (6, 12)]:
        total = simulate(build_schedule("zero_bubble", pp, m), durations).total
        assert total < simulate(build_schedule("1f1b", pp, m), durations).total


def test_peaks_of_activations() -> None:
    """m, p - rank and 2(p - rank - 1) + (v - 1)p + 1; zero_bubble's largest is 1f1b's (Qi et al., 2.1)."""
    for pp, m in SIZES:
        for name, chunks in [("gpipe", 1), ("1f1b", 1), ("interleaved", 1), ("zero_bubble", 1)]:
            peaks = simulate(build_schedule(name, pp, m, chunks)).peak_in_flight
            assert peaks == tuple(most_in_flight(name, rank, pp, m, chunks) for rank in range(pp))
        zero_bubble = simulate(build_schedule("zero_bubble", pp, m)).peak_in_flight
        assert max(zero_bubble) == max(simulate(build_schedule("1f1b", pp, m)).peak_in_flight)
    peaks = simulate(build_schedule("interleaved", 4, 8, 2)).peak_in_flight
    assert peaks == (11, 9, 7, 5)


# --- what must be refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", 2, 4), "mesh.pp_schedule='dualpipe' is not known; use gpipe, 1f1b, interleaved"),
        (("1f1b", 0, 4), "mesh.pp=0 must be at least 1"),
        (("1f1b", 2, 0), "0 micro-batches a step must be at least 1; raise train.global_batch_size"),
        (("interleaved", 2, 4, 0), "mesh.pp_chunks=0 must be at least 1"),
        (("zero_bubble", 2, 4, 2), "mesh.pp_chunks=2 does not go with mesh.pp_schedule='zero_bubble'"),
    ],
)
def test_illegal_combinations(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as error:
        build_schedule(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((Action(B, 0, 0), Action(F, 0, 0)),), "B0@0 before F0@0"),
        (((Action(F, 0, 0), Action(W, 0, 0), Action(I, 0, 0)),), "W0@0 before I0@0"),
        (((Action(F, 0, 0), Action(F, 0, 0)),), "F0@0 twice"),
        (((Action(F, 0, 0), Action(F, 0, 1)), ()), "belongs to rank 1"),
        (((), (Action(F, 0, 1),)), "deadlock: no message arrives for rank 1 at F0@1"),
        (
            (
                (Action(F, 0, 0), Action(B, 0, 0), Action(F, 1, 0), Action(B, 1, 0)),
                (Action(F, 0, 1), Action(F, 1, 1), Action(B, 0, 1), Action(B, 1, 1)),
            ),
            "deadlock: no message arrives for rank 0 at B0@0, rank 1 at F1@1",
        ),
    ],
)
def test_the_simulator_refuses(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(schedule)


# --- the drawing ----------------------------------------------------------------------------------


def test_drawing() -> None:
    drawn = draw(simulate(build_schedule("zero_bubble", 2, 3)), "two ranks")
    assert drawn.splitlines() == [
        "two ranks",
        "time   |0  1  2  3  4  5  6  7  8  9",
        "rank 0 |F0 F1 .  I0 W0 F2 I1 W1 I2 W2",
        "rank 1 |.  F0 I0 F1 I1 W0 F2 I2 W1 W2",
        "legend   F forward, I backward for the inputs, W backward for the weights, number = micro-batch, "
        "- goes on, . idle",
        "total    10 units of time, bubble 10.0%",
        "memory   activations in flight at most, by rank: 2, 2",
    ]


def test_drawing_names_chunks() -> None:
    drawn = draw(simulate(build_schedule("interleaved", 1, 1, 2))).splitlines()
    assert drawn[1] == "rank 0 |F0a F0b B0b --- B0a ---"
    assert "letter = chunk" in drawn[2]
    assert drawn[-1].endswith("by rank: 2 (1/2 of a rank's layers each)")


def test_drawing_of_parts_of_units() -> None:
    durations = {F: 0.5, B: 0.75, I: 1, W: 1}
    drawn = draw(simulate(build_schedule("1f1b", 2, 2), durations)).splitlines()
    assert drawn[0] == "time   |0  1  2  3"
    assert drawn[-2] == "total    3.75 units of time, bubble 33.3%"


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--draw", "1f1b", "--pp", "2", "--micro-batches", "2"]) == 0
    out = capsys.readouterr().out
    assert "1f1b, 2 ranks, 2 micro-batches\n" in out
    assert "rank 1 |.  F0 B0 -- F1 B1 --" in out
    assert "bubble 33.3%" in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--draw", "fastest"],
        ["--draw", "1f1b", "--pp", "0"],
        ["--draw", "1f1b", "--micro-batches", "0"],
        ["--draw", "gpipe", "--chunks", "2"],
    ],
)
def test_plan_refuses_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megalite: ConfigError: ")
    assert captured.err.count("\n") == 1


def test_a_pipeline_of_thousands_is_simulated_but_not_drawn() -> None:
    timeline = simulate(build_schedule("1f1b", 3000, 4))
    assert timeline.bubble_fraction == pytest.approx(2999 / 3003)
    with pytest.raises(ConfigError, match=r"3,000 ranks over 9,009 units .* 27,027,000 cells"):
        draw(timeline)


def test_plan_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "megalite plan --draw 1f1b --pp 4 --micro-batches 8" in capsys.readouterr().out
