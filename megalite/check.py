"""Whether a run's configuration gives, on these machines, the answer of the plainest one: `megalite check`.

A gradient scaled wrongly, a sum that misses a rank, a compiler that drops a term: nothing of that stops a
run, and its loss falls all the same. So the same few steps are computed several times, each time with one
more part of the configuration in place:

    plain         fp32, one data-parallel axis of all processes, nothing divided, torch's own operations
    kernels       the kernels that will run, where there are any
    layout        the configured tp, pp, ZeRO and recompute
    bf16 or fp16  the configured precision
    compiled      torch.compile

The first that is far from the plain one says which part is to blame. Compared are loss and gradient norm of
every step and, after the last one, both moments AdamW holds of each parameter, in all their elements: they
tell what the gradients were, and these what the steps before did to the weights. It is their projections on a
few random directions, so that layouts which divide a parameter differently need not exchange it.

Source:  Achlioptas 2003 (projections on random signs keep distances)
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.agreement import agree_on_config, agree_on_data, together
from megalite.config import Config
from megalite.config_file import build_config
from megalite.data.loader import DataLoader, Share
from megalite.engines.allocator import keep_freed_memory
from megalite.engines.choice import engine_class
from megalite.engines.engine import Engine
from megalite.errors import DataError
from megalite.meter import measure
from megalite.model.transformer import Transformer
from megalite.optim.zero import STATE_KINDS
from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import Mesh, build_mesh
from megalite.run_data import open_loaders
from megalite_kernels.counter import derive_key, uniform
from megalite_kernels.dispatch import VARIABLE

STEPS = 3
_LAYERS = 3  # enough for every way in which a block meets its neighbours
_REACH = 0.01  # learning rate times hidden size: about how far a step moves what a block puts out
_TRIES = 100  # batches in which labels are looked for
_DIRECTIONS = 16
_CHUNK = 1 << 18  # elements projected at once
_MOMENTS = STATE_KINDS[1:]


class Distance(NamedTuple):
    """How far an answer is from another, relative to that one: loss and gradient norm where they are
    furthest apart, and the gradients, by their moments, of the one parameter in which they are."""

    loss: float
    norm: float
    gradient: float
    parameter: str = ""

    def exceeds(self, bounds: Distance) -> bool:
        """Whether anything is further away; nan is."""
        return not all(ours <= bound for ours, bound in zip(self[:3], bounds[:3], strict=True))


BOUNDS = {  # several times what rounding alone was seen to do
    "fp32": Distance(1e-5, 1e-4, 1e-4),
    "bf16": Distance(2e-3, 2e-2, 0.1),
    "fp16": Distance(5e-4, 5e-3, 0.05),
}


@dataclass(frozen=True)
class Case:
    """One way to compute the steps: the part that is new in it, in words, and the whole."""

    part: str
    words: str
    config: Config
    mesh: Mesh
    impl: str | None = None  # of the operations; by default as everywhere


class Answer(NamedTuple):
    """Loss and gradient norm of every step, and of both moments of each parameter after the last one their
    lengths and projections; float64 [2, parameters], [2, parameters, directions], on the CPU."""

    losses: list[float]
    norms: list[float]
    lengths: Tensor
    projections: Tensor


def check(config: Config, mesh: Mesh) -> int:
    """Compute the steps in every way, and print on rank 0 how far apart they are: 0 if all agree, else 1.

    Raises:  ConfigError, DataError
    """
    agree_on_config(config, mesh)
    together(partial(engine_class, config, mesh.device), mesh)  # what is not installed is told at once
    if mesh.device.type == "cpu":
        keep_freed_memory()
    loader, _ = open_loaders(config, mesh)
    agree_on_data([loader], mesh)
    loader.skip(config.data.skip)
    cases = build_cases(config, mesh)
    plain, to_blame = cases[0].config, []
    names, width = _parameters(plain), max(len(case.words) for case in cases)

    def say(text: str, end: str = "\n") -> None:
        if mesh.rank == 0:
            print(text, end=end, flush=True)

    say(
        f"{plain.model.num_layers} of {config.model.num_layers} layers, {STEPS} steps of "
        f"{plain.train.global_batch_size} samples of {plain.data.seq_len:,} tokens, processes: {mesh.size}"
    )
    say(f"{'':<{10 + width}}{'loss':>10}{'norm':>10}{'gradients':>11}")
    expected = None
    for case in cases:
        say(f"{case.part:<10}{case.words:<{width}}", end="")
        answer = compute(case, loader)
        if expected is None:
            expected = answer
            say(f"{answer.losses[0]:>10.4f}{answer.norms[0]:>10.4f}")
            if not 0 < sum(answer.norms) < math.inf:
                say("the plain gradients are zero or no numbers, so there is nothing to compare with")
                return 1
            continue
        found = distance(answer, expected, names)
        say(f"{found.loss:>10.0e}{found.norm:>10.0e}{found.gradient:>11.0e}  {found.parameter}")
        if found.exceeds(BOUNDS[case.config.train.precision]):
            to_blame.append(case)
    if not to_blame:
        say("all agree")
        return 0
    bounds = BOUNDS[to_blame[0].config.train.precision]
    say(
        f"{to_blame[0].part} ({to_blame[0].words}) does not give the plain answer: allowed are "
        f"{bounds.loss:.0e}, {bounds.norm:.0e} and {bounds.gradient:.0e}; do not train with it"
    )
    return 1


def build_cases(config: Config, mesh: Mesh) -> list[Case]:
    """The ways to compute a short piece of a run on a few layers of its model, the plain one first; none
    twice."""
    keys, train = config.mesh, config.train
    stages = keys.pp * keys.pp_chunks
    micro_batches = min(config.grad_accum_steps(mesh.dp.size), max(2, keys.pp))
    values = config.model_dump(mode="json")
    if not keys.pp_layers:  # else their unevenness is checked too
        values["model"]["num_layers"] = min(config.model.num_layers, max(_LAYERS, stages))
    # A multiple of what either layout takes at once.
    values["train"]["global_batch_size"] = math.lcm(
        mesh.dp.size * train.micro_batch_size * micro_batches, mesh.size
    )
    plain = {"precision": "fp32", "compile": False, "recompute": "none", "micro_batch_size": 1}
    plain_config = build_config(values | {"mesh": {"zero_stage": 0}, "train": values["train"] | plain})
    plain_mesh = mesh if mesh.size == 1 else build_mesh(config.resilience.comm_timeout_s)
    cases = [Case("plain", f"fp32, dp {mesh.size}, torch's operations", plain_config, plain_mesh, "torch")]
    if mesh.device.type == "cuda" or os.environ.get(VARIABLE, "auto") not in ("auto", "torch"):
        cases.append(Case("kernels", "those of `megalite kernels`", plain_config, plain_mesh))
    so_far = {"precision": "fp32", "compile": False}
    for part, words, added in (
        ("layout", _layout(config, mesh), {}),
        (train.precision, "in place of fp32", {"precision": train.precision}),
        ("compiled", "each block", {"compile": train.compile}),
    ):
        so_far |= added
        case = Case(part, words, build_config(values | {"train": values["train"] | so_far}), mesh)
        if case.config != cases[-1].config:
            cases.append(case)
    return cases


def _layout(config: Config, mesh: Mesh) -> str:
    keys = config.mesh
    words = f"dp {mesh.dp.size} × pp {mesh.pp.size} × tp {mesh.tp.size}, ZeRO {keys.zero_stage}"
    return words + (" of DeepSpeed" if keys.zero_engine == "deepspeed" else "")


def compute(case: Case, loader: DataLoader) -> Answer:
    """The steps in one way, on all ranks together.

    Raises:  ConfigError, DataError
    """
    config, mesh = case.config, case.mesh
    train = config.train
    share = Share(train.global_batch_size, train.micro_batch_size, mesh.dp.rank, mesh.dp.size)
    losses: list[float] = []
    norms: list[float] = []
    with _operations(case.impl):
        engine = engine_class(config, mesh.device)(config, mesh)
        engine.initialize()
        for trial in range(_TRIES):
            batches = together(partial(loader.micro_batches, trial * train.global_batch_size, share), mesh)
            measured = measure(engine, batches, config, mesh)
            while not math.isfinite(measured.grad_norm) and engine.loss_scale.can_shrink:
                engine.loss_scale.update(is_applied=False)  # the first one is a guess
                measured = measure(engine, batches, config, mesh)
            if not measured.tokens:
                continue  # as in a run
            # Not the configured rate: by a smaller one a wrong update would not show, by a larger one what
            # rounding does would grow.
            rate = _REACH / config.model.hidden_size
            engine.optimizer_step(rate, measured.grad_scale(config.optim.grad_clip))
            losses.append(measured.loss)
            norms.append(measured.grad_norm)
            if len(losses) == STEPS or not math.isfinite(measured.grad_norm):
                break  # with a later step no parameter would be a number, and none to blame
        else:
            error = DataError(
                f"data.sources: of the first {_TRIES} batches of {train.global_batch_size} samples "
                f"{len(losses)} have a token to predict, {STEPS} are needed; look at their loss masks"
            )
            error.is_shared = True
            raise error
        lengths, projections = _project(engine, config, mesh)
    del engine
    gc.collect()  # an engine's hooks refer to it in circles, and the next one needs the memory
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return Answer(losses, norms, lengths, projections)


@contextmanager
def _operations(impl: str | None) -> Iterator[None]:
    """Have operations computed by `impl`, if it is given."""
    before = os.environ.get(VARIABLE)
    if impl is not None:
        os.environ[VARIABLE] = impl
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _parameters(config: Config) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Transformer(config.model).named_parameters()]


def _project(engine: Engine, config: Config, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Lengths and projections of each parameter's moments, as in `Answer`, whoever holds their elements.

    Comm:  an all-reduce of `2 + 2 · _DIRECTIONS` numbers a parameter over the world
    """
    place = {name: n for n, name in enumerate(_parameters(config))}
    sums = torch.zeros(len(_MOMENTS), len(place), 1 + _DIRECTIONS, dtype=torch.float64, device=mesh.device)
    for part in engine.state_slices():
        if part.kind not in _MOMENTS:
            continue
        row = sums[_MOMENTS.index(part.kind), place[part.name]]
        key = torch.tensor(derive_key("check", part.name), device=mesh.device)
        for low in range(part.start, part.stop, _CHUNK):
            high = min(low + _CHUNK, part.stop)
            values = part.values[low - part.start : high - part.start].to(mesh.device, torch.float64)
            # A sign of each direction is a bit of one random number.
            code = (uniform(key, torch.arange(low, high, device=mesh.device)) * 2**_DIRECTIONS).long()
            signs = (code[:, None] >> torch.arange(_DIRECTIONS, device=mesh.device) & 1) * 2 - 1
            row[0] += values.square().sum()
            row[1:] += values @ signs.to(torch.float64)
    sums = all_reduce(sums, mesh.world).cpu()
    return sums[..., 0].sqrt(), sums[..., 1:]


def distance(answer: Answer, expected: Answer, names: list[str]) -> Distance:
    """How far an answer is from the expected one, in the steps that both have; nan if either has one."""

    def furthest(ours: list[float], theirs: list[float]) -> float:
        found, right = torch.tensor(list(zip(ours, theirs, strict=False)), dtype=torch.float64).T
        return float(_relative(found - right, right).amax())

    difference = (answer.projections - expected.projections).square().mean(-1).sqrt()
    apart = _relative(difference, expected.lengths).amax(0)
    worst = int(apart.nan_to_num(nan=math.inf).argmax())
    return Distance(
        furthest(answer.losses, expected.losses),
        furthest(answer.norms, expected.norms),
        float(apart[worst]),
        names[worst],
    )


def _relative(difference: Tensor, size: Tensor) -> Tensor:
    """|difference| / |size|; of what is zero, zero is no distance away."""
    return torch.where(difference == 0, 0, (difference / size).abs())
