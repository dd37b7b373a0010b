"""What a save costs training: the model of configs/quickstart.toml on one CPU process, in fp32.

    python benchmarks/checkpoint_cpu.py [--rounds 5] [--to FOLDER]

A round takes plain steps, saves, and takes as many steps while the save is being written, once with
`checkpoint.asynchronous` and once without, interleaved; medians of wall and of processor time. FOLDER is
where checkpoints are written (and deleted), so that a slow disk can be tried.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megalite.checkpoint.writer import Writer
from megalite.config import Config
from megalite.config_file import load_config
from megalite.data.loader import Batch
from megalite.engines.allocator import keep_freed_memory
from megalite.engines.native import NativeEngine
from megalite.log import RunLog
from megalite.parallel.mesh import Axis, Mesh

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.toml"
STEPS = 1  # before a save, and beside it


def build(folder: Path) -> tuple[Config, Mesh, NativeEngine, list[Batch]]:
    """The model, and the micro-batches of a step."""
    config = load_config(str(CONFIG), ["train.precision=fp32", f"run_dir={folder}"])
    mesh = Mesh(0, 1, Axis(), torch.device("cpu"))
    engine = NativeEngine(config, mesh)
    engine.initialize()
    rng, width, length = np.random.default_rng(0), config.train.micro_batch_size, config.data.seq_len
    batches = []
    for _ in range(config.grad_accum_steps(1)):
        ids = rng.integers(0, config.model.vocab_size, (width, length + 1))
        positions = np.broadcast_to(np.arange(length), (width, length)).copy()
        edges = np.arange(0, ids[:, 1:].size + 1, ids.shape[1] - 1, dtype=np.int32)
        batches.append(Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, None, np.arange(width), edges))
    return config, mesh, engine, batches


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.to) as folder:
        config, mesh, engine, batches = build(Path(folder))

        def steps() -> tuple[float, float]:
            """Wall and processor seconds of a step."""
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                engine.forward_backward(batches)
                engine.optimizer_step(1e-4, 1.0)
            return (time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS

        steps()
        with RunLog(Path(folder), False, 1, 1) as log:
            writers = {}
            for name, value in (("asynchronous", True), ("synchronous", False)):
                keys = config.checkpoint.model_copy(
                    update={"asynchronous": value, "every_steps": 0, "keep_last": 1}
                )
                saving = config.model_copy(update={"checkpoint": keys})
                writers[name] = Writer(saving, mesh, log, engine.num_parameters)
            for number in range(args.rounds + 1):
                for name, writer in writers.items():
                    plain = steps()
                    wall, cpu = time.perf_counter(), time.process_time()
                    writer.save(number + 1, 0, {}, engine)
                    stall = time.perf_counter() - wall, time.process_time() - cpu
                    beside = steps()
                    writer.wait()
                    if number:  # the first allocates the memory that the others use again
                        row = {"step_s": plain, "stall_s": stall, "beside_s": beside}
                        for key, (on_wall, on_cpu) in row.items():
                            kinds = found.setdefault(name, {})
                            kinds.setdefault(key, []).append(on_wall)
                            kinds.setdefault(f"{key}_cpu", []).append(on_cpu)
    result = {}
    for mode, kinds in found.items():
        medians = {key: statistics.median(values) for key, values in kinds.items()}
        shares = {kind: medians[f"stall_s{kind}"] / medians[f"step_s{kind}"] for kind in ("", "_cpu")}
        result[mode] = {key: round(value, 5) for key, value in medians.items()} | {
            f"{name}{kind}": round(share / every, 6)
            for kind, share in shares.items()
            for name, every in (("share_of_a_step", 1), ("share_at_every_100_steps", 100))
        }
    print(json.dumps({"parameters": engine.num_parameters, **result}, indent=2))


if __name__ == "__main__":
    main()
