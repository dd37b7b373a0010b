"""How the kernel tests compare: float64 against the formula, low precision by FlashAttention's rule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Operation = Callable[..., Tensor]
Result = TypeVar("Result")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that only depend on shape and seed."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values_and_grads(operation: Operation, inputs: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The operation's output and the gradient of every input; grad=None sums the output.

    A sum sends a gradient back that is one number expanded with stride 0.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = operation(*leaves)
    if grad is None:
        y.sum().backward()
    else:
        y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(
    operation: Operation, reference: Operation, inputs: Sequence[Tensor], tol: float = 1e-12
) -> None:
    """Both give the same output and gradients in float64, for a random and for a stride-0 gradient."""
    for grad in (random(*reference(*inputs).shape, seed=99), None):
        found = values_and_grads(operation, inputs, grad)
        expected = values_and_grads(reference, inputs, grad)
        assert len(found) == len(expected) == len(inputs) + 1
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def assert_as_exact_as_torch(
    operation: Operation,
    reference: Operation,
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.bfloat16,
    roundings: int = 1,
) -> None:
    """Our largest error against float64 is at most twice the plain formula's in the same dtype.

    Roundings of the largest value come on top, or of 4 where values cancel, for where the formula is exact.

    Source:  the rule of FlashAttention's own tests (Dao et al., tests/test_flash_attn.py)
    """
    low = [x.to(dtype) for x in inputs]
    exact_inputs = [x.double() for x in low]
    grad = random(*reference(*exact_inputs).shape, seed=99).to(dtype)
    exact = values_and_grads(reference, exact_inputs, grad.double())
    ours = values_and_grads(operation, low, grad)
    plain = values_and_grads(reference, low, grad)
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
        least = min(1e-3, roundings * torch.finfo(dtype).eps * max(4.0, float(c.abs().max())))
        assert error <= 2 * allowed + least, f"error {error:.2e}, torch's own {allowed:.2e}"


def peak_bytes(action: Callable[[], object]) -> int:
    """The most CPU memory that torch held during `action` beyond what it held before."""
    return _memory(action)[1]


def held_bytes(action: Callable[[], object]) -> int:
    """CPU memory that torch holds after `action` beyond what it held before, its result alive."""
    return _memory(action)[0]


def _memory(action: Callable[[], object]) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _result = action()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak


def on_ranks(size: int, run: Callable[[int, Callable[[Tensor], Tensor]], Result]) -> list[Result]:
    """`run(rank, gather)` of each rank, in threads that take turns; `gather` stacks what all of them pass."""
    turn, meeting = threading.Lock(), threading.Barrier(size, timeout=60)
    passed: list[Tensor] = [torch.empty(0)] * size

    def on_rank(rank: int) -> Result:
        def gather(mine: Tensor) -> Tensor:
            passed[rank] = mine.clone()
            turn.release()
            try:
                meeting.wait()
                stacked = torch.stack(passed)
                meeting.wait()  # before anyone passes the next
            finally:
                turn.acquire()
            return stacked

        with turn:
            try:
                return run(rank, gather)
            except BaseException:
                meeting.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on_rank, range(size)))
