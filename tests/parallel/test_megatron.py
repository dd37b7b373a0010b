"""Megatron-core as an oracle: the same weights, divided its way by tensor parallelism, give our answers."""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.config import ModelConfig
from megalite.model.init import initial_values
from megalite.model.transformer import Transformer
from megalite.parallel.mesh import build_mesh
from tests.ranks import join_ranks, spawn_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, init_std=0.2
)
BATCH, SEQ = 3, 16


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def _weights() -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(CONFIG).named_parameters()}
    return {
        name: initial_values(CONFIG, 1, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()
    }


def _their_shard(name: str, ours: dict[str, Tensor], rank: int, size: int) -> Tensor:
    """Megatron's parameter on a rank, made of our logical ones."""

    def rows(weight: Tensor) -> Tensor:
        return weight.chunk(size)[rank]

    plain = {
        "embedding.word_embeddings.weight": "embedding",
        "output_layer.weight": "head",
        "decoder.final_layernorm.weight": "norm.weight",
    }
    if name in plain:
        weight = ours[plain[name]]
        return rows(weight) if weight.dim() == 2 else weight
    _, _, layer, rest = name.split(".", 3)
    block = {key.removeprefix(f"blocks.{layer}."): value for key, value in ours.items()}
    if rest == "self_attention.linear_qkv.weight":
        # Theirs is by key head: its queries, its key, its value.
        group, dim = CONFIG.num_heads // CONFIG.num_kv_heads, CONFIG.head_dim
        kv = CONFIG.num_kv_heads * dim
        q, k, v = block["attention.qkv.weight"].split([CONFIG.num_heads * dim, kv, kv])
        parts = zip(q.split(group * dim), k.split(dim), v.split(dim), strict=True)
        return rows(torch.cat([tensor for part in parts for tensor in part]))
    if rest == "mlp.linear_fc1.weight":
        gate, up = block["mlp.up.weight"].chunk(2)
        return torch.cat((rows(gate), rows(up)))
    return {
        "input_layernorm.weight": lambda: block["attention_norm.weight"],
        "pre_mlp_layernorm.weight": lambda: block["mlp_norm.weight"],
        "self_attention.linear_proj.weight": lambda: rows(block["attention.out.weight"]).t(),
        "mlp.linear_fc2.weight": lambda: rows(block["mlp.down.weight"]).t(),
    }[rest]()


def _build_theirs(size: int) -> Any:
    """Its GPTModel of local layers; two calls that know only CUDA are given their CPU meaning."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    config = TransformerConfig(
        num_layers=CONFIG.num_layers,
        hidden_size=CONFIG.hidden_size,
        ffn_hidden_size=CONFIG.ffn_size,
        num_attention_heads=CONFIG.num_heads,
        num_query_groups=CONFIG.num_kv_heads,
        tensor_model_parallel_size=size,
        normalization="RMSNorm",
        layernorm_epsilon=CONFIG.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        CONFIG.vocab_size,
        SEQ,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _run_theirs(out: str) -> None:
    """Loss and squared gradient norm, the parameters that both ranks hold counted once."""
    mesh = build_mesh()
    model, weights = _build_theirs(mesh.size), _weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_their_shard(name, weights, mesh.rank, mesh.size))
    tokens, labels = _data()
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    loss = model(tokens, torch.arange(SEQ).expand(BATCH, -1), mask, labels=labels).mean()
    loss.backward()
    mine = [p.grad for p in model.parameters() if p.dim() > 1 or mesh.rank == 0]
    squared = sum(float(grad.double().square().sum()) for grad in mine)
    Path(out, f"{mesh.rank}.json").write_text(json.dumps([float(loss), squared]))


def test_megatron_core_agrees(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    with torch.no_grad():
        for name, weight in _weights().items():
            model.get_parameter(name).copy_(weight)
    tokens, labels = _data()
    loss = model.loss(tokens, labels).total / labels.numel()
    loss.backward()
    norm = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert join_ranks(spawn_ranks(_run_theirs, 2, str(tmp_path)), timeout_s=120) == [0, 0]
    theirs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for their_loss, _ in theirs:
        assert their_loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert sum(squared for _, squared in theirs) ** 0.5 == pytest.approx(norm, rel=1e-5)
