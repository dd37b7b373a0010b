"""What a spike looked like, which documents it met, and whether it was they: `megalite spikes RUN`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from megalite.checkpoint.history import Rollback, abandoned_from, known_rollbacks
from megalite.data.loader import DataLoader
from megalite.data.passages import passages
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError
from megalite.log import LEDGER, read_json_lines

_BARS = "▁▂▃▄▅▆▇█"
_EXCERPT = 100  # characters of a document
_OUTLIER = 5.0  # deviations of the batches beside a window, above which one of its own is no usual one


def show(args: argparse.Namespace) -> int:
    """`megalite spikes`: print what it was asked for."""
    if not (args.run / "config.toml").exists():
        raise ConfigError(f"{args.run} holds no config.toml; give a run folder")
    events = read_json_lines(args.run / LEDGER)
    rollbacks = [event for event in events if event.get("event") == "rollback"]
    if args.replay is not None:
        if not 1 <= args.replay <= len(rollbacks):
            raise ConfigError(f"--replay {args.replay}: {args.run} has {len(rollbacks)} rollbacks")
        print(replay(args.run, Rollback.from_json(rollbacks[args.replay - 1]), args.at))
        return 0
    for line in _listing(args.run, events, args.documents):
        print(line)
    return 0


def _listing(run: Path, events: Sequence[dict[str, Any]], documents: int) -> Iterator[str]:
    told = [event for event in events if event.get("event") in ("skip", "hardware", "rollback", "diverged")]
    if not told:
        yield f"{run}: no step was refused"
        return
    loader = open_loader(run) if documents else None
    count = 0
    for event in told:
        where = f"step {event['step']}"
        if event["event"] == "skip":
            values = f"loss {_short(event['loss'])}, gradient norm {_short(event['grad_norm'])}"
            yield f"{where}  left out: {values} ({event['cause'] or 'not computed again'})"
        elif event["event"] == "hardware":
            yield f"{where}  {event['cause']} error of a processor, rank {event['ranks']}"
        elif event["event"] == "diverged":
            yield f"{where}  gave up: {event['reason']}"
        else:
            count += 1
            rollback = Rollback.from_json(event)
            yield f"{where}  rollback {count}: {_sentence(rollback)}"
            yield from _curve(run / str(event["curve"]), rollback)
            if loader is not None:
                yield from islice(describe(loader, rollback.skipped, load_tokenizer(run)), documents)


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _sentence(rollback: Rollback) -> str:
    return (
        f"spike at step {rollback.onset} ({rollback.reason}), certain at {rollback.detected}; back to step "
        f"{rollback.to_step}, without samples {rollback.skipped[0]} to {rollback.skipped[1] - 1}"
    )


def _curve(path: Path, rollback: Rollback) -> Iterator[str]:
    """Loss and gradient norm of the steps before and in the spike, as bars of their logarithms."""
    records = [r for r in read_json_lines(path) if r["step"] > rollback.onset - 40]
    for key in ("loss", "grad_norm"):
        values = [math.log(r[key]) if r.get(key) else None for r in records]
        known = [value for value in values if value is not None]
        if not known:
            continue
        low, high = min(known), max(known)
        scale = (len(_BARS) - 1) / max(high - low, 1e-9)
        bars = "".join("!" if v is None else _BARS[round((v - low) * scale)] for v in values)
        yield f"    {key:<9} {bars}  {math.exp(low):.3g} to {math.exp(high):.3g}"


def describe(loader: DataLoader, samples: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each document in the samples [start, stop): its source, its name, how it begins."""
    known = max(samples[0], min(loader.blend.origin, samples[1]))
    if known > samples[0]:
        yield f"    samples {samples[0]} to {known - 1} were drawn from another mixture than today's"
    for sample in range(known, samples[1]):
        for passage in passages(loader, sample):
            text = " ".join(tokenizer.decode(passage.tokens[: 2 * _EXCERPT].tolist()).split())
            yield f"    sample {sample}  {passage.source}  {passage.doc_id}  {text[:_EXCERPT]!r}"


def open_loader(run: Path) -> DataLoader:
    """The training data as a run's config and newest checkpoint have it, in one process."""
    from megalite.checkpoint.store import open_checkpoint
    from megalite.config_file import load_config
    from megalite.parallel.mesh import build_mesh
    from megalite.run_data import open_loaders

    config = load_config(run / "config.toml", [f"run_dir={str(run)!r}"])
    loader, _ = open_loaders(config, build_mesh())
    if (run / "checkpoints").exists():
        found = open_checkpoint(run)
        loader.restore(found.meta.get("loader"), found.position)
    return loader


def write_report(
    path: Path, reason: str, samples: Sequence[int], rollbacks: Sequence[Rollback], loader: DataLoader
) -> None:
    """Why a run gave up, what it tried, and what it read then; Markdown."""
    tokenizer = load_tokenizer(loader.datasets[0].path)
    lines = [
        "# This run needs a human",
        "",
        f"It stopped by itself: {reason}.",
        "",
        "## What was tried",
        *([f"- {_sentence(rollback)}" for rollback in rollbacks] or ["- nothing but leaving steps out"]),
        "",
        "## What to go on from",
        _best_checkpoints(path.parent, rollbacks),
        "",
        f"## Samples {samples[0]} to {samples[1] - 1}, read when it stopped",
        *islice(describe(loader, samples, tokenizer), 200),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _best_checkpoints(run: Path, rollbacks: Sequence[Rollback]) -> str:
    from megalite.checkpoint.command import describe as describe_checkpoint
    from megalite.checkpoint.format import MANIFEST, read_manifest
    from megalite.checkpoint.retention import candidates

    whole = {}
    for folder in (run / "checkpoints" / name for name in candidates(run / "checkpoints")):
        record = describe_checkpoint(folder, reads_all=False)
        if record["fault"] is None:
            known = known_rollbacks(read_manifest(folder / MANIFEST).meta, folder)
            left = abandoned_from(rollbacks, known)
            if left is None or record["step"] <= left:  # else of a future from which the run went back
                whole[int(record["step"])] = record
    if not whole:
        return "There is no whole checkpoint; the run starts from its seed again."
    # One measure for all: not every save is validated, and the two losses do not compare.
    measure = "val_loss" if any(record["val_loss"] is not None for record in whole.values()) else "loss"
    losses = {step: float(r[measure]) for step, r in sorted(whole.items()) if r[measure] is not None}
    kept = ", ".join(f"step {step}" for step in sorted(whole))
    if not losses:
        return f"Checkpoints: {kept}. None has a loss with it; the newest is that of step {max(whole)}."
    best = min(losses, key=lambda step: losses[step])
    return f"Checkpoints: {kept}. The best is that of step {best}, with a {measure} of {losses[best]:.4f}."


# --- replay -------------------------------------------------------------------------------------------


def replay(run: Path, rollback: Rollback, step: int | None) -> str:
    """Compute the batches that were left out with other weights, beside as many batches after them.

    If they are outliers there too it was the data; if not, it was the meeting of data and weights.

    Raises:  CheckpointError if there is no such checkpoint
    """
    from megalite.checkpoint.retention import step_name
    from megalite.checkpoint.store import open_checkpoint
    from megalite.config import MeshConfig
    from megalite.config_file import load_config
    from megalite.engines.native import NativeEngine
    from megalite.parallel.mesh import build_mesh

    divided = load_config(run / "config.toml", [f"run_dir={str(run)!r}"])
    config = divided.model_copy(update={"mesh": MeshConfig()})  # the same model on one process
    loader = open_loader(run)
    found = open_checkpoint(run if step is None else run / "checkpoints" / step_name(step))
    engine = NativeEngine(config, build_mesh())
    engine.load_state(found)
    size, micro = config.train.global_batch_size, config.train.micro_batch_size

    def measure(first: int) -> tuple[float, float]:
        batches = [loader.batch(range(i, i + micro)) for i in range(first, first + size, micro)]
        sums = engine.forward_backward(batches)
        correction = config.tokens_per_step / max(sums.tokens, 1.0)
        return sums.loss / max(sums.tokens, 1.0), correction * math.sqrt(max(sums.grad_norm_squared, 0.0))

    start, stop = rollback.skipped
    inside = {first: measure(first) for first in range(start, stop - size + 1, size)}
    beside = {first: measure(first) for first in range(stop, 2 * stop - start - size + 1, size)}
    odd = [first for first, values in inside.items() if _is_outlier(values, list(beside.values()))]
    lines = [f"window of {_sentence(rollback)}", f"computed with the weights of step {found.step}:"]
    for name, batches in (("in the window", inside), ("after it", beside)):
        for first, (loss, norm) in batches.items():
            mark = "  ← unusual" if first in odd else ""
            values = f"loss {loss:.4f}, gradient norm {norm:.4f}"
            lines.append(f"  {name}: samples {first} to {first + size - 1}: {values}{mark}")
    if odd:
        lines.append(f"bad data: {len(odd)} of {len(inside)} batches are unusual for these weights too")
    else:
        lines.append("bad moment: for these weights the batches are like those after them")
    return "\n".join(lines)


def _is_outlier(values: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    for value, rest in zip(values, zip(*others, strict=True), strict=True):
        logs = [math.log(max(other, 1e-30)) for other in rest]
        middle = median(logs)
        deviation = median(abs(log - middle) for log in logs)
        if not math.isfinite(value) or math.log(max(value, 1e-30)) - middle > max(_OUTLIER * deviation, 0.05):
            return True
    return False
