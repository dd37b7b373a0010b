"""The attention layer: projections, RoPE, and the cache that generation reads from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel, qkv_spec
from megalite.parallel.sharding import ShardedModule, whole
from megalite_kernels import attention, rms_norm, rope, rope_qkv


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


class Attention(ShardedModule):
    """Grouped-query attention with one fused projection [queries | keys | values].

    With tensor parallelism a rank computes its share of the heads.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim, self.window, self.eps = config.head_dim, config.sliding_window, config.norm_eps
        heads, kv_heads = config.num_heads, config.num_kv_heads
        # Several ranks may share a key head; none holds less than one.
        self.heads, self.kv_heads = heads // tp.axis.size, max(kv_heads // tp.axis.size, 1)
        width = (heads + 2 * kv_heads) * self.head_dim
        weight = qkv_spec((width, config.hidden_size), heads, kv_heads, self.head_dim, tp)
        bias = qkv_spec((width,), heads, kv_heads, self.head_dim, tp) if config.qkv_bias else None
        self.qkv = ColumnParallelLinear(tp, weight, bias)
        self.out = RowParallelLinear(
            tp, (heads * self.head_dim, config.hidden_size), config.attention_out_bias
        )
        # Each rank's heads give a share of their gradient.
        norm = whole((self.head_dim,), tp.axis, is_partial=tp.axis.size > 1)
        self.q_norm = self.declare("q_norm", norm) if config.qk_norm else None
        self.k_norm = self.declare("k_norm", norm) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        batch: int,
        rotation: tuple[Tensor, Tensor] | None,
        doc_starts: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x, returned [tokens, hidden], tokens = batch · seq; the rest as `Transformer.forward` has it."""
        qkv: Tensor = self.qkv(x)
        qkv = qkv.view(batch, qkv.shape[0] // batch, -1, self.head_dim)
        if rotation is not None and self.q_norm is None:
            q, k, v = rope_qkv(qkv, *rotation, self.heads, self.kv_heads)
        else:
            q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
            if rotation is not None:
                q, k = rope(q, *rotation), rope(k, *rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        y: Tensor = self.out(
            attention(q, k, v, doc_starts=doc_starts, window=self.window).flatten(2).flatten(0, 1)
        )
        return y


def rotation(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, fp32 [batch or 1, seq, head_dim/2] each.

    The angles are formed in fp32, as every published model was trained with.
    """
    # Not waited for, or the host would wait for all that the device has yet to compute.
    frequencies = rope_frequencies(config).to(positions.device, non_blocking=True)
    angles = positions[..., None].float() * frequencies
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
