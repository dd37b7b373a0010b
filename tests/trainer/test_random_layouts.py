"""Configurations drawn at random, every feature beside every other: the answer of one process on any layout.

A run begins on one layout, is asked to stop, and goes on from its checkpoint on another.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.store import open_checkpoint
from megalite.config import Config
from megalite.config_file import build_config
from megalite.errors import PreemptedError
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.daily import one_a_day
from tests.ranks import SOLO, run_ranks
from tests.trainer.runs import VOCAB, lay_out, metrics

STEPS, STOP = 4, 2


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _layout(draw: random.Random, world: int) -> dict[str, Any]:
    """Mesh keys for `world` processes."""
    tp = draw.choice(_divisors(world))
    pp = draw.choice(_divisors(world // tp))
    schedule = draw.choice(["gpipe", "1f1b", "zero_bubble", "interleaved"] if pp > 1 else ["1f1b"])
    return {
        "tp": tp,
        "pp": pp,
        "sequence_parallel": draw.choice([False, True]),
        "pp_schedule": schedule,
        "pp_chunks": 2 if schedule == "interleaved" else 1,
        "zero_stage": draw.randrange(4),
        "zero_shard_size": draw.choice([0, *_divisors(world // tp // pp)]),
        "bucket_mib": draw.choice([1e-6, 0.001, 0.005, 0.0157, 8.0]),
    }


def _model(draw: random.Random, tps: list[int], stages: int) -> dict[str, Any]:
    """A model that each of `tps`, and so many pipeline stages, can divide."""
    tp = math.lcm(*tps)
    position = draw.choice(["rope", "rope", "learned"])
    heads = tp * draw.choice([1, 2, 3])
    kv_heads = draw.choice([n for n in _divisors(heads) if all(n % tp == 0 or tp % n == 0 for tp in tps)])
    scaling = [
        None,
        {"type": "linear", "factor": 2.5},
        {"type": "llama3", "factor": 8.0, "original_seq_len": 16},
    ]
    bits = {
        key: draw.choice([False, True])
        for key in ("qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm", "tie_embeddings")
    }
    return bits | {
        "vocab_size": VOCAB + draw.randrange(4),
        "hidden_size": draw.choice([8, 20, 31]),
        "num_layers": stages + draw.randrange(3),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": draw.choice([3, 5] if position == "learned" else [2, 6, 8]),
        "ffn_size": tp * draw.choice([1, 7, 12]),
        "activation": draw.choice(["swiglu", "gelu", "gelu_tanh"]),
        "norm": draw.choice(["rmsnorm", "layernorm"]),
        "position": position,
        "rope_scaling": draw.choice(scaling) if position == "rope" else None,
        "max_seq_len": 24,
        "sliding_window": draw.choice([0, 1, 5, 100]),
        "dropout": draw.choice([0.0, 0.3]),
        "init_std": draw.choice([0.02, 0.3]),
    }


def _draw(seed: int, worlds: tuple[int, int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A configuration, and two layouts of it with a micro-batch and a recompute mode each."""
    draw = random.Random(seed)
    layouts = [_layout(draw, world) for world in worlds]
    dps = [world // mesh["tp"] // mesh["pp"] for world, mesh in zip(worlds, layouts, strict=True)]
    stages = max(mesh["pp"] * mesh["pp_chunks"] for mesh in layouts)
    model = _model(draw, [mesh["tp"] for mesh in layouts], stages)
    batch = math.lcm(*dps) * draw.choice([1, 3, 4])
    lengths = [{"tokens": 0, "seq_len": draw.choice([2, 6, 24])}, {"tokens": 24 * batch, "seq_len": 12}]
    values = {
        "seed": draw.choice([0, 2**63 - 1]),
        "model": model,
        "data": {
            "seq_len": 24,
            "packing": draw.choice(["concat", "best_fit"]),
            "document_mask": draw.choice([False, True]),
            "seq_len_schedule": draw.choice([[], lengths]),
        },
        # A larger eps than usual: where gradients are all but zero their rounding then decides nothing.
        "optim": {"lr": 1e-3, "warmup_steps": 1, "eps": 1e-4, "grad_clip": draw.choice([0.0, 0.1])},
        "train": {
            "steps": STEPS,
            "global_batch_size": batch,
            "micro_batch_size": 1,
            "precision": "fp32",
            "z_loss": draw.choice([0.0, 1e-3]),
            "loss_chunk_mib": draw.choice([1e-9, 0.01, 32.0]),
            "eval_every_steps": STEPS,
            "eval_samples": draw.choice([1, 5]),
        },
        "checkpoint": {"every_steps": 0},
        "resilience": {"digest_every_steps": 1, "max_rollbacks": 0},
    }
    parts = []
    for mesh, dp in zip(layouts, dps, strict=True):
        recompute = draw.choice(["none", "selective", "full"])
        train = {"micro_batch_size": draw.choice(_divisors(batch // dp)), "recompute": recompute}
        parts.append({"mesh": mesh, "train": train})
    return values, parts


def _train(mesh: Mesh, config: Config, stop: int) -> list[dict[str, Any]]:
    """Train to the end, or as a run that is asked to stop in its `stop`-th step."""
    trainer = Trainer(config, lay_out(mesh, config))
    step = trainer.train_step

    def stopping(batches: Any, lr: float, wants_stop: bool = False) -> Any:
        return step(batches, lr, trainer.step == stop - 1)

    trainer.train_step = stopping  # type: ignore[method-assign]
    try:
        trainer.fit(PreemptionFlag())
    except PreemptedError:
        assert trainer.step == stop
    return metrics(Path(config.run_dir))


# Seeds, and the processes before and after the stop.
CASES = [(seed, (2, 2)) for seed in range(9)]
CASES += [(seed, worlds) for worlds in ((4, 3), (4, 6)) for seed in range(4, 9)]


@pytest.mark.parametrize(("seed", "worlds"), one_a_day(*CASES), ids=str)
def test_any_features_on_any_layouts(root: Path, seed: int, worlds: tuple[int, int]) -> None:
    values, parts = _draw(seed, worlds)
    sources = {"sources": [{"path": str(root / "train")}], "validation": [{"path": str(root / "valid")}]}
    values["data"] |= sources

    def config(run: str, part: dict[str, Any]) -> Config:
        train = values["train"] | part.get("train", {})
        return build_config(
            values | {"run_dir": str(root / run), "train": train, "mesh": part.get("mesh", {})}
        )

    expected = _train(SOLO, config("one", {}), STEPS + 1)
    for world, part, stop in zip(worlds, parts, (STOP, STEPS + 1), strict=True):
        found = run_ranks(_train, world, config("many", part), stop)[0]
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("tokens", "seq_len"):
            assert ours[key] == theirs[key], key
        for key in ("loss", "z_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-9), (key, ours["step"])
    assert found[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-5)
    ours, theirs = open_checkpoint(root / "many"), open_checkpoint(root / "one")
    assert sorted(ours.names()) == sorted(theirs.names())
    for name in theirs.names():
        weight, wanted = ours.read("weight", name), theirs.read("weight", name)
        assert (weight - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name
