"""Each operation beside its best peers, forward and backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.figures import OURS, TORCH
from benchmarks.gpu.timing import Action, Clock
from benchmarks.gpu.workloads import Unavailable, Workload, as_tuple, leaves, races, upstream

Item = tuple[str, Callable[[], dict[str, Any]]]


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
    contenders, left_out = _contenders(workload, inputs, clock.is_real)
    seconds = {"forward": clock.race({n: _forward(workload, f, inputs) for n, f in contenders.items()})}
    if workload.backward is not None:
        seconds["backward"] = clock.race(
            {n: _backward(workload, f, inputs) for n, f in contenders.items()}
        )
    peak = {name: clock.peak_bytes(_both(workload, function, inputs)) for name, function in contenders.items()}
    del inputs, contenders
    gc.collect()
    costs = {"forward": workload.forward, "backward": workload.backward}
    return {
        "operation": workload.operation,
        "variant": workload.variant,
        "cost": {name: cost._asdict() for name, cost in costs.items() if cost is not None},
        "seconds": seconds,
        "peak_bytes": peak,
        "left_out": left_out,
    }


def _contenders(
    workload: Workload, inputs: list[torch.Tensor], is_real: bool
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Ours, torch's and those of the peers that are here and take this workload.

    A failure of ours is raised: it is a finding. One of a peer's is a reason to leave it out.
    """
    found = {name: workload.implementation(name) for name in (OURS, TORCH)}
    if not is_real:
        found = {TORCH: found[TORCH]}
    left_out = {}
    for name, build in workload.peers.items():
        try:
            function = build()
            for direction in (_forward, _backward) if workload.backward is not None else (_forward,):
                direction(workload, function, inputs)()()
            found[name] = function
        except Unavailable as error:
            left_out[name] = str(error)
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except Exception as error:  # whatever a peer raises concerns only the peer
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return found, left_out


def _forward(workload: Workload, function: Callable[..., Any], inputs: list[torch.Tensor]) -> Callable[[], Action]:
    def prepare() -> Action:
        ready = leaves(workload, inputs)
        return lambda: function(*ready)

    return prepare


def _backward(workload: Workload, function: Callable[..., Any], inputs: list[torch.Tensor]) -> Callable[[], Action]:
    def prepare() -> Action:
        ready = leaves(workload, inputs)
        outputs = [y for y in as_tuple(function(*ready)) if y.requires_grad]
        wanted = [x for x in ready if x.requires_grad]
        grads = upstream(outputs)
        return lambda: torch.autograd.grad(outputs, wanted, grads, allow_unused=True)

    return prepare


def _both(workload: Workload, function: Callable[..., Any], inputs: list[torch.Tensor]) -> Action:
    if workload.backward is None:
        return lambda: _forward(workload, function, inputs)()()
    return lambda: _backward(workload, function, inputs)()()
