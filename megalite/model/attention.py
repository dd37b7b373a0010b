"""The attention layer: projections, RoPE, and the cache that generation reads from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite_kernels import attention, rms_norm, rope


@dataclass
class KVCache:
    """Keys and values of one layer's past; [batch, capacity, kv_heads, head_dim] each."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new [batch, new, kv_heads, head_dim] and return all so far."""
        stop = self.length + k.shape[1]
        self.keys[:, self.length : stop], self.values[:, self.length : stop] = k, v
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]


class Attention(nn.Module):
    """Grouped-query attention with one fused projection [queries | keys | values]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window, self.eps = config.sliding_window, config.norm_eps
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = nn.Parameter(torch.empty(self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(self.head_dim)) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        doc_starts: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x, returned [batch, seq, hidden]; the rest as `Transformer.forward` takes it."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        if rotation is not None:
            q, k = rope(q, *rotation), rope(k, *rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(q, k, v, doc_starts=doc_starts, window=self.window)
        return F.linear(y.flatten(2), self.out.weight, self.out.bias)


def rotation(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, fp32 [batch or 1, seq, head_dim/2] each.

    The angles are formed in fp32, as every published model was trained with.
    """
    angles = positions[..., None].float() * rope_frequencies(config).to(positions.device)
    return angles.cos(), angles.sin()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair of a head, fp32 [head_dim/2].

    Source:  Su et al. 2021, section 3.2.2; linear: Chen et al. 2023, eq. 4; llama3: Dubey et al.
             2024, as in Meta's published code: long waves are divided by `factor`, short ones kept,
             the rest interpolated by how many turns fit into the original length
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
