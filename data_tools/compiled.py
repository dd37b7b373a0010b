"""Compile the hot loops: plain Python over numpy arrays, made machine code by numba when first called.

What to mind in such a loop: an int64 with a uint64 makes a float64, so hashes stay uint64 throughout with
constants made by `np.uint64`; indices are not bounds-checked; nothing may depend on the number of threads.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from megalite.errors import DataError

F = TypeVar("F", bound=Callable[..., Any])

# What numba makes when imported stays: a hundred thousand objects, which the collector of garbage would go
# through again and again for nothing, then and whenever it looks at all there is.
gc.disable()
try:
    import numba
except ImportError:
    raise DataError("this needs numba; install it with: pip install 'megalite[data]'") from None
finally:
    gc.freeze()
    gc.enable()


def compiled(function: F) -> F:
    """Machine code for the argument types met, kept on disk for the next process; releases the GIL."""
    config: Any = numba.config
    elsewhere, config.CACHE_DIR = config.CACHE_DIR, str(_cache_folder())
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    finally:
        config.CACHE_DIR = elsewhere


def inlined(function: F) -> F:
    """The same for a small function that only other compiled functions call."""
    return cast(F, numba.njit(inline="always")(function))


@cache
def _cache_folder() -> Path:
    """Where machine code is kept: a folder for each state of all compiled sources.

    numba looks only at the file a function is in, and would go on using old code of what it calls.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        content = path.read_bytes()
        if b"data_tools.compiled" in content:
            digest.update(content)
    folder = here / "__pycache__"
    if not os.access(folder if folder.exists() else here, os.W_OK):
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megalite"
    return folder / f"compiled-{digest.hexdigest()[:16]}"
