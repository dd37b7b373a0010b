"""Training speed on the CPU beside other trainers: one thread a process, interleaved, medians.

    python benchmarks/train_cpu.py                 every contender, both precisions and shapes
    python benchmarks/train_cpu.py --pairs 2 ...   fewer rounds
    python benchmarks/train_cpu.py --ranks         two gloo ranks against DistributedDataParallel
    python benchmarks/train_cpu.py --start         from process start to the first step

Every contender trains the same Llama-shaped model (hidden 320, 6 layers, 5 heads, ffn 896,
vocabulary 8192) on the same shapes, with AdamW and clipping by global norm, in a process of its own
that lives through the whole comparison; the rounds go around the contenders, so that a machine
whose speed drifts slows all of them. Needs `pip install transformers litgpt` for the peers; one
that is not installed is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from workers import Step, Worker, race, ratio, serve

VOCAB, HIDDEN, LAYERS, HEADS, FFN = 8192, 320, 6, 5, 896
SHAPES = [(8, 256), (2, 1024)]
PEERS = {"transformers": ["eager", "compiled"], "litgpt": ["eager", "compiled"]}


# --- contenders: each returns a function that takes one optimizer step ---------------------------


def megalite_step(mode: str, precision: str, batch: int, seq: int, mesh: Any = None, zero: int = 1) -> Step:
    import numpy as np
    import torch

    from megalite.config_file import build_config
    from megalite.data.batch import Batch
    from megalite.engines.allocator import keep_freed_memory
    from megalite.engines.native import NativeEngine
    from megalite.parallel.collectives import all_reduce
    from megalite.parallel.mesh import Axis, Mesh

    mesh = mesh or Mesh(0, 1, Axis(), torch.device("cpu"))
    keep_freed_memory()
    config = build_config(
        {
            "model": {
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "ffn_size": FFN,
            },
            "mesh": {"zero_stage": zero},
            "data": {"seq_len": seq},
            "optim": {"lr": 1e-4},
            "train": {
                "steps": 1,
                "global_batch_size": batch * mesh.dp.size,
                "micro_batch_size": batch,
                "precision": precision,
                "compile": mode == "compiled",
            },
        }
    )
    engine = NativeEngine(config, mesh)
    engine.initialize()
    ids = np.random.default_rng(mesh.rank).integers(0, VOCAB, (batch, seq + 1))
    positions = np.broadcast_to(np.arange(seq), (batch, seq)).copy()
    edges = np.arange(0, batch * seq + 1, seq, dtype=np.int32)
    data = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, None, np.arange(batch), edges)

    def step() -> None:
        sums = engine.forward_backward([data])
        squared = torch.tensor(sums.grad_norm_squared, dtype=torch.float64)
        norm = float(all_reduce(squared, mesh.dp).sqrt())
        engine.optimizer_step(1e-4, min(1.0, 1.0 / norm))

    return step


def _peer_step(forward: Any, parameters: list[Any], precision: str, ids: Any) -> Step:
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(mode: str, precision: str, batch: int, seq: int) -> Step:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            use_cache=False,
        )
    )

    def forward(ids: Any) -> Any:
        return model(input_ids=ids, labels=ids).loss

    run = torch.compile(forward) if mode == "compiled" else forward
    return _peer_step(run, list(model.parameters()), precision, torch.randint(0, VOCAB, (batch, seq)))


def litgpt_step(mode: str, precision: str, batch: int, seq: int) -> Step:
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = GPT(
        Config(
            name="bench",
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=HIDDEN,
            head_size=HIDDEN // HEADS,
            vocab_size=VOCAB,
            padded_vocab_size=VOCAB,
            block_size=2048,
            rotary_percentage=1.0,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=FFN,
            bias=False,
            parallel_residual=False,
        )
    )

    def forward(ids: Any) -> Any:
        return chunked_cross_entropy(model(ids)[:, :-1], ids[:, 1:], chunk_size=0)

    run = torch.compile(forward) if mode == "compiled" else forward
    return _peer_step(run, list(model.parameters()), precision, torch.randint(0, VOCAB, (batch, seq)))


def ddp_step(precision: str, batch: int, seq: int) -> Step:
    """DistributedDataParallel around our own model, in the best form it has for the precision."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from megalite.config import ModelConfig
    from megalite.engines.allocator import keep_freed_memory
    from megalite.model.transformer import Transformer

    keep_freed_memory()
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, ffn_size=FFN
    )

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Transformer(config)
            for parameter in self.model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)

        def forward(self, ids: Any) -> Any:
            return self.model.loss(ids[:, :-1], ids[:, 1:]).total / (batch * seq)

    module = DistributedDataParallel(Loss())
    ids = torch.randint(0, VOCAB, (batch, seq + 1))
    return _peer_step(module, list(module.parameters()), precision, ids)


def gemm_ceiling(precision: str) -> float:
    """FLOP/s of this core on the model's own matrix products, weighted as a step weighs them."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = [(HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2 * FFN), (FFN, HIDDEN)]
    flops = seconds = 0.0
    for inner, outer, times in [(*s, LAYERS) for s in shapes] + [(HIDDEN, VOCAB, 1)]:
        rows = 2048 if times > 1 else 512  # the loss meets the vocabulary in chunks
        x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
        y = torch.randn(rows, outer, dtype=dtype)
        for product in (lambda x=x, w=w: x @ w.t(), lambda y=y, w=w: y @ w, lambda x=x, y=y: y.t() @ x):
            product()
            taken = []
            for _ in range(9):
                began = time.perf_counter()
                product()
                taken.append(time.perf_counter() - began)
            seconds += times * (2048 // rows) * statistics.median(taken)
            flops += times * (2048 // rows) * 2.0 * rows * inner * outer
    return flops / seconds


# --- the comparisons -----------------------------------------------------------------------------


def work(name: str, mode: str, precision: str, batch: int, seq: int) -> None:
    import torch

    torch.set_num_threads(1)
    if name in ("ddp", "zero0", "zero1"):
        from megalite.parallel.mesh import build_mesh

        mesh = build_mesh()
        if name == "ddp":
            step = ddp_step(precision, batch, seq)
        else:
            step = megalite_step(mode, precision, batch, seq, mesh, int(name[-1]))
    else:
        build = {"megalite": megalite_step, "transformers": transformers_step, "litgpt": litgpt_step}[name]
        step = build(mode, precision, batch, seq)
    serve(step)


def compare(
    specs: list[tuple[str, str]], precision: str, batch: int, seq: int, pairs: int, ranks: int
) -> Any:
    """Rounds around all contenders; their medians."""

    def start(name: str, mode: str) -> Worker:
        command = [__file__, "--worker", name, mode or "-", precision, str(batch), str(seq)]
        return Worker(f"{name} {mode}".strip(), command, ranks)

    running, _ = race([partial(start, *spec) for spec in specs], pairs, 3)
    tokens = batch * seq * ranks
    return {
        worker.label: {
            "tokens_per_s": tokens / statistics.median(worker.seconds),
            "peak_mib": worker.rss_mib,
            "seconds": worker.seconds,
        }
        for worker in running
    }


def best_ratio(results: Any, ours: str, peers: list[str]) -> tuple[float, str]:
    """Our speed over the fastest peer's, as the median over rounds of the ratio within a round."""
    fastest = max(peers, key=lambda p: results[p]["tokens_per_s"])
    return ratio(results[fastest]["seconds"], results[ours]["seconds"])[0], fastest


def single(pairs: int, precisions: list[str]) -> dict[str, Any]:
    import torch

    from megalite.config import ModelConfig
    from megalite.model.flops import token_flops

    torch.set_num_threads(1)
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, ffn_size=FFN
    )
    specs = [("megalite", "eager"), ("megalite", "compiled")]
    specs += [(name, mode) for name, modes in PEERS.items() for mode in modes]
    report: dict[str, Any] = {}
    for precision in precisions:
        ceiling = gemm_ceiling(precision)
        for batch, seq in SHAPES:
            results = compare(specs, precision, batch, seq, pairs, 1)
            print(f"\n{precision}, {batch} × {seq}, one thread; GEMM ceiling {ceiling / 1e9:.0f} GFLOP/s")
            for label, r in results.items():
                share = r["tokens_per_s"] * token_flops(model, seq).strict / ceiling
                speed = f"{r['tokens_per_s']:7.0f} tokens/s  {share:5.0%} of ceiling"
                print(f"  {label:<22} {speed}  {r['peak_mib']:6.0f} MiB")
                r["share_of_ceiling"] = share
            peers = [label for label in results if not label.startswith("megalite")]
            for ours in (label for label in results if label.startswith("megalite")):
                if peers:
                    speed_up, fastest = best_ratio(results, ours, peers)
                    results[ours]["ratio_to_best"] = speed_up
                    print(f"  {ours}: {speed_up:.2f} × the fastest peer ({fastest})")
            report[f"{precision} {batch}x{seq}"] = results
    return report


def ranks(pairs: int) -> dict[str, Any]:
    report = {}
    for precision in ("fp32", "bf16"):
        specs = [("zero0", "eager"), ("zero1", "eager"), ("ddp", "")]
        results = compare(specs, precision, 8, 256, pairs, 2)
        print(f"\n{precision}, two gloo ranks, 8 × 256 each, same model")
        for label, r in results.items():
            speed_up, _ = best_ratio(results, label, ["ddp"])
            print(f"  {label:<14} {r['tokens_per_s']:7.0f} tokens/s  {speed_up:.2f} × DDP")
        report[precision] = results
    return report


def start(pairs: int) -> dict[str, Any]:
    """Seconds from starting `megalite train` to its first line of metrics, data made beforehand."""
    from megalite.data.tokenizer import ByteTokenizer
    from megalite.data.writer import ShardWriter

    config = Path(__file__).parent.parent / "configs/quickstart.toml"
    taken = []
    with tempfile.TemporaryDirectory() as root:
        with ShardWriter(Path(root) / "data", ByteTokenizer()) as writer:
            writer.write("this", "benchmark", ByteTokenizer().encode(Path(__file__).read_text()))
        for index in range(pairs):
            run = Path(root) / f"run{index}"
            command = [sys.executable, "-m", "megalite", "train", str(config), f"run_dir={run}"]
            command += [
                f'data.sources=[{{path="{root}/data"}}]',
                "data.validation=[]",
                "train.eval_every_steps=0",
            ]
            began = time.perf_counter()
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            metrics = run / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.01)
            taken.append(time.perf_counter() - began)
            process.kill()
            process.wait()
    print(f"process start to first step: median {statistics.median(taken):.1f} s of {len(taken)}")
    return {"seconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.worker:
        name, mode, precision, batch, seq = args.worker
        work(name, mode, precision, int(batch), int(seq))
        return
    if args.ranks:
        report = ranks(args.pairs)
    elif args.start:
        report = start(args.pairs)
    else:
        report = single(args.pairs, [args.precision] if args.precision else ["bf16", "fp32"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
