"""Which implementation of an operation runs: the caller's word, the environment's, or our choice."""

from __future__ import annotations

import os
from typing import Literal

Impl = Literal["auto", "torch", "reference"]
IMPLS: tuple[Impl, ...] = ("auto", "torch", "reference")


def resolve(impl: Impl) -> Literal["torch", "reference"]:
    """The implementation to run for a requested `impl`.

    "reference" is the plain formula that tests compare against; "torch" is the fastest torch code;
    "auto" is MEGALITE_KERNELS where it is set, else "torch".

    Raises:  ValueError for any other word, naming where it came from
    """
    asked: str = impl
    origin = "impl"
    if asked == "auto":
        asked = os.environ.get("MEGALITE_KERNELS", "auto")
        origin = "MEGALITE_KERNELS"
    if asked == "auto":
        asked = "torch"
    if asked == "torch":
        return "torch"
    if asked == "reference":
        return "reference"
    raise ValueError(f"{origin}={asked!r} is no kernel implementation; use one of {', '.join(IMPLS)}")
