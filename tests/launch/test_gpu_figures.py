"""What `launch/gpu_check` makes of measurements: rows, choices, verdicts, and the files they are in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import check, training
from benchmarks.gpu.figures import choices, floor_seconds, row
from benchmarks.gpu.training import judge
from benchmarks.gpu.workloads import Workload
from tests.gpu import checks

# --- what measurements say ------------------------------------------------------------------------------

CEILINGS = {"flops_per_s": 100e12, "bytes_per_s": 1e12}
RACE = {
    "operation": "norm",
    "variant": "rms_norm/4096",
    "cost": {"forward": {"flops": 1, "bytes": 2 * 10**9}, "backward": {"flops": 2 * 10**12, "bytes": 1}},
    "seconds": {"forward": {"triton": 4e-3, "torch": 8e-3}, "backward": {"triton": 40e-3, "torch": 36e-3}},
    "peak_bytes": {"triton": 2**20, "torch": None},
    "left_out": {"liger": "not installed"},
}


def test_a_race_is_printed_as_rates_and_shares_of_the_floor() -> None:
    assert floor_seconds(RACE["cost"]["forward"], **CEILINGS) == 2e-3  # type: ignore[index]
    assert row("kernels", "n", RACE, CEILINGS).splitlines() == [
        "n  forward  triton 4.000 ms 0.5 TB/s 50% | torch 8.000 ms 0.25 TB/s 25%",
        "n  backward  torch 36.000 ms 55.56 TFLOP/s 56% | triton 40.000 ms 50 TFLOP/s 50%",
        "n  peak  triton 1 MiB",
        "n  without liger: not installed",
    ]
    assert row("kernels", "n", RACE, None).splitlines()[0] == "n  forward  triton 4.000 ms | torch 8.000 ms"


def test_choices_follow_the_measured_times() -> None:
    other = {**RACE, "seconds": {"forward": {"triton": 1.0, "torch": 4.0}}}
    unmeasured = {**RACE, "variant": "rms_norm/64", "seconds": {"forward": {}}}
    assert choices([RACE]) == {"norm": {"rms_norm/4096": {"winner": "torch", "speedup": 1.0}}}
    assert choices([RACE, other, unmeasured, {"flops_per_s": 1}, {"failed": "x"}]) == {
        "norm": {"rms_norm/4096": {"winner": "triton", "speedup": 2.0}}
    }
    slower = {**RACE, "seconds": {"forward": {"triton": 2.0, "torch": 1.0}}}
    assert choices([slower]) == {"norm": {"rms_norm/4096": {"winner": "torch", "speedup": 0.5}}}


@pytest.mark.parametrize(
    ("failed", "proposed", "told"),
    [
        ({}, {"norm", "rope"}, ": proposed choices;"),
        ({"exact/rms_norm/bf16/5x96": {"passed": False}}, {"rope"}, "without rms_norm, which failed;"),
        ({"far/rms_norm/bf16/5x96": {"failed": "died"}}, {"rope"}, "without rms_norm, which failed;"),
        ({"sanitizer/racecheck": {"passed": False}}, None, "no choices are proposed: sanitizer/racecheck"),
    ],
)
def test_a_kernel_that_was_found_wrong_is_not_proposed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failed: dict[str, Any],
    proposed: set[str] | None,
    told: str,
) -> None:
    results = check.Results(tmp_path, {"architecture": "sm_90"})
    for name, result in ({"exact/rope_qkv/bf16/2x20": {"passed": True}} | failed).items():
        results.add("tests", name, result)
    results.add("kernels", "rms_norm/bf16/9x96", RACE)
    results.add("kernels", "rope_qkv/bf16/9x96", {**RACE, "operation": "rope", "variant": "rope/64"})
    check._propose(results, tmp_path)
    assert told in capsys.readouterr().out
    assert (tmp_path / "choices.json").exists() is (proposed is not None)
    if proposed is not None:
        assert json.loads((tmp_path / "choices.json").read_text())["choices"].keys() == proposed


def test_what_is_written_is_json_also_where_a_kernel_gave_nan(tmp_path: Path) -> None:
    results = check.Results(tmp_path, {})
    results.add("tests", "exact/x/y", {"passed": False, "error": math.nan, "values": [1.0, -math.inf]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert written["stages"]["tests"]["exact/x/y"]["values"] == [1.0, "-inf"]


# --- what is right -----------------------------------------------------------------------------------


def _falling(to: float = 2.0) -> list[float]:
    return [5.5 + (to - 5.5) * step / 9 for step in range(10)]


def test_losses_that_stay_together_and_fall_are_right() -> None:
    near = [value + 0.005 for value in _falling()]
    found = judge({"reference": _falling(), "torch": _falling(), "triton": near})
    assert found == {
        "largest_difference": {"torch": 0.0, "triton": pytest.approx(0.005)},
        "allowed": 0.01,
        "passed": True,
    }
    wide = [value + 0.04 for value in _falling()]
    assert judge({"reference": _falling(), "torch": wide, "triton": wide})["passed"]


@pytest.mark.parametrize(
    ("triton", "why"),
    [
        ([*_falling()[:-1], math.nan], "a loss of triton is not finite"),
        ([*_falling()[:-1], math.inf], "a loss of triton is not finite"),
        ([value + 0.02 for value in _falling()], "the kernels' loss is too far off"),
    ],
)
def test_losses_that_part_are_wrong(triton: list[float], why: str) -> None:
    found = judge({"reference": _falling(), "torch": _falling(), "triton": triton})
    assert found["passed"] is False
    assert found["why"] == why


def test_three_that_learn_nothing_agree_on_nothing() -> None:
    flat = _falling(to=5.4)
    found = judge({"reference": flat, "torch": flat, "triton": flat})
    assert (found["passed"], found["why"]) == (False, "the reference has learned nothing")


def test_a_step_whose_loss_is_not_finite_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "torch")
    monkeypatch.setattr(training, "_engine", lambda *_: (None, lambda batch: math.nan))
    with pytest.raises(ArithmeticError, match="the loss of step 1 is nan"):
        training.measure("125m", "torch", False, torch.device("cpu"))


def test_a_formula_that_overflows_proves_nothing() -> None:
    def run(impl: str, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    workload = Workload(
        "n",
        lambda: [torch.full((2,), 1e3, dtype=torch.float16)],
        run,
        torch.square,
        lambda x: (),
        ("forward",),
    )
    found = checks.exact(workload)
    assert (found["passed"], found["allowed"]) == (False, math.inf)
