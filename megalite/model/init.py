"""Initial weights as a function of (seed, parameter name, global index).

A rank computes just the elements it holds, and every layout starts from the same model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite_kernels.counter import derive_key, uniform

_CHUNK = 1 << 16


def initial_values(config: ModelConfig, seed: int, name: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a parameter, flat and row-major in its global shape; fp32, CPU.

    Norm weights are one and biases zero. Matrices are normal with `init_std`, divided by
    sqrt(2 · num_layers) where the output is added to the residual stream.

    Source:  Radford et al. 2019, section 2.3 (scaled residual init)
    """
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return torch.zeros(stop - start)
    if "norm" in name:
        return torch.ones(stop - start)
    std = config.init_std
    if config.scale_residual_init and name.endswith(("attention.out.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return _normal(derive_key("init", seed, name), start, stop).mul_(std)


def _normal(key: int, start: int, stop: int) -> Tensor:
    """Standard normal numbers by inversion of the distribution function, in cache-sized chunks."""
    values = torch.empty(stop - start)
    keys = torch.tensor(key)
    for low in range(start, stop, _CHUNK):
        high = min(low + _CHUNK, stop)
        u = uniform(keys, torch.arange(low, high))
        values[low - start : high - start] = torch.special.ndtri(u)
    return values
