"""One tiny run of our own trainer on a mixture, in a process of its own, and its loss on every source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from data_tools.mix.groups import Group, sources_of
from megalite.config.section import Section
from megalite.config_file import toml_value
from megalite.data.folder import disk_errors
from megalite.errors import DataError
from megalite.log import METRICS, read_json_lines

# What launchers tell their own ranks; a proxy is alone.
_OF_LAUNCHERS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "MEGALITE_EXIT_FILE"),
}


class ProxySettings(Section):
    """The tiny run that stands for the large one."""

    hidden_size: int = Field(64, gt=0, description="of the model; a head has 32")
    num_layers: int = Field(2, gt=0, description="of the model")
    seq_len: int = Field(256, gt=0, description="tokens a sample")
    steps: int = Field(500, gt=0, description="optimizer steps")
    batch_size: int = Field(16, gt=0, description="samples a step")
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    seed: int = Field(0, ge=0, description="of the weights and the order, the same in every proxy")
    eval_samples: int = Field(32, gt=0, description="held-out samples of each dataset")
    overrides: tuple[str, ...] = Field(
        (), strict=False, description='anything else of a run, e.g. ["train.precision=bf16"]'
    )


def train_proxy(
    settings: ProxySettings, groups: Sequence[Group], weights: Mapping[str, float], folder: Path
) -> dict[str, float]:
    """Train on a mixture, weights by group name; the final held-out loss of each source that has held-out
    documents, its buckets by their tokens. `folder` is gone afterwards.

    Raises:  DataError with the trainer's last words if it fails
    """
    held_out = [group for group in groups if group.has_valid(settings.seq_len)]
    run_dir = folder / f"attempt-{os.getpid()}"  # an earlier one that lost its parent may still be writing
    with disk_errors(folder):
        run_dir.mkdir(parents=True, exist_ok=True)
        config = run_dir / "proxy.toml"
        config.write_text(_config(settings, groups, held_out, weights, run_dir), encoding="utf-8")
    command = [sys.executable, "-m", "megalite", "train", str(config), *settings.overrides]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"{folder.name} ended with code {done.returncode}: {words[-1]}")
    record = read_json_lines(run_dir / METRICS)[-1]
    losses = record.get("val_losses", [record["val_loss"]])  # of one dataset there is only the one
    if None in losses:
        raise DataError(f"{folder.name} has no loss on {held_out[losses.index(None)].name}: it diverged")
    shutil.rmtree(folder, ignore_errors=True)
    by_name = {group.name: loss for group, loss in zip(held_out, losses, strict=True)}
    return {
        source: sum(by_name[g.name] * g.tokens for g in each) / sum(g.tokens for g in each)
        for source, each in sources_of(held_out).items()
    }


def _config(
    settings: ProxySettings,
    groups: Sequence[Group],
    held_out: Sequence[Group],
    weights: Mapping[str, float],
    run_dir: Path,
) -> str:
    heads = max(settings.hidden_size // 32, 1)
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": max(group.vocab_size for group in groups),
            "hidden_size": settings.hidden_size,
            "num_layers": settings.num_layers,
            "num_heads": heads,
            "ffn_size": 8 * settings.hidden_size // 3,
            "max_seq_len": settings.seq_len,
            "tie_embeddings": True,
        },
        "data": {
            "seq_len": settings.seq_len,
            "sources": [
                {"path": str(group.train), "weight": weights[group.name]}
                for group in groups
                if weights[group.name] > 0
            ],
            "validation": [{"path": str(group.valid)} for group in held_out],
        },
        "optim": {"lr": settings.lr, "warmup_steps": settings.steps // 10},
        "train": {
            "steps": settings.steps,
            "global_batch_size": settings.batch_size,
            "micro_batch_size": settings.batch_size,
            "precision": "fp32",
            "eval_every_steps": settings.steps,
            "eval_samples": settings.eval_samples * len(held_out),
        },
        "checkpoint": {"every_steps": 0},
    }
    lines = [f"run_dir = {toml_value(str(run_dir))}", f"seed = {settings.seed}"]
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """One process with one thread, on the GPU of this rank where a launcher has given it one."""
    found = {key: value for key, value in environ.items() if key not in _OF_LAUNCHERS}
    if "LOCAL_RANK" in environ:
        rank = int(environ["LOCAL_RANK"])
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else None
        found["CUDA_VISIBLE_DEVICES"] = gpus[rank % len(gpus)] if gpus else str(rank)
    # Sums in another order would make the losses depend on the machine's load of workers.
    return found | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
