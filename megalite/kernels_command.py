"""`megalite kernels`: which implementation of each operation runs, and the measurement that says so."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megalite.errors import ConfigError

if TYPE_CHECKING:
    from megalite_kernels.choices import Choice, Measured

_HELP = """\
Show which implementation of each operation runs here, and which one the tables for sm_80 (A100) and
sm_90 (H100, H200) pick, with the evidence: the time of torch's best over our kernel's. Where nobody
has measured, torch runs. MEGALITE_KERNELS=torch or triton overrides every choice.

examples:
  megalite kernels
  megalite kernels --json
  MEGALITE_KERNELS=torch megalite kernels
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kernels` to the command line."""
    parser = commands.add_parser(
        "kernels",
        help="show which implementation of each operation runs",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_kernels)


def _kernels(args: argparse.Namespace) -> int:
    import torch

    from megalite_kernels.choices import choices
    from megalite_kernels.dispatch import VARIABLE, has_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    override = os.environ.get(VARIABLE)
    try:
        found = choices(device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if args.json:
        facts = {"device": name, "triton": has_triton(), VARIABLE: override}
        print(json.dumps({**facts, "choices": [asdict(choice) for choice in found]}, indent=1))
        return 0
    print(f"device: {name}; Triton: {'installed' if has_triton() else 'not installed'}")
    said = "follow the measurements" if override in (None, "auto") else f"all are {override}"
    print(f"{VARIABLE}: {override or 'not set'}; choices here {said}\n")
    print(_table(found))
    return 0


def _table(found: Sequence[Choice]) -> str:
    decided = {choice.operation for choice in found if choice.variant}
    rows = [["operation", "variant", "here", *found[0].tables]]
    for c in found:
        variant = c.variant or ("all others" if c.operation in decided else "all")
        rows.append([c.operation, variant, c.here, *map(_evidence, c.tables.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _evidence(measured: Measured) -> str:
    said = "not measured" if measured.speedup is None else f"{measured.speedup:.2f} ×"
    return f"{measured.picks} ({said})"
