"""What every section of a configuration is, and what its errors are worded with."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """A frozen TOML table that refuses keys it does not know, and numbers that are none (inf, nan)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _has_no_zero_byte(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # as "\u0000" writes it
            raise ValueError(f"{value!r} has a zero byte, which no path and no text may have")
        return value


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
