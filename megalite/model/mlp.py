"""The MLP: SwiGLU with one fused gate-up projection, or GELU."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite_kernels import gelu, swiglu


class MLP(nn.Module):
    """hidden → ffn → hidden. With SwiGLU the first projection is [gate | up]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width = 2 * config.ffn_size if config.activation == "swiglu" else config.ffn_size
        self.up = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x, returned [batch, seq, hidden]."""
        inner = self.up(x)
        if self.activation == "swiglu":
            inner = swiglu(inner)
        else:
            inner = gelu(inner, tanh=self.activation == "gelu_tanh")
        y: Tensor = self.down(inner)
        return y
