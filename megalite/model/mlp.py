"""The MLP: SwiGLU with one fused gate-up projection, or GELU."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megalite.parallel.mlp import parallel_mlp
from megalite.parallel.sharding import split


class MLP(nn.Module):
    """hidden → ffn → hidden. With SwiGLU the first projection is [gate | up]."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.activation, self.tp = config.activation, tp
        parts = 2 if config.activation == "swiglu" else 1
        width = parts * config.ffn_size
        bias = split((width,), tp.axis, parts) if config.mlp_bias else None
        self.up = ColumnParallelLinear(tp, split((width, config.hidden_size), tp.axis, parts), bias)
        self.down = RowParallelLinear(tp, (config.ffn_size, config.hidden_size), config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x, returned [tokens, hidden]."""
        y = parallel_mlp(x, self.up.weight, self.down.weight, self.up.bias, self.activation, self.tp)
        return y if self.down.bias is None else y + self.down.bias
