"""Compile the hot loops: plain Python over numpy arrays, made machine code by numba when first called.

What to mind in such a loop: an int64 with a uint64 makes a float64, so hashes stay uint64 throughout with
constants made by `np.uint64`; indices are not bounds-checked; nothing may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from megalite.errors import DataError

F = TypeVar("F", bound=Callable[..., Any])

try:
    import numba
except ImportError:
    raise DataError("this needs numba; install it with: pip install 'megalite[data]'") from None


def compiled(function: F) -> F:
    """Machine code for the argument types met, kept on disk for the next process; releases the GIL."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


def inlined(function: F) -> F:
    """The same for a small function that only other compiled functions call."""
    return cast(F, numba.njit(inline="always")(function))
