"""Small transformers models with random weights, and our models that hold the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from megalite.config import ModelConfig
from megalite.convert import config_from_hf, weights_from_hf
from megalite.model.transformer import Transformer

_LLAMA_LIKE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1000.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name: transformers' configuration class and its arguments
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("LlamaConfig", _LLAMA_LIKE | {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("LlamaConfig", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", _LLAMA_LIKE | {"attention_bias": True, "mlp_bias": True}),
    "llama3-scaling": ("LlamaConfig", _LLAMA_LIKE | {"rope_scaling": _LLAMA3, "head_dim": 16}),
    "llama-linear": ("LlamaConfig", _LLAMA_LIKE | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral-window": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 19}),
    "mistral-wide-heads": (
        "MistralConfig",
        _LLAMA_LIKE | {"sliding_window": None, "head_dim": 12, "hidden_size": 40},
    ),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen2-window-tied": (
        "Qwen2Config",
        _LLAMA_LIKE
        | {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 0}
        | {"tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 20}),
    "qwen3-biases-tied": (
        "Qwen3Config",
        _LLAMA_LIKE | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt2-erf-untied": (
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 40, "n_layer": 1, "n_head": 5, "n_positions": 300, "n_inner": 72}
        | {"activation_function": "gelu", "tie_word_embeddings": False},
    ),
}


def build_reference(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A transformers model in eval mode, every parameter random, biases and norms too."""
    kind, arguments = REFERENCES[name]
    config = getattr(transformers, kind)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(0.15 * noise)
    return model


def our_config(reference: Any) -> ModelConfig:
    """Our configuration of a transformers model, by way of its config.json."""
    return config_from_hf(reference.config.to_dict())


def build_ours(reference: Any) -> Transformer:
    """Our model with a transformers model's weights."""
    config = our_config(reference)
    model = Transformer(config)
    state = reference.state_dict()
    with torch.no_grad():
        for name, values in weights_from_hf(state.__getitem__, config):
            model.get_parameter(name).copy_(values)
    return model


def reference_gradients(reference: Any, config: ModelConfig) -> dict[str, Tensor]:
    """A transformers model's gradients under our parameters' names."""
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    return dict(weights_from_hf(theirs.__getitem__, config))


def assert_close(ours: Tensor, expected: Tensor, what: str, relative: float = 1e-5) -> None:
    """Every element within `relative` of the expected tensor's largest.

    The floor is for what is zero but for rounding, such as a query's gradient when there is one key.
    """
    assert ours.shape == expected.shape, what
    scale = expected.abs().max().item()
    error = (ours - expected).abs().max().item()
    assert error <= max(relative * scale, 1e-6), f"{what}: off by {error:.2e}, largest value {scale:.2e}"
