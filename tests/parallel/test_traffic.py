"""Bytes sent in a step are the least there can be, to the byte, for every way of dividing the model.

n ranks, m micro-batches of t tokens, P parameters (each bucket padded to a multiple of n), L layers,
X = t · hidden words, words of 4 bytes; a reduce-scatter or all-gather of S words sends S · (n - 1)/n:

    ZeRO 0, 1   2 P · (n - 1)/n            gradients and weights once, whatever m
    ZeRO 2      (m + 1) P · (n - 1)/n      gradients m times, weights once
    ZeRO 3      3 m P · (n - 1)/n          less what the last block, the root and the norms are spared
    tp          m (4 L + 2) · 2 X · (n - 1)/n, and 2 t (n - 1) words for the loss
    tp + sp     m (10 L + 4) · X · (n - 1)/n, the loss, and the norms' gradients once
    pp          m X for each neighbour

The formulas are functions of `benchmarks/traffic.py`.

Sources: Rajbhandari et al. 2020 (ZeRO), section 7; Shoeybi et al. 2019, section 3; Korthikanti et al.
         2022, section 4.2.2; Narayanan et al. 2021, section 3.2
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import traffic
from megalite.config import Config
from megalite.config_file import build_config
from megalite.data.batch import Batch
from megalite.engines.native import NativeEngine
from megalite.model.transformer import Transformer
from megalite.optim.buckets import ROOT, lay_out
from megalite.parallel.mesh import Axis, Mesh, MeshShape, build_mesh
from megalite.parallel.pipeline import Pipeline, build_programs
from megalite.parallel.schedule import SCHEDULES, build_schedule
from megalite.parallel.sharding import shard_specs
from tests.daily import one_a_day
from tests.ranks import run_ranks

LAYERS, HIDDEN, SEQ, MICRO = 3, 16, 8, 2
TOKENS = MICRO * SEQ  # of a micro-batch


def _config(n: int, micro_batches: int, tp: int = 1, **mesh: Any) -> Config:
    return build_config(
        {
            "model": {
                "vocab_size": 101,  # a prime: shards need padding, and ranks unequal rows
                "hidden_size": HIDDEN,
                "num_layers": LAYERS,
                "num_heads": 4,
                "ffn_size": 40,
            },
            "mesh": {"tp": tp, **mesh},
            "data": {"seq_len": SEQ},
            "optim": {"lr": 1e-3},
            "train": {
                "steps": 1,
                "global_batch_size": MICRO * micro_batches * n // tp,
                "micro_batch_size": MICRO,
                "precision": "fp32",
                "loss_chunk_mib": 4 * 101 * 5 / 2**20,
            },
        }
    )


@cache
def _mesh(tp: int) -> Mesh:
    return build_mesh(shape=MeshShape(tp))


def _sent(mesh: Mesh, config: Config, micro_batches: int) -> Fraction:
    """What a rank sends in one step of the engine."""
    engine = NativeEngine(config, _mesh(config.mesh.tp))
    engine.initialize()
    ids = np.random.default_rng(engine.mesh.dp.rank).integers(0, 101, (MICRO, SEQ + 1))
    positions = np.broadcast_to(np.arange(SEQ), (MICRO, SEQ)).copy()
    edges = np.arange(0, MICRO * SEQ + 1, SEQ, dtype=np.int32)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, None, np.arange(MICRO), edges)
    with traffic.Traffic() as counted:
        engine.forward_backward([batch] * micro_batches)
        engine.optimizer_step(1e-3, 1.0)
    return counted.total


def _sent_each(mesh: Mesh, runs: list[tuple[Config, int]]) -> list[Fraction]:
    """Many runs in one call."""
    return [_sent(mesh, *run) for run in runs]


def _buckets(config: Config, n: int) -> list[tuple[str, bool, int]]:
    """Unit, whether it is of matrices, and size without padding of each bucket a rank has."""
    with torch.device("meta"):
        specs = shard_specs(Transformer(config.model))
    mesh = config.mesh
    layout = lay_out(specs, int(mesh.bucket_mib * 2**20) // 4, Axis(0, n), by_unit=mesh.zero_stage == 3)
    return [(b.unit, b.decays, sum(math.prod(s.spec.shape) for s in b.slots)) for b in layout.buckets]


def _least(config: Config, n: int, micro_batches: int) -> Fraction:
    """The formula of the config's ZeRO stage."""
    stage, buckets = config.mesh.zero_stage, _buckets(config, n)
    sizes = [traffic.padded(size, n if stage else 1) for *_, size in buckets]
    if stage <= 1:
        return traffic.zero_0_or_1(sizes, n)
    if stage == 2:
        return traffic.zero_2(sizes, n, micro_batches)
    blocks = [0] * LAYERS
    root = vectors = 0
    for (unit, decays, _), size in zip(buckets, sizes, strict=True):
        if not decays:
            vectors += size
        elif unit == ROOT:
            root += size
        else:
            blocks[int(unit.split(".")[1])] += size
    least = traffic.zero_3(blocks, root, vectors, n, micro_batches)
    assert least < Fraction(3 * micro_batches, 2) * traffic.zero_0_or_1(sizes, n)  # less than 3 m P
    return least


@pytest.mark.parametrize("n", one_a_day(2, 3))
def test_zero(n: int) -> None:
    runs = [
        (_config(n, micro_batches, zero_stage=stage, bucket_mib=bucket_mib), micro_batches)
        for bucket_mib, micro_batches in ((0.005, 1), (0.005, 3), (8.0, 3))
        for stage in range(4)
    ]
    least = [_least(config, n, micro_batches) for config, micro_batches in runs]
    assert run_ranks(_sent_each, n, runs) == [least] * n


def test_padding_is_all_that_exceeds_the_parameters() -> None:
    config = _config(3, 1, zero_stage=1, bucket_mib=0.005)
    sizes = [size for *_, size in _buckets(config, 3)]
    assert any(size % 3 for size in sizes)
    extra = traffic.zero_0_or_1([traffic.padded(size, 3) for size in sizes], 3) - traffic.zero_0_or_1(
        sizes, 3
    )
    assert 0 < extra <= 2 * 2 * traffic.WORD * len(sizes)


@pytest.mark.parametrize("n", one_a_day(2, 4))
def test_tensor_parallel(n: int) -> None:
    runs, least = [], []
    for micro_batches, sequence in ((1, False), (3, False), (1, True), (3, True)):
        runs.append((_config(n, micro_batches, tp=n, sequence_parallel=sequence), micro_batches))
        sent = micro_batches * traffic.tensor_parallel_activations(LAYERS, HIDDEN, TOKENS, n, sequence)
        least.append(sent + traffic.norm_gradients(LAYERS, HIDDEN, n) * sequence)
    assert run_ranks(_sent_each, n, runs) == [least] * n


def _sent_by_stage(mesh: Mesh, schedule: str, micro_batches: int, chunks: int) -> Fraction:
    """What a rank sends in one step of the pipeline's executor."""
    layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(chunks))
    last = mesh.size * chunks - 1

    def forward(stage: int, _micro_batch: int, x: Tensor | None, /) -> Tensor:
        y: Tensor = layers[stage // mesh.size](torch.ones(TOKENS, HIDDEN) if x is None else x)
        return y.sum() if stage == last else y

    program = build_programs(build_schedule(schedule, mesh.size, micro_batches, chunks))[mesh.rank]
    pipeline = Pipeline([forward] * chunks, mesh.world, mesh.device)
    with traffic.Traffic() as counted:
        pipeline.run(program, (TOKENS, HIDDEN), torch.float32)
    return counted.total


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pipeline(schedule: str) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    for pp in (2, 3):
        stages = pp * chunks
        stage_sends = [traffic.pipeline(stage, stages, HIDDEN, TOKENS, 5) for stage in range(stages)]
        least = [sum(stage_sends[rank::pp], Fraction()) for rank in range(pp)]
        assert run_ranks(_sent_by_stage, pp, schedule, 5, chunks) == least
