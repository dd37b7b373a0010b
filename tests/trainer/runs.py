"""Tiny datasets and runs that the trainer's tests share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config import Config
from megalite.config_file import build_config
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.parallel.mesh import Mesh, MeshShape, build_mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer

VOCAB = 257
Curve = list[tuple[float, float]]


def write_dataset(folder: Path, seed: int, documents: int = 120) -> Path:
    """Documents of a few hundred bytes in which each byte depends on the one before."""
    rng = np.random.default_rng(seed)
    tokenizer = ByteTokenizer()
    with ShardWriter(folder, tokenizer) as writer:
        for index in range(documents):
            steps = rng.integers(1, 4, rng.integers(1, 300))
            text = (rng.integers(0, 256) + np.cumsum(steps)) % 64
            writer.write(f"doc-{index}", "synthetic", np.append(text, tokenizer.eos_id))
    return folder


def tiny(root: Path, *overrides: str) -> Config:
    """A model of a few thousand parameters on `root`/train and `root`/valid."""
    values: dict[str, Any] = {
        "run_dir": str(root / "run"),
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 48,
            "max_seq_len": 64,
        },
        "mesh": {"bucket_mib": 0.02},
        "data": {
            "seq_len": 32,
            "sources": [{"path": str(root / "train")}],
            "validation": [{"path": str(root / "valid")}],
        },
        "optim": {"lr": 1e-2, "warmup_steps": 3},
        "train": {"steps": 20, "global_batch_size": 24, "micro_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"every_steps": 0},
    }
    return build_config(values, overrides)


@cache
def _mesh(shape: MeshShape) -> Mesh:
    """This process's place in the layout; made once, for making its groups takes longer than a tiny run."""
    return build_mesh(shape=shape)


def lay_out(mesh: Mesh, config: Config) -> Mesh:
    """The mesh a config asks for, of the processes of `mesh`."""
    keys = config.mesh
    shape = MeshShape(keys.tp, keys.pp, config.kv_copies, keys.zero_shard_size)
    return _mesh(shape) if mesh.size > 1 else mesh


def train(mesh: Mesh, config: Config) -> list[dict[str, Any]]:
    """Run a config on this rank; its metrics so far."""
    Trainer(config, lay_out(mesh, config)).fit(PreemptionFlag())
    return metrics(Path(config.run_dir))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(records: list[dict[str, Any]]) -> Curve:
    """(loss, gradient norm before clipping) of every step."""
    return [(record["loss"], record["grad_norm"]) for record in records]


def losses(curve: Curve) -> list[float]:
    """Those of every step."""
    return [loss for loss, _ in curve]


def apart(ours: Curve | list[float], reference: Curve | list[float]) -> float:
    """The largest relative difference of two curves, or of their losses; nan if either has one."""
    assert len(ours) == len(reference)
    return float(np.abs(np.array(ours) / np.array(reference) - 1).max())
