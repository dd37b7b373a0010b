"""Random numbers as a pure function of (key, index).

Nothing is consumed in order, so a rank can draw just the elements it holds, and any layout, device
or replay of a step sees the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: 2⁶⁴ / φ


def derive_key(*parts: int | str) -> int:
    """A 63-bit key from a path of names and numbers; different paths give unrelated keys."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(keys: Tensor, index: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one for each (key, index) pair.

    Shapes:  keys and index int64, broadcast against each other; returns float64 of that shape
    Source:  Steele et al. 2014 (SplitMix64), on key + index · 2⁶⁴/φ; 52 bits are used
    """
    bits = _mix(keys + index * _GOLDEN)
    return (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's `>>` on int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def fold(keys: Tensor, salt: Tensor | int) -> Tensor:
    """New keys from old: one for each (key, salt) pair, int64 of the broadcast shape."""
    if isinstance(salt, int):  # which does not wrap around, as the hash wants and tensors do
        return _mix(keys + ((salt * _GOLDEN + 2**63) % 2**64 - 2**63))
    return _mix(keys + salt * _GOLDEN)
