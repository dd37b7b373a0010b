"""Step time of every way of dividing a model on the CPU, beside peers: gloo ranks of one thread.

    python benchmarks/parallel_cpu.py                          everything in fp32, at hidden 256 and 1024
    python benchmarks/parallel_cpu.py --precision bf16         data parallelism in bf16
    python benchmarks/parallel_cpu.py --only 'zero3 2*'        cases by name, a shell pattern
    python benchmarks/parallel_cpu.py --hidden 256 --pairs 3   one size, fewer rounds
    python benchmarks/parallel_cpu.py --batch 1                fewer samples a rank, so less computation
    python benchmarks/parallel_cpu.py --out FILE               the figures as JSON

Every contender of a case trains the same Llama-shaped model on the same tokens with AdamW and clipping
by global norm, and lives through the case; rounds go around the contenders, and a ratio is the median
over rounds of our step time over the peer's in the same round. Beside the time stand the processor time
of all ranks, which a busy machine disturbs less, what a rank asks to have sent in a step (see
`traffic.py`), and the loss, which has to fall. With data parallelism `alone` is the engine on as many
processes that share nothing: the part of every contender's time that no way of dividing the model changes,
but for the optimizer's part in it, which ZeRO divides.

Data parallelism is compared twice. A peer around our model has our arithmetic, so that the ratio is of the
engines alone, and hardly below the share that computation has. A peer "of transformers" trains the same
model as `LlamaForCausalLM`, and without our setting of the allocator, which is what its users have.

Needs `pip install deepspeed transformers`, and `pip install --no-deps megatron-core`, for these peers;
one that is not installed or does not run is left out and said so.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workers import Step, Worker, race, ratio, serve

if TYPE_CHECKING:
    from parallel_ours import Shape


class Case(NamedTuple):
    """Ours, and the peers with the greatest ratio of step times that we aim for."""

    name: str
    ranks: int
    ours: str
    peers: dict[str, float]

    @property
    def contenders(self) -> list[str]:
        """Ours, the peers, and for scale what the computation alone takes, where ranks do all of it."""
        return [self.ours, *self.peers, *(["alone"] if self.name.startswith("zero") else [])]


def cases(precision: str) -> list[Case]:
    """All comparisons of one size; in bf16 those whose peers have fp32 master weights by themselves."""
    wrapped = {
        "zero0": {"ddp": 1.0},
        "zero1": {"deepspeed zero1": 0.8},
        "zero2": {"deepspeed zero2": 0.8, "fsdp2 kept": 0.6},
        "zero3": {"deepspeed zero3": 0.8, "fsdp2 resharded": 0.6},
    }
    found = []
    for ranks in (2, 4):
        for name, peers in wrapped.items():
            of_transformers = {f"{peer} of transformers": goal for peer, goal in peers.items()}
            if precision == "bf16" and name == "zero0":  # autocast knows nothing of our operations
                peers = {}
            found.append(Case(f"{name} {ranks}", ranks, f"megalite {name}", peers | of_transformers))
    if precision == "bf16":
        return found
    for name in ("tp", "tp+sp"):
        divided = {f"dtensor {name}": 0.7, f"megatron-core {name}": 1.0}
        found.append(Case(f"{name} 2", 2, f"megalite {name}", divided))
    found.append(Case("pp 2", 2, "megalite pp", {"torch pp": 1.0}))
    return found


def build(contender: str, shape: Shape) -> Step:
    """A contender's step, in a process that is one of its ranks."""
    import parallel_ours as ours
    import parallel_peers as peers

    who, _, how = contender.partition(" ")
    how, _, model = how.partition("of ")
    build_model = peers.LlamaOfTransformers if model == "transformers" else ours.TrainedTransformer
    if who == "alone":
        return ours.engine_step(shape, alone=True)
    if who == "megalite":
        if how.startswith("zero"):
            return ours.engine_step(shape, zero=int(how[-1]))
        if how == "pp":
            return ours.pipeline_step(shape)
        return ours.engine_step(shape, tp=2, sequence="sp" in how)
    if who == "ddp":
        return peers.ddp_step(shape, build_model(shape))
    if who == "deepspeed":
        return peers.deepspeed_step(shape, build_model(shape), stage=int(how.strip()[-1]))
    if who == "fsdp2":
        return peers.fsdp_step(shape, build_model(shape), reshard=how.strip() == "resharded")
    if who == "dtensor":
        return peers.dtensor_step(shape, "sp" in how)
    if who == "megatron-core":
        return peers.megatron_step(shape, "sp" in how)
    return peers.torch_pipeline_step(shape)


def work(contender: str, hidden: int, batch: int, precision: str) -> None:
    """Be one rank of a contender."""
    import parallel_ours
    import torch
    from traffic import Traffic, mib

    from megalite.engines.allocator import keep_freed_memory

    torch.set_num_threads(1)
    if not contender.endswith("of transformers"):  # around our model the engines alone are compared
        keep_freed_memory()
    step = build(contender, parallel_ours.SHAPES[hidden]._replace(batch=batch, precision=precision))
    first = step()
    step()
    with Traffic() as traffic:
        step()
    serve(step, first=first, sent_mib=mib(traffic.total), calls=sum(traffic.calls.values()))


def run(case: Case, hidden: int, batch: int, precision: str, pairs: int, steps: int) -> dict[str, Any]:
    """Race a case's contenders; its figures."""

    def start(contender: str) -> Worker:
        command = [__file__, "--worker", contender, str(hidden), str(batch), precision]
        return Worker(contender, command, case.ranks)

    workers, left_out = race([partial(start, name) for name in case.contenders], pairs, steps)
    figures: dict[str, Any] = {"left_out": left_out, "contenders": {}, "ratios": {}}
    seconds = {worker.label: worker.seconds for worker in workers}
    for worker in workers:
        figures["contenders"][worker.label] = {
            "median_s": statistics.median(worker.seconds),
            "seconds": worker.seconds,
            "median_cpu_s": statistics.median(worker.cpu_seconds),
            "peak_mib": round(worker.rss_mib),
            "sent_mib": worker.facts["sent_mib"],
            "calls": worker.facts["calls"],
            "loss": [worker.facts["first"], worker.value],
        }
    for peer, goal in case.peers.items():
        if peer in seconds and case.ours in seconds:
            middle, low, high = ratio(seconds[case.ours], seconds[peer])
            figures["ratios"][peer] = {"median": middle, "quartiles": [low, high], "goal": goal}
    return figures


def show(title: str, figures: dict[str, Any]) -> None:
    """A case's lines of the table."""
    print(f"\n{title}")
    for label, f in figures["contenders"].items():
        loss = " → ".join("-" if value is None else f"{value:.2f}" for value in f["loss"])
        row = f"  {label:<33} {1e3 * f['median_s']:6.0f} ms  {1e3 * f['median_cpu_s']:6.0f} CPU ms  "
        row += f"{f['peak_mib']:5.0f} MiB  "
        row += f"sends {f['sent_mib']:8.2f} MiB in {f['calls']:3} calls  loss {loss}"
        if found := figures["ratios"].get(label):
            low, high = found["quartiles"]
            row += f"  ours {found['median']:.2f} × [{low:.2f}-{high:.2f}]"
            row += f", goal {found['goal']:.1f}: {'yes' if found['median'] <= found['goal'] else 'NO'}"
        print(row)
    for complaint in figures["left_out"]:
        print(f"  left out: {complaint}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="*", help="cases whose name fits this shell pattern")
    parser.add_argument("--hidden", type=int, choices=[256, 1024], help="one size (default both)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(default fp32)")
    parser.add_argument("--batch", type=int, default=4, help="samples a rank, of 256 tokens (default 4)")
    parser.add_argument("--pairs", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--steps", type=int, default=3, help="steps a round (default 3)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.worker:
        contender, hidden, batch, precision = args.worker
        work(contender, int(hidden), int(batch), precision)
        return
    known = cases(args.precision)
    chosen = [case for case in known if fnmatch.fnmatch(case.name, args.only)]
    if not chosen:
        parser.error(f"--only {args.only!r} fits none of: {', '.join(case.name for case in known)}")
    report: dict[str, Any] = {}
    for hidden in [args.hidden] if args.hidden else [256, 1024]:
        for case in chosen:
            figures = run(case, hidden, args.batch, args.precision, args.pairs, args.steps)
            title = f"{case.name} ranks, hidden {hidden}, {args.precision}"
            report[title] = figures
            show(title, figures)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
