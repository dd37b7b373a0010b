"""What every section of a configuration is, and what its errors are worded with."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen TOML table that refuses keys it does not know, and numbers that are none (inf, nan)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
