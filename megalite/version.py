"""Which megalite this is: all processes of a run must be the same one."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import megalite
import megalite_kernels


@cache
def code_version() -> str:
    """The version and a digest of every source file, so that two edits of one version differ."""
    digest = hashlib.sha256()
    for package in (megalite, megalite_kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{megalite.__version__}+{digest.hexdigest()[:12]}"
