"""One stage of the check in a process of its own: a line of JSON for each item, when it is done.

A kernel that reads where it must not spoils its process; then `check` starts another behind it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.check import SPOILED

Item = tuple[str, Callable[[], dict[str, Any]]]


def items(stage: str, device: torch.device) -> Iterator[Item]:
    """What a stage does, in order."""
    if stage == "tests":
        from tests.gpu import checks

        return checks.items(device)
    if stage == "kernels":
        from benchmarks.gpu import races

        return races.items(device)
    from benchmarks.gpu import training

    return training.step_items(device) if stage == "steps" else training.convergence_items(device)


def main() -> int:
    """Run the items that are not to be skipped until the budget is spent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    options = parser.parse_args()
    done = set(json.loads(sys.stdin.read()))
    deadline = time.monotonic() + options.budget
    for name, action in items(options.stage, torch.device(options.device)):
        if name in done:
            continue
        if time.monotonic() > deadline:
            _say({"item": name, "left_out": "no time was left"})
            continue
        _say({"begin": name})
        began = time.monotonic()
        try:
            result = action()
        except Exception as error:  # whatever it raises is this item's result
            result = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
        _say({"item": name, **result, "took_s": round(time.monotonic() - began, 2)})
        gc.collect()
        if options.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return SPOILED
    return 0


def _say(line: dict[str, Any]) -> None:
    print("\x1e" + json.dumps(line), flush=True)  # marked, for libraries print as well


if __name__ == "__main__":
    sys.exit(main())
