"""The least work of an operation: what a measurement is held against."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written at least."""

    flops: int
    bytes: int
