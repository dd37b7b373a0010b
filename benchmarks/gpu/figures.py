"""What measurements say: lines of a table, fractions of the floor, choices for the tile tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

OURS, TORCH = "triton", "torch"  # the two implementations that `auto` chooses between


def row(stage: str, name: str, result: Mapping[str, Any], ceilings: Mapping[str, float] | None) -> str:
    """One item's line; a race has one for each direction."""
    if "failed" in result:
        return f"{name}  FAILED: {result['failed']}"
    if "left_out" in result and isinstance(result["left_out"], str):
        return f"{name}  left out: {result['left_out']}"
    if "flops_per_s" in result or "bytes_per_s" in result:
        return f"{name}  {_ceiling(result)}"
    if "cost" in result:
        return _race(name, result, ceilings)
    if stage == "steps":
        return f"{name}  {_step(result)}"
    if "largest_difference" in result:
        apart = ", ".join(f"{key} {value:.2e}" for key, value in result["largest_difference"].items())
        return f"{name}  {_verdict(result)}: loss differs from the reference by at most {apart}"
    return f"{name}  {_verdict(result)}"


def _verdict(result: Mapping[str, Any]) -> str:
    if "passed" not in result:
        return "rehearsed"
    numbers = [f"{key} {value:.2e}" for key, value in result.items() if key in ("error", "allowed")]
    said = "ok" if result["passed"] else f"WRONG: {result.get('why', '')}"
    return f"{said} ({', '.join(numbers)})" if numbers else said


def _ceiling(result: Mapping[str, Any]) -> str:
    if result.get("flops_per_s"):
        return f"{result['flops_per_s'] / 1e12:.0f} TFLOP/s"
    return f"{result['bytes_per_s'] / 1e12:.2f} TB/s" if result.get("bytes_per_s") else "rehearsed"


def _race(name: str, result: Mapping[str, Any], ceilings: Mapping[str, float] | None) -> str:
    lines = []
    for direction, cost in result["cost"].items():
        times = result["seconds"].get(direction)
        if not times:
            lines.append(f"{name}  {direction}  rehearsed")
            continue
        cells = []
        for contender, seconds in sorted(times.items(), key=lambda pair: pair[1]):
            cell = f"{contender} {seconds * 1e3:.3f} ms"
            if ceilings:
                bound = cost["flops"] / ceilings["flops_per_s"] > cost["bytes"] / ceilings["bytes_per_s"]
                rate = cost["flops"] / 1e12 if bound else cost["bytes"] / 1e12
                share = floor_seconds(cost, **ceilings) / seconds
                cell += f" {rate / seconds:.4g} {'TFLOP/s' if bound else 'TB/s'} {share:.0%}"
            cells.append(cell)
        lines.append(f"{name}  {direction}  " + " | ".join(cells))
    peaks = [
        f"{who} {size / 2**20:,.0f} MiB" for who, size in result["peak_bytes"].items() if size is not None
    ]
    lines += [f"{name}  peak  " + " | ".join(peaks)] if peaks else []
    lines += [f"{name}  without {who}: {why}" for who, why in result["left_out"].items()]
    return "\n".join(lines)


def _step(result: Mapping[str, Any]) -> str:
    layers, whole = result["layers"]
    part = "" if layers == whole else f"{layers} OF {whole} LAYERS, "
    shape = (
        f"{part}{result['micro_batch_size']} × {result['seq_len']} tokens, recompute {result['recompute']}"
    )
    if "seconds" not in result:
        return f"{shape}  rehearsed"
    mfu = [
        f"{result[key]:.1%} {key.removeprefix('mfu_').replace('_', '-')} MFU"
        for key in ("mfu_strict", "mfu_non_causal")
        if result[key] is not None
    ]
    speed = f"{result['tokens_per_s']:,.0f} tokens/s"
    return "  ".join([shape, speed, *mfu, f"{result['peak_bytes'] / 2**30:.1f} GiB"])


def floor_seconds(cost: Mapping[str, int], flops_per_s: float, bytes_per_s: float) -> float:
    """The least time the measured ceilings allow for a cost."""
    return max(cost["flops"] / flops_per_s, cost["bytes"] / bytes_per_s)


def choices(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By operation and variant the faster of our two implementations, forward and backward together.

    `speedup` is torch's time over the kernel's, the geometric mean over the shapes of a variant.
    """
    ratios: dict[tuple[str, str], list[float]] = {}
    for result in results:
        seconds = result.get("seconds", {}).values()
        if seconds and all(OURS in times and TORCH in times for times in seconds):
            ratio = sum(times[TORCH] for times in seconds) / sum(times[OURS] for times in seconds)
            ratios.setdefault((result["operation"], result["variant"]), []).append(ratio)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (operation, variant), measured in ratios.items():
        speedup = math.exp(math.fsum(map(math.log, measured)) / len(measured))
        winner = OURS if speedup > 1 else TORCH
        found.setdefault(operation, {})[variant] = {"winner": winner, "speedup": round(speedup, 3)}
    return found
