"""Run folders of tiny models with random weights, one for each architecture we can express."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.commit import save
from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.retention import Retention
from megalite.config import Config, ModelConfig
from megalite.data.tokenizer import JsonTokenizer, Tokenizer, train_bpe
from megalite.model.init import initial_values
from megalite.model.transformer import Transformer
from megalite.parallel.mesh import Axis, Mesh

ALONE = Mesh(rank=0, size=1, dp=Axis(), device=torch.device("cpu"))
# Some tokenizers would cut the number or the line break elsewhere.
TEXT = "the fox jumps over the lazy dog in 1999;\n\n the dog doesn't sleep in 1999, the fox runs on. " * 20
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 48,
    "max_seq_len": 96,
    "init_std": 0.3,
}
BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu_tanh",
    "tie_embeddings": True,
} | BIASES
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"num_kv_heads": 1, "sliding_window": 7},
    "qwen2": {"num_kv_heads": 2, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"head_dim": 10, "qk_norm": True, "sliding_window": 5},
    "gpt2": GPT2,
}


def tiny_config(name: str) -> ModelConfig:
    """The tiny model of an architecture."""
    return ModelConfig.model_validate(SHAPE | MODELS[name])


def tiny_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights, without gradients."""
    model = Transformer(config).requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(initial_values(config, seed, name, 0, p.numel()).view_as(p))
    return model


def save_run(run_dir: Path, config: ModelConfig, tokenizer: Tokenizer, step: int = 3) -> Transformer:
    """A run folder with a checkpoint of random weights, as the trainer leaves it."""
    model = tiny_model(config, seed=step)
    whole = Config.model_validate(
        {
            "model": config,
            "data": {"seq_len": 32},
            "optim": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )
    slices = [
        TensorSlice("weight", name, tuple(p.shape), 0, p.numel(), p.reshape(-1))
        for name, p in model.named_parameters()
    ]
    meta = {"config": whole.model_dump(mode="json"), "tokenizer": tokenizer.fingerprint}
    save(run_dir / "checkpoints", step, step, lambda: slices, meta, ALONE, Retention(5))
    tokenizer.save(run_dir)
    return model


@cache
def bpe() -> JsonTokenizer:
    """A BPE tokenizer of `TEXT` with at most 300 ids."""
    return train_bpe([TEXT], 300)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """The same parameters, bit for bit."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
