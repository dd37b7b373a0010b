"""Shares of a mixture: by hand, by temperature, and held below what a source has to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megalite.data.mixture import temperature_weights
from megalite.errors import DataError

Floats = NDArray[np.float64]


def wanted_shares(
    tokens: Mapping[str, int], weights: Mapping[str, float], temperature: float | None
) -> dict[str, float]:
    """The share of each source before any cap: `weights` if given, else ∝ tokens^(1/T), T = 1 by default.

    Raises:  DataError if the weights leave out a source, or are all 0
    """
    if weights:
        if missing := [source for source in tokens if source not in weights]:
            raise DataError(
                f"mix.weights has none for {missing[0]!r}; give every source one, 0 leaves it out"
            )
        values = np.array([weights[source] for source in tokens], dtype=np.float64)
        if not values.any():
            raise DataError("mix.weights are all 0; give one source a share")
    else:
        values = np.array(temperature_weights(list(tokens.values()), temperature or 1.0))
    return dict(zip(tokens, (values / values.sum()).tolist(), strict=True))


def fill(wanted: Sequence[float] | Floats, limits: Sequence[float] | Floats, total: float) -> Floats:
    """Divide `total` in proportion to `wanted`, no part above its limit; the others share what is over.

    part[i] = min(limit[i], λ · wanted[i]) with λ such that they add up to `total`, as far as the limits of
    those with a share allow.

    Shapes:  wanted, limits [sources]; returns [sources]
    """
    shares, caps = np.asarray(wanted, dtype=np.float64), np.asarray(limits, dtype=np.float64)
    parts = np.zeros_like(shares)
    is_open = shares > 0
    while is_open.any():
        rest = total - parts[~is_open].sum()
        parts[is_open] = rest * shares[is_open] / shares[is_open].sum()
        is_over = is_open & (parts >= caps)
        if not is_over.any():
            break
        parts[is_over] = caps[is_over]
        is_open &= ~is_over
    return parts
