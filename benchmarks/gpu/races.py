"""Each operation beside its best peers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.figures import OURS, TORCH
from benchmarks.gpu.peers import UnavailableError
from benchmarks.gpu.timing import Action, Clock, can_run_kernels
from benchmarks.gpu.workloads import Workload, as_tuple, races, upstream
from megalite_kernels.dispatch import recording_choices

Item = tuple[str, Callable[[], dict[str, Any]]]
Function = Callable[..., Any]
Turn = Callable[["Workload", Function, list[Tensor]], Callable[[], Action]]


def items(device: torch.device) -> Iterator[Item]:
    """Ceilings first, then a race for each workload."""
    clock = Clock(device)
    yield "ceiling/gemm", clock.gemm_ceiling
    yield "ceiling/copy", clock.copy_ceiling
    for workload in races(device):
        yield workload.name, lambda workload=workload: run(workload, clock)  # type: ignore[misc]


def run(workload: Workload, clock: Clock) -> dict[str, Any]:
    """Times in seconds by direction and contender, peak bytes, cost, and who was left out and why."""
    inputs = workload.inputs()
    directions = {name: _TURNS[name] for name in workload.directions}
    with recording_choices() as asked:
        workload.implementation(TORCH)(*workload.leaves(inputs))
    contenders, left_out = _contenders(workload, inputs, directions, clock.device)
    seconds = {
        name: clock.race({who: turn(workload, f, inputs) for who, f in contenders.items()})
        for name, turn in directions.items()
    }
    whole = _both if workload.has_backward else _forward
    peak = {who: clock.peak_bytes(_once(whole(workload, f, inputs))) for who, f in contenders.items()}
    operation, variant = asked[0]
    return {
        "operation": operation,
        "variant": variant,
        "cost": {n: c._asdict() for n, c in zip(directions, workload.cost(*inputs), strict=True)},
        "seconds": seconds,
        "peak_bytes": peak,
        "left_out": left_out,
    }


def run_each(workload: Workload, device: torch.device) -> None:
    """The peers and ours once in every direction, which compiles them; torch's code is compiled already."""
    inputs = workload.inputs()
    directions = {name: _TURNS[name] for name in workload.directions}
    contenders, _ = _contenders(workload, inputs, directions, device)  # runs the peers
    if OURS in contenders:  # torch's compiles nothing
        for turn in directions.values():
            turn(workload, contenders[OURS], inputs)()()


def _contenders(
    workload: Workload, inputs: list[Tensor], directions: Mapping[str, Turn], device: torch.device
) -> tuple[dict[str, Function], dict[str, str]]:
    """Ours, torch's and those of the peers that are here and take this workload.

    A failure of ours is raised: it is a finding. One of a peer's is a reason to leave it out.
    """
    names = (OURS, TORCH) if can_run_kernels(device) else (TORCH,)
    found = {name: workload.implementation(name) for name in names}
    left_out = {}
    for name, build in workload.peers.items():
        try:
            function = build()
            for turn in directions.values():
                turn(workload, function, inputs)()()
            found[name] = function
        except UnavailableError as error:
            left_out[name] = str(error)
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except Exception as error:  # whatever a peer raises concerns only the peer
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return found, left_out


def _once(prepare: Callable[[], Action]) -> Action:
    return lambda: prepare()()


def _forward(workload: Workload, function: Function, inputs: list[Tensor]) -> Callable[[], Action]:
    def prepare() -> Action:
        ready = workload.leaves(inputs)
        return lambda: function(*ready)

    return prepare


def _backward(workload: Workload, function: Function, inputs: list[Tensor]) -> Callable[[], Action]:
    def prepare() -> Action:
        ready = workload.leaves(inputs)
        outputs = [y for y in as_tuple(function(*ready)) if y.requires_grad]
        wanted = [x for x in ready if x.requires_grad]
        grads = upstream(outputs)
        return lambda: torch.autograd.grad(outputs, wanted, grads)

    return prepare


def _both(workload: Workload, function: Function, inputs: list[Tensor]) -> Callable[[], Action]:
    def prepare() -> Action:
        ready = workload.leaves(inputs)
        wanted = [x for x in ready if x.requires_grad]

        def action() -> object:
            outputs = [y for y in as_tuple(function(*ready)) if y.requires_grad]
            return torch.autograd.grad(outputs, wanted, upstream(outputs))

        return action

    return prepare


_TURNS: dict[str, Turn] = {"forward": _forward, "backward": _backward, "both": _both}
