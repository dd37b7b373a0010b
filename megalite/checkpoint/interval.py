"""How often to save: often enough to lose little in a failure, seldom enough to wait little for saves.

Of the time of a run that saves every T seconds, waits δ for each save and fails every M on average, the
share δ/T + T/2M is lost. It is least at T = √(2δM).

Source:  Young 1974; Daly 2006. Llama 3 (2024, section 3.3.4) for failures: 419 in 54 days of 16,384 GPUs is
one in 50,000 hours of a process.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path

import torch

_TRIED_BYTES = 16 * 2**20  # written to learn how fast a disk is
_FAR = 4.0  # times too long or too short
_WORTH = 1e-2  # of the run's time: what a better interval must save to be worth a line


def best_interval_s(stall_s: float, write_s: float, mtbf_s: float) -> float:
    """The interval at which least time is lost; not below a save's own duration, for they do not overlap."""
    return max(math.sqrt(2 * stall_s * mtbf_s), write_s)


def lost_share(interval_s: float, stall_s: float, mtbf_s: float) -> float:
    """The share of a run's time lost to waiting for saves and to repeating what failures undid."""
    return stall_s / interval_s + interval_s / (2 * mtbf_s)


def estimate(folder: Path, share_bytes: int, device: torch.device) -> tuple[float, float] | None:
    """Seconds to copy a process's share of a checkpoint to host memory, and to force it to the disk.

    From 16 MiB of noise, less where the share is smaller, that are copied and written to `folder` once; None
    if it refuses. The file has no name, so that a kill leaves nothing of it.
    """
    size = min(share_bytes, _TRIED_BYTES)
    held = torch.frombuffer(bytearray(os.urandom(size)), dtype=torch.uint8).to(device)
    copy = torch.ones(size, dtype=torch.uint8, pin_memory=held.is_cuda)
    began = time.perf_counter()
    copy.copy_(held)
    copied = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(copy.numpy().data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    written = time.perf_counter()
    return (copied - began) * share_bytes / size, (written - copied) * share_bytes / size


def advice(
    every_steps: int, step_s: float, stall_s: float, write_s: float, mtbf_s: float, is_estimate: bool = False
) -> str | None:
    """One line if the interval is far from the best one, else None.

    Far is more than 4 times too long or too short, with more than 1 % of the run's time to be won.
    `is_estimate` says that no save has been seen yet.
    """
    interval_s, best_s = every_steps * step_s, best_interval_s(stall_s, write_s, mtbf_s)
    lost, least = (lost_share(seconds, stall_s, mtbf_s) for seconds in (interval_s, best_s))
    if 1 / _FAR <= interval_s / best_s <= _FAR or lost - least < _WORTH:
        return None
    better = max(round(best_s / step_s), 1)
    costs = "should cost about" if is_estimate else "costs"
    return (
        f"note: checkpoint.every_steps={every_steps} ({interval_s:,.0f} s) is far from the best: a save "
        f"{costs} {stall_s:.2g} s and a failure is expected every {mtbf_s / 3600:,.1f} h, so "
        f"{lost:.1%} of the time is lost; with checkpoint.every_steps={better} {least:.1%} would be"
    )
