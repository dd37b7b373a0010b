"""What launch/demo_spike runs: three runs of a small model on text with a stretch of noise in it.

protected     as megalite trains: meets the noise, goes back, leaves it out
never saw it  the same without those samples from the start
unprotected   with detection turned off: trains on the noise
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megalite.cli import main
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from megalite.log import read_json_lines

STEPS, SAMPLES, SEQ_LEN = 400, 16, 64
NOISE = range(300, 304)  # the steps that read it, counted from 0
CONFIG = f"""
run_dir = "{{folder}}/{{name}}"
[model]
vocab_size = 257
hidden_size = 64
num_layers = 2
num_heads = 4
num_kv_heads = 2
ffn_size = 176
max_seq_len = {SEQ_LEN}
[data]
seq_len = {SEQ_LEN}
sources = [{{{{path = "{{folder}}/data"}}}}]
shuffle = false
skip = {{skip}}
[optim]
lr = 3e-3
warmup_steps = 20
[train]
steps = {STEPS}
global_batch_size = {SAMPLES}
micro_batch_size = {SAMPLES}
precision = "fp32"
[checkpoint]
every_steps = 100
snapshot_every_steps = 50
[resilience]
rewind_steps = 50
skip_steps = 40
{{resilience}}
[log]
every_steps = 100
"""
OFF = "spike_threshold = 0.0\nslow_divergence = 0.0\nmax_rollbacks = 0"
COLOURS = {"unprotected": "#d62728", "never saw it": "#2ca02c", "protected": "#1f77b4"}


def pieces(text: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Lines of text in random order, so that neighbouring batches are alike, with the noise in its place."""
    lines = [line for line in text.splitlines(keepends=True) if len(line) > 20]
    a_step = SAMPLES * SEQ_LEN
    done = 0
    for number in rng.permutation(len(lines)):
        if done <= NOISE.start * a_step < done + len(lines[number]):
            noise = rng.integers(0, 256, len(NOISE) * a_step, dtype=np.uint8).tobytes()
            yield noise
            done += len(noise)
        yield lines[number]
        done += len(lines[number])


def build_data(folder: Path) -> None:
    """The interpreter's own library as text, all one document but for the noise."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"))[:160]
    text = b"".join(path.read_bytes() for path in files)
    tokenizer = ByteTokenizer()
    with ShardWriter(folder, tokenizer) as writer:
        for number, piece in enumerate(pieces(text, np.random.default_rng(0))):
            name = "noise" if len(piece) > 1000 else f"line-{number}"
            writer.write(name, "standard library", np.frombuffer(piece, dtype=np.uint8))


def train(folder: Path, name: str, skip: list[list[int]], resilience: str = "") -> list[dict[str, float]]:
    """One run; the records of its metrics."""
    path = folder / f"{name.replace(' ', '-')}.toml"
    path.write_text(
        CONFIG.format(folder=folder, name=name.replace(" ", "-"), skip=skip, resilience=resilience)
    )
    print(f"— {name}", flush=True)
    code = main(["train", str(path)])
    if code:
        raise SystemExit(code)
    return read_json_lines(folder / name.replace(" ", "-") / "metrics.jsonl")


def draw(curves: dict[str, list[dict[str, float]]], spike: list[dict[str, float]], path: Path) -> None:
    """Loss over steps as an SVG; `spike` is what the protected run saw before it went back."""
    width, height, left, bottom = 860, 420, 60, 40
    shown = {name: [r["loss"] for r in records[200:]] for name, records in curves.items()}
    seen = [(int(r["step"]), r["loss"]) for r in spike if r["loss"] is not None]
    values = [value for losses in shown.values() for value in losses] + [loss for _, loss in seen]
    low, high = math.log(min(values)), math.log(max(values))

    def place(step: float, loss: float) -> str:
        x = left + (step - 200) / (STEPS - 200) * (width - left - 20)
        y = height - bottom - (math.log(loss) - low) / (high - low) * (height - bottom - 40)
        return f"{x:.1f},{y:.1f}"

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for row, (name, losses) in enumerate(shown.items()):
        points = " ".join(place(200 + n, loss) for n, loss in enumerate(losses))
        dash = ' stroke-dasharray="2 4" stroke-width="4"' if name == "never saw it" else ' stroke-width="1.5"'
        svg.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}"{dash}/>')
        svg.append(f'<text x="{left + 20}" y="{40 + 18 * row}" fill="{COLOURS[name]}">{name}</text>')
    points = " ".join(place(step, loss) for step, loss in seen)
    svg.append(f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-opacity="0.5"/>')
    for step in range(200, STEPS + 1, 50):
        x = place(step, math.exp(low)).split(",")[0]
        svg.append(f'<text x="{x}" y="{height - 12}" text-anchor="middle">{step}</text>')
    for loss in (math.exp(low), math.exp((low + high) / 2), math.exp(high)):
        y = place(200, loss).split(",")[1]
        svg.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{loss:.2f}</text>')
    svg.append(f'<text x="{width / 2}" y="{height - 28}" text-anchor="middle">step</text></svg>')
    path.write_text("\n".join(svg) + "\n")


def run(folder: Path) -> int:
    """All three, the picture, and whether the recovery was exact."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build_data(folder / "data")
    protected = train(folder, "protected", [])
    events = [e for e in read_json_lines(folder / "protected/ledger.jsonl") if e["event"] == "rollback"]
    clean = train(folder, "never saw it", [event["skipped"] for event in events])
    unprotected = train(folder, "unprotected", [], OFF)
    spike = [r for e in events for r in read_json_lines(folder / "protected" / e["curve"])]
    draw(
        {"unprotected": unprotected, "never saw it": clean, "protected": protected},
        spike,
        folder / "recovery.svg",
    )
    same = [(r["loss"], r["grad_norm"]) for r in protected] == [(r["loss"], r["grad_norm"]) for r in clean]
    print()
    for event in events:
        print(
            f"spike at step {event['onset']}, certain at {event['detected']}; back to step {event['to_step']}"
        )
    print(f"protected and never-saw-it are {'equal bit for bit' if same else 'NOT EQUAL'} over {STEPS} steps")
    print(f"last loss: protected {protected[-1]['loss']:.4f}, unprotected {unprotected[-1]['loss']:.4f}")
    with contextlib.redirect_stdout(io.StringIO()) as listing:
        main(["spikes", str(folder / "protected"), "--documents", "0"])
    print(listing.getvalue(), end="")
    print(f"picture: {folder / 'recovery.svg'}")
    return 0 if same and events else 1


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
