"""What was found best for each chip: tile sizes, and where our kernel beats torch's.

One JSON file for each architecture and operation. "tiles" maps a variant to a kernel's constants and
launch options; "choices" maps it to the measured winner with the evidence, the time of torch's best
over ours: {"d128/causal": {"winner": "triton", "speedup": 1.2}}. Nothing is tuned at run time, and no key
holds a number of tokens, so no step of a run is slower than another because a batch came out longer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

ARCHITECTURES = ("sm_80", "sm_90")  # those with a table of their own
_assumed: str | None = None


def architecture(device: torch.device) -> str:
    """The table for a device: sm_90 from Hopper on, else sm_80; where no kernel is compiled, sm_90."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return "sm_90"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


@contextmanager
def assume(name: str) -> Iterator[None]:
    """Within it every device counts as this architecture; for compiling ahead of time."""
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


@cache
def table(operation: str, name: str) -> dict[str, dict[str, Any]]:
    """The whole table of an operation on an architecture, as shipped; empty if there is none."""
    path = Path(__file__).parent / name / f"{operation}.json"
    if not path.exists():
        return {"choices": {}, "tiles": {}}
    content: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return content


def tile(operation: str, variant: str, device: torch.device) -> dict[str, int]:
    """A kernel's constants and launch options (num_warps, …), such as those of "norm", "forward/1024".

    Raises:  KeyError if the table has no such kernel
    """
    return dict(table(operation, architecture(device))["tiles"][variant])


def choice(operation: str, variant: str, name: str) -> Literal["triton", "torch"]:
    """The measured winner of an operation on an architecture; torch where nothing was measured."""
    found = table(operation, name)["choices"].get(variant)
    return "torch" if found is None else found["winner"]
