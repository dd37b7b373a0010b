"""Compile what the stages will run, in several processes at once; Triton and torch keep it on disk.

    python -m benchmarks.gpu.compiling SHARE OF DEVICE

A first run would compile a few hundred kernels, and torch.compile's of the peers, one after the other, and
have little time left to measure. Nothing here is timed or judged: what fails here fails again in its
stage, which tells it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu import races, workloads
from tests.gpu import checks


def actions(device: torch.device) -> Iterator[Callable[[], object]]:
    """What is compiled by running it once."""
    for workload in workloads.checked(device):
        yield partial(_once, workload)
    for workload in workloads.small(device):
        yield partial(checks.compiled, workload)
    for workload in workloads.races(device):
        yield partial(races.run_each, workload, device)


def _once(workload: workloads.Workload) -> None:
    checks.results(workload, checks.ours(workload), workload.inputs())


def main() -> int:
    """Run this process's share of the actions."""
    share, of, device = int(sys.argv[1]), int(sys.argv[2]), torch.device(sys.argv[3])
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.9 / of, 0)
    for index, action in enumerate(actions(device)):
        if index % of == share:
            try:
                action()
                print(index, flush=True)
            except Exception as error:  # its stage tells it; here it is for who looks
                print(f"{index}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
