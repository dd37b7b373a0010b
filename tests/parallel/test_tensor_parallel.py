"""A model divided over ranks is the model: loss and every gradient, in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalite.config import ModelConfig
from megalite.model.init import initial_values
from megalite.model.transformer import Recompute, Transformer, dropout_keys
from megalite.parallel.collectives import all_reduce
from megalite.parallel.deferred import WeightGradients, deferring
from megalite.parallel.layers import TensorParallel, qkv_spec
from megalite.parallel.mesh import Axis, Mesh, MeshShape, build_mesh
from megalite.parallel.sharding import ShardSpec, shard_specs, split, split_range
from tests.daily import one_a_day
from tests.ranks import run_ranks

SMALL: dict[str, Any] = {
    "vocab_size": 101,  # a prime: no number of ranks divides it
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_size": 40,
    "max_seq_len": 32,
    "init_std": 0.3,
}
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu_tanh",
    "num_kv_heads": 4,
    "tie_embeddings": True,
} | dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), True)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2-dropout": GPT2 | {"dropout": 0.3},
    "qwen3-mqa": {"qk_norm": True, "num_kv_heads": 1, "tie_embeddings": True},
    "qwen2-window": {"qkv_bias": True, "sliding_window": 5},
}


def _batch() -> dict[str, Any]:
    """Two samples of two documents each, some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(101, (2, 12), generator=generator) for _ in range(2))
    labels[0, 3:6] = -100
    doc_starts = torch.where(torch.arange(12) >= 7, 7, 0).expand(2, 12)
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": torch.arange(12) - doc_starts,
        "doc_starts": doc_starts,
        "dropout_keys": dropout_keys(7, torch.arange(2)),
        "z_loss": 1e-2,
        "chunk_bytes": 8 * 101 * 10,
    }


def _local(spec: ShardSpec, logical: Tensor) -> Tensor:
    flat = logical.flatten()
    return torch.cat([flat[:0], *(flat[part.start : part.stop] for part in spec.ranges())]).view(
        spec.local_shape
    )


def _loss_and_gradients(model: Transformer, late: bool = False) -> tuple[float, dict[str, Tensor]]:
    """With the weights' gradients computed in the backward pass, or `late`, after it."""
    names = shard_specs(model)
    model.double()
    with torch.no_grad():
        for name, spec in names.items():
            size = math.prod(spec.shape)
            values = initial_values(model.config, 1, name, 0, size).double()
            if values.numel() == values.eq(values[0]).sum():  # biases and norms, which start out all alike
                values += torch.linspace(-0.4, 0.3, size, dtype=torch.float64)
            model.get_parameter(name).copy_(_local(spec, values))
    waiting = WeightGradients() if late else None
    with deferring(waiting):
        loss = model.loss(**_batch()).total
        loss.backward()
    if waiting is not None:
        assert len(waiting) > 0
        waiting.run()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _errors(
    mesh: Mesh, values: dict[str, Any], tp: int, sequence: bool, recompute: Recompute, late: bool = False
) -> dict[str, float]:
    """How far this rank's loss and gradients are from one process's, relative to the largest element."""
    config = ModelConfig.model_validate(SMALL | values)
    mesh = build_mesh(shape=MeshShape(tp, kv_copies=max(tp // config.num_kv_heads, 1)))
    loss, gradients = _loss_and_gradients(
        Transformer(config, recompute, TensorParallel(mesh.tp, mesh.kv, sequence)), late
    )
    whole_loss, whole = _loss_and_gradients(Transformer(config))
    specs = shard_specs(Transformer(config, "none", TensorParallel(mesh.tp, mesh.kv, sequence)))
    assert specs.keys() == whole.keys() == gradients.keys()
    errors = {"loss": abs(loss / whole_loss - 1)}
    for name, spec in specs.items():
        found = gradients[name].flatten()
        for part in spec.ranges():
            if part.piece.is_partial:
                all_reduce(found[part.local : part.local + part.stop - part.start], part.piece.copies)
        expected = _local(spec, whole[name]).flatten()
        errors[name] = float((found - expected).abs().max() / whole[name].abs().max())
    return errors


@pytest.mark.parametrize("sequence", [False, True], ids=["whole-stream", "sequence-parallel"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str, tp: int, sequence: bool) -> None:
    for errors in run_ranks(_errors, tp, MODELS[name], tp, sequence, "none"):
        assert all(error < 1e-12 for error in errors.values()), errors


@pytest.mark.parametrize("recompute", one_a_day("selective", "full"))
def test_recompute_repeats_the_communication(recompute: Recompute) -> None:
    for sequence in (False, True):
        for errors in run_ranks(_errors, 2, MODELS["gpt2-dropout"], 2, sequence, recompute):
            assert all(error < 1e-12 for error in errors.values()), errors


@pytest.mark.parametrize("recompute", one_a_day("none", "full"))
def test_weight_gradients_may_come_later(recompute: Recompute) -> None:
    for sequence in (False, True):
        for errors in run_ranks(_errors, 2, MODELS["gpt2-dropout"], 2, sequence, recompute, True):
            assert all(error < 1e-12 for error in errors.values()), errors


# --- what a rank holds ----------------------------------------------------------------------------


@given(size=st.integers(1, 60), ranks=st.integers(1, 8))
def test_ranges_of_all_ranks_tile_the_whole(size: int, ranks: int) -> None:
    bounds = [split_range(size, Axis(rank, ranks)) for rank in range(ranks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    widths = [stop - start for start, stop in bounds]
    assert max(widths) - min(widths) <= 1


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 3),
    parts=st.integers(1, 3),
    ranks=st.integers(1, 4),
    data=st.data(),
)
def test_flat_ranges_are_where_the_elements_come_from(
    rows: int, columns: int, parts: int, ranks: int, data: st.DataObject
) -> None:
    shape = (rows * parts, columns)
    logical = torch.arange(math.prod(shape)).view(shape)
    seen = []
    for rank in range(ranks):
        spec = split(shape, Axis(rank, ranks), parts)
        blocks = [
            logical[p * rows : (p + 1) * rows][slice(*split_range(rows, Axis(rank, ranks)))]
            for p in range(parts)
        ]
        local = torch.cat(blocks).flatten()
        assert torch.equal(_local(spec, logical).flatten(), local)
        start = data.draw(st.integers(0, local.numel()))
        stop = data.draw(st.integers(start, local.numel()))
        cut = [torch.arange(part.start, part.stop) for part in spec.ranges(start, stop)]
        assert torch.equal(torch.cat(cut) if cut else local[:0], local[start:stop])
        seen.append(local)
    assert torch.equal(torch.cat(seen).sort().values, logical.flatten())


def test_ranks_that_share_a_key_head_hold_the_same_rows() -> None:
    held = []
    for rank in range(4):
        tp = TensorParallel(Axis(rank, 4), Axis(rank % 2, 2))
        held.append([(p.start, p.stop) for p in qkv_spec((8 * 10,), 4, 2, 10, tp).pieces])
    assert [rows[0] for rows in held] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert [rows[1] for rows in held] == [(40, 50), (40, 50), (50, 60), (50, 60)]
    assert [rows[2] for rows in held] == [(60, 70), (60, 70), (70, 80), (70, 80)]
