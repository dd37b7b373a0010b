"""Write measured choices into the kernels' tile tables.

    python -m benchmarks.gpu.apply runs/gpu_check/choices.json

Reads what launch/gpu_check proposed. `impl="auto"` follows the tables from then on; review the change
and commit it with the measurement.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

TILES = Path(__file__).parents[2] / "kernels/megalite_kernels/tiles"


def apply(proposal: dict[str, Any], tiles: Path = TILES) -> list[Path]:
    """Put the proposal's choices into each operation's table, others stay; returns the files written."""
    written = []
    for operation, choices in proposal["choices"].items():
        path = tiles / proposal["architecture"] / f"{operation}.json"
        content = json.loads(path.read_text()) if path.exists() else {"choices": {}, "tiles": {}}
        content["choices"] |= choices
        path.write_text(_text(content))
        written.append(path)
    return written


def _text(content: dict[str, Any]) -> str:
    """As the tables are kept: a line for each variant."""
    wide = json.dumps(content, indent=2)
    return re.sub(r"\{\n {6}([^{}]*?)\n {4}\}", lambda m: "{" + re.sub(r"\n +", " ", m[1]) + "}", wide) + "\n"


def main() -> int:
    """Apply the file named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    for path in apply(json.loads(Path(sys.argv[1]).read_text())):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
