"""Parameters, FLOPs and the peak they are measured against."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megalite.config import ModelConfig

# Dense bf16 TFLOP/s by the makers' data sheets. A name that is not here gives no MFU: a wrong
# peak is worse than none.
_PEAK_TFLOPS = {
    "H200 NVL": 835,
    "H200": 989,
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
    "L4": 121,
}


@dataclass(frozen=True)
class TokenFlops:
    """Forward and backward FLOPs a token, by the two formulas in use.

    `strict` counts causal attention (half the square) and no input embedding; `non_causal` counts
    the full square, as nanoGPT, torchtitan and llm-foundry do.
    """

    strict: float
    non_causal: float


def count_parameters(config: ModelConfig) -> int:
    """Elements of all parameters, a tied embedding once."""
    from megalite.model.transformer import Transformer

    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def token_flops(config: ModelConfig, seq_len: int) -> TokenFlops:
    """FLOPs of one token in a sequence of `seq_len`, recompute not counted.

    Source:  Chowdhery et al. 2022 (PaLM), appendix B, with the head counted and lookups not
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = hidden * head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = hidden * config.ffn_size * (3 if config.activation == "swiglu" else 2)
    products = config.num_layers * (attention + mlp) + hidden * config.vocab_size
    square = 12.0 * config.num_layers * config.num_heads * head_dim * seq_len
    return TokenFlops(strict=6.0 * products + square / 2, non_causal=6.0 * products + square)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\bMIG\b", name):  # a slice of the device that it names
        return None
    for key, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b", name):  # whole words: an L40 is no L4, a GB200 no B200
            return tflops * 1e12
    return None


def has_products(device: torch.device, precision: str) -> bool:
    """Whether the device multiplies matrices of this precision in hardware; torch emulates what is missing
    many times slower than fp32."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0)
    # The questions torch itself asks before it hands a product to oneDNN.
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_bf16_supported if precision == "bf16" else mkldnn._is_mkldnn_fp16_supported
    return bool(supported())
