"""Which implementation of every operation `impl="auto"` picks, here and by each shipped table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megalite_kernels import tiles
from megalite_kernels.dispatch import resolve


@dataclass(frozen=True)
class Measured:
    """What a table picks, and the evidence: torch's time over the kernel's, None where nobody measured."""

    picks: str
    speedup: float | None


@dataclass(frozen=True)
class Choice:
    """An operation's implementation on a device, and by each architecture's table.

    `variant` is one that some table decides on, or empty for all the others.
    """

    operation: str
    variant: str
    here: str
    tables: dict[str, Measured]


def operations() -> list[str]:
    """Every operation that has a kernel: those with a tile table."""
    return sorted({path.stem for path in Path(tiles.__file__).parent.glob("sm_*/*.json")})


def choices(device: torch.device) -> list[Choice]:
    """A line for every measured variant of every operation, and one for the rest of each.

    Raises:  ValueError if MEGALITE_KERNELS asks for what cannot run on the device
    """
    x = torch.empty(0, device=device)
    found = []
    for operation in operations():
        by_table = {name: tiles.table(operation, name)["choices"] for name in tiles.ARCHITECTURES}
        decided = {variant for measured in by_table.values() for variant in measured} - {""}
        for variant in [*sorted(decided), ""]:
            tables = {
                name: Measured(
                    tiles.choice(operation, variant, name), measured.get(variant, {}).get("speedup")
                )
                for name, measured in by_table.items()
            }
            found.append(Choice(operation, variant, resolve("auto", operation, x, variant), tables))
    return found
