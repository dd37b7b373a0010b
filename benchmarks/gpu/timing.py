"""How a time is taken on a GPU: by CUDA events, the L2 cache flushed, contenders taking turns, medians.

On anything but CUDA everything runs once and no figure comes out: a rehearsal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from megalite_kernels.dispatch import is_interpreted

REPEATS = 30
_SCRUB_BYTES = 2**28  # several times the largest L2 cache
_HEAD_START_CYCLES = 1_000_000  # half a millisecond, in which the CPU queues what is timed

Action = Callable[[], object]


def can_run_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run here: compiled, or in a rehearsal interpreted."""
    return device.type == "cuda" or is_interpreted()


class Clock:
    """Times actions on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_real = device, device.type == "cuda"
        if self.is_real:
            self._scrub = torch.empty(_SCRUB_BYTES, dtype=torch.int8, device=device)

    def race(
        self, contenders: Mapping[str, Callable[[], Action]], repeats: int = REPEATS
    ) -> dict[str, float]:
        """Median seconds of each contender; they take turns, every other round in reverse.

        A contender is called before each of its turns, outside the time taken, and returns what is
        timed. Each runs twice beforehand, which compiles it.
        """
        for _ in range(2 if self.is_real else 1):
            for prepare in contenders.values():
                prepare()()
        if not self.is_real:
            return {}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in contenders}
        for turn in range(repeats):
            for name in list(contenders)[:: 1 if turn % 2 else -1]:
                action = contenders[name]()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._scrub.zero_()
                torch.cuda._sleep(_HEAD_START_CYCLES)
                start.record()
                action()
                end.record()
                events[name].append((start, end))
                del action
        torch.cuda.synchronize()
        return {
            name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
            for name, pairs in events.items()
        }

    def peak_bytes(self, action: Action) -> int | None:
        """The most memory `action` held beyond what was held before."""
        if not self.is_real:
            action()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def gemm_ceiling(self) -> dict[str, float | None]:
        """bf16 FLOP/s of the vendor's matrix product on random numbers; on zeros it would be faster."""
        size = 8192 if self.is_real else 16
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        seconds = self.race({"gemm": lambda: lambda: a @ b})
        return {"flops_per_s": 2 * size**3 / seconds["gemm"] if seconds else None}

    def copy_ceiling(self) -> dict[str, float | None]:
        """Bytes read and written a second by a copy within the device's memory."""
        count = 2**31 if self.is_real else 2**10
        source = torch.empty(count, dtype=torch.int8, device=self.device).random_()
        target = torch.empty_like(source)
        seconds = self.race({"copy": lambda: lambda: target.copy_(source)})
        return {"bytes_per_s": 2 * count / seconds["copy"] if seconds else None}
