"""Where parameters lie in the flat buffers, which ranks that hold the same ones must agree on."""

from __future__ import annotations

import pytest
import torch

from megalite.config import ModelConfig
from megalite.model.transformer import Transformer
from megalite.optim.buckets import lay_out
from megalite.parallel.layers import TensorParallel
from megalite.parallel.mesh import Axis
from megalite.parallel.sharding import ShardSpec, shard_specs

MODEL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 1,
    "ffn_size": 24,
    "max_seq_len": 20,
    "position": "learned",
    "norm": "layernorm",
    "qkv_bias": True,
}


def _shared_buckets(specs: dict[str, ShardSpec], bucket_size: int) -> list[tuple[int, list[str]]]:
    """Sizes and parameters of all buckets but the vocabulary's."""
    buckets = lay_out(specs, bucket_size, Axis(0, 3), by_unit=False).buckets
    found = [(bucket.size, [slot.name for slot in bucket.slots]) for bucket in buckets]
    return [bucket for bucket in found if bucket[1] not in (["embedding"], ["head"])]


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_with_more_of_the_vocabulary_cut_all_else_alike(tp: int) -> None:
    """Else one rank would add up shares of a bucket when another has not got to it: a hang."""
    with torch.device("meta"):
        models = [
            Transformer(
                ModelConfig.model_validate(MODEL),
                tp=TensorParallel(Axis(rank, tp), Axis(rank, tp), sequence=True),
            )
            for rank in range(tp)
        ]
    specs = [shard_specs(model) for model in models]
    assert specs[0]["head"].local_shape != specs[-1]["head"].local_shape
    for bucket_size in (*range(1, 1200, 3), 10**9):
        first, *others = (_shared_buckets(each, bucket_size) for each in specs)
        assert others == [first] * (tp - 1), bucket_size
