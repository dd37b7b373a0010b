"""Whole training steps of the shapes in configs/, and 200 steps of three implementations side by side."""

from __future__ import annotations

import gc
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.timing import can_run_kernels

Item = tuple[str, Callable[[], dict[str, Any]]]

ROOT = Path(__file__).parents[2]
_MODELS = ("1b", "3b", "8b", "125m")
_SEQ = 4096
_WARM_UP, _STEPS = 2, 5
_BYTES_A_PARAMETER = 18  # bf16 weight; fp32 gradient, master, two moments
_USABLE = 0.92  # of the device's memory


class Size(NamedTuple):
    """What of a model is trained, and how: chosen to fit the device."""

    layers: int
    micro_batch_size: int
    recompute: str


def step_items(device: torch.device) -> Iterator[Item]:
    """Every model with kernels on and off; then the same compiled."""
    implementations = ("triton", "torch") if can_run_kernels(device) else ("torch",)
    for compiled, model, kernels in product((False, True), _MODELS, implementations):
        name = f"step/{model}/{'compiled' if compiled else 'eager'}/{kernels}"
        yield name, lambda m=model, k=kernels, c=compiled: measure(m, k, c, device)  # type: ignore[misc]


def measure(model: str, kernels: str, compiled: bool, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step at the largest size that fits, tokens/s, both MFUs and peak bytes."""
    os.environ["MEGALITE_KERNELS"] = kernels
    torch._dynamo.reset()
    too_big = []
    for size in _sizes(model, device):
        try:
            return _measure(model, size, compiled, device) | {"out_of_memory_at": too_big}
        except torch.OutOfMemoryError:
            too_big.append(size._asdict())
        gc.collect()
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"{model} fits at none of {too_big}")


def _measure(model: str, size: Size, compiled: bool, device: torch.device) -> dict[str, Any]:
    from megalite.model.flops import peak_flops, token_flops

    config = _config(model, size, compiled, device)
    engine, step = _engine(config, device)
    is_real = device.type == "cuda"
    if is_real:
        torch.cuda.reset_peak_memory_stats()
    tokens = config.train.micro_batch_size * config.data.seq_len
    batch = _batch(
        torch.randint(0, config.model.vocab_size, (size.micro_batch_size, config.data.seq_len + 1))
    )
    seconds = []
    for _ in range(_WARM_UP + _STEPS if is_real else 1):
        began = time.perf_counter()
        loss = step(batch)
        if is_real:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(loss):  # products of such numbers are faster than those of a training
            raise ArithmeticError(f"the loss of step {len(seconds)} is {loss}")
    whole = _config(model, None, compiled, device).model.num_layers
    found = {
        "parameters": engine.num_parameters,
        "layers": [size.layers, whole],
        "micro_batch_size": size.micro_batch_size,
        "seq_len": config.data.seq_len,
        "recompute": size.recompute,
        "loss": loss,
    }
    if not is_real:
        return found
    median = statistics.median(seconds[_WARM_UP:])
    flops, peak = token_flops(config.model, config.data.seq_len), peak_flops(device)
    return found | {
        "seconds": median,
        "tokens_per_s": tokens / median,
        "mfu_strict": flops.strict * tokens / median / peak if peak else None,
        "mfu_non_causal": flops.non_causal * tokens / median / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": seconds[0],
    }


def _sizes(model: str, device: torch.device) -> Iterator[Size]:
    """What may fit, best first. A model whose state alone is too large loses layers, never width."""
    if device.type != "cuda":
        yield Size(2, 1, "none")
        return
    from megalite.model.flops import count_parameters

    config = _config(model, None, False, device).model
    memory = _USABLE * torch.cuda.get_device_properties(device).total_memory
    layers = config.num_layers
    while layers > 4:
        shape = config.model_copy(update={"num_layers": layers})
        left = memory - _BYTES_A_PARAMETER * count_parameters(shape)
        # Each token keeps its layers' inputs, and a head's fp32 gradient exists for a moment.
        if left > layers * _SEQ * 2 * config.hidden_size + 6 * config.vocab_size * config.hidden_size:
            break
        layers -= 4
    for recompute, micro_batch_size in product(("none", "selective", "full"), (4, 2, 1)):
        kept = {"none": 20, "selective": 13, "full": 1}[recompute] * config.hidden_size
        kept += {"none": 6, "selective": 4, "full": 0}[recompute] * config.ffn_size
        if layers * micro_batch_size * _SEQ * kept < left or (recompute, micro_batch_size) == ("full", 1):
            yield Size(layers, micro_batch_size, recompute)


def _config(model: str, size: Size | None, compiled: bool, device: torch.device) -> Any:
    from megalite.config_file import load_config

    overrides = [
        *("mesh.zero_stage=0", "train.steps=1", "optim.warmup_steps=0", 'optim.schedule="constant"'),
        f"train.compile={str(compiled).lower()}",
    ]
    if device.type != "cuda":
        overrides += [
            "model.hidden_size=64",
            "model.num_heads=4",
            "model.num_kv_heads=2",
            "model.ffn_size=64",
        ]
        overrides += ["model.vocab_size=64", "data.seq_len=32", "train.precision=fp32", "train.compile=false"]
    elif model != "125m":
        overrides += [f"data.seq_len={_SEQ}"]
    if size is not None:
        overrides += [f"model.num_layers={size.layers}", f"train.recompute={size.recompute}"]
        overrides += [f"train.{key}_batch_size={size.micro_batch_size}" for key in ("micro", "global")]
    return load_config(ROOT / "configs" / f"{model}.toml", overrides)


def _engine(config: Any, device: torch.device) -> tuple[Any, Callable[[Any], float]]:
    """An engine with random weights, and its whole step, which returns the mean loss."""
    from megalite.engines.native import NativeEngine
    from megalite.parallel.mesh import Axis, Mesh

    engine = NativeEngine(config, Mesh(0, 1, Axis(), device))

    def values(owned: Any) -> torch.Tensor:
        count = owned.stop - owned.start
        if "norm" in owned.name:
            return torch.ones(count, device=device)
        return torch.randn(count, device=device).mul_(config.model.init_std)

    torch.manual_seed(0)
    engine.optimizer.fill("weight", values)
    engine.optimizer.weights.publish()

    def step(batch: Any) -> float:
        sums = engine.forward_backward([batch])
        norm = max(sums.grad_norm_squared, 0.0) ** 0.5
        engine.optimizer_step(config.optim.lr, min(1.0, 1.0 / norm) if norm else 1.0)
        return float(sums.loss / sums.tokens)

    return engine, step


def _batch(ids: torch.Tensor) -> Any:
    """Next-token batch of ids [batch, seq + 1]."""
    import numpy as np

    from megalite.data.batch import Batch

    array = ids.numpy()
    batch, seq = array.shape[0], array.shape[1] - 1
    positions = np.broadcast_to(np.arange(seq), (batch, seq)).copy()
    edges = np.arange(0, batch * seq + 1, seq, dtype=np.int32)
    return Batch(array[:, :-1].copy(), array[:, 1:].copy(), positions, None, np.arange(batch), edges)


# --- convergence ------------------------------------------------------------------------------------

_TEXT_BYTES = 2**23


def convergence_items(device: torch.device) -> Iterator[Item]:
    """One comparison: the same text, weights and order under three implementations."""
    yield "convergence", lambda: converge(device)


def converge(device: torch.device) -> dict[str, Any]:
    """Losses of each step, and how far the kernels' lie from the plain formulas'.

    What they may differ by is what torch's own implementations differ by, twice, and 0.01 nats: a
    model in training carries any rounding on. The text is the Python standard library, a byte a token.
    """
    is_real = device.type == "cuda"
    steps, batch, seq = (200, 16, 1024) if is_real else (3, 2, 32)
    text = _text(steps * batch * (seq + 1))
    implementations = ("reference", "torch", *(("triton",) if can_run_kernels(device) else ()))
    losses: dict[str, list[float]] = {}
    for name in implementations:
        os.environ["MEGALITE_KERNELS"] = name
        _, step = _engine(_small_config(steps, batch, seq, is_real), device)
        rows = text.view(steps, batch, seq + 1)
        losses[name] = [step(_batch(rows[index])) for index in range(steps)]
    found: dict[str, Any] = {"steps": steps, "tokens_a_step": batch * seq, "losses": losses}
    return found | judge(losses) if is_real else found


def judge(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Whether the kernels' losses stay as near the reference's as they should, all finite, and come down."""
    reference = losses["reference"]
    apart = {
        name: max((abs(a - b) for a, b in zip(losses[name], reference, strict=True)), key=_nan_last)
        for name in losses
        if name != "reference"
    }
    found = {"largest_difference": apart, "allowed": max(2 * apart["torch"], 0.01)}
    for name, values in losses.items():
        if not all(map(math.isfinite, values)):
            return found | {"passed": False, "why": f"a loss of {name} is not finite"}
    if reference[-1] > reference[0] - 1.0:  # a byte of text goes from ln 256 = 5.5 nats to below 2.5
        return found | {"passed": False, "why": "the reference has learned nothing"}
    is_near = apart["triton"] <= found["allowed"]
    return found | {"passed": is_near} | ({} if is_near else {"why": "the kernels' loss is too far off"})


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _small_config(steps: int, batch: int, seq: int, is_real: bool) -> Any:
    from megalite.config_file import build_config

    hidden, layers = (512, 8) if is_real else (64, 2)
    return build_config(
        {
            "model": {
                "vocab_size": 256,
                "hidden_size": hidden,
                "num_layers": layers,
                "num_heads": hidden // 64,
                "ffn_size": 3 * hidden,
            },
            "mesh": {"zero_stage": 0},
            "data": {"seq_len": seq},
            "optim": {"lr": 1e-3, "schedule": "constant"},
            "train": {
                "steps": steps,
                "global_batch_size": batch,
                "micro_batch_size": batch,
                "precision": "bf16" if is_real else "fp32",
            },
        }
    )


def _text(count: int) -> torch.Tensor:
    """`count` bytes of Python's standard library as tokens, from the start again where it ends."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= min(count, _TEXT_BYTES):
            break
    ids = torch.frombuffer(found, dtype=torch.uint8).long()
    return ids.repeat(-(-count // len(ids)))[:count]
