"""The MLP: SwiGLU with one fused gate-up projection, or GELU."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megalite.parallel.sharding import split
from megalite_kernels import gelu, swiglu


class MLP(nn.Module):
    """hidden → ffn → hidden. With SwiGLU the first projection is [gate | up]."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.activation = config.activation
        parts = 2 if config.activation == "swiglu" else 1
        width = parts * config.ffn_size
        bias = split((width,), tp.axis, parts) if config.mlp_bias else None
        self.up = ColumnParallelLinear(tp, split((width, config.hidden_size), tp.axis, parts), bias)
        self.down = RowParallelLinear(tp, (config.ffn_size, config.hidden_size), config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x, returned [tokens, hidden]."""
        inner = self.up(x)
        if self.activation == "swiglu":
            inner = swiglu(inner)
        else:
            inner = gelu(inner, tanh=self.activation == "gelu_tanh")
        y: Tensor = self.down(inner)
        return y
