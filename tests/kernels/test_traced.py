"""What torch.compile makes of the kernels on a GPU, as far as it shows without one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import early

triton = pytest.importorskip("triton")

from megalite_kernels import aot  # noqa: E402
from megalite_kernels.gpu import launch  # noqa: E402
from megalite_kernels.gpu.launch import recording  # noqa: E402
from tests.kernels.test_aot import needs_that_triton  # noqa: E402

_run: Future[early.Done]


def begin_early(items: Sequence[pytest.Function]) -> None:
    """Every operator traced, in a process of its own, if that was asked for."""
    global _run
    if any(item.name == "test_operators_are_traced_whole" for item in items):
        _run = early.begin([sys.executable, "-W", "ignore", "-m", "tests.kernels.traced"])


@pytest.mark.slow
def test_operators_are_traced_whole() -> None:
    done = _run.result()
    lines = [line for line in done.stdout.splitlines() if line.endswith("  ok")]
    assert done.returncode == 0, done.stdout[-6000:]
    assert len(lines) > 15


def test_a_kernel_starts_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts kernels on the current device, which need not be that of the tensors."""
    current, started = [torch.device("cuda", 0)], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "wrap_triton", lambda kernel: {(1,): lambda *_: started.append(current[-1])})
    for x in (SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)), torch.ones(1)):
        launch.launch(None, (1,), x)
    assert started == [torch.device("cuda", 1), torch.device("cuda", 0)]


def _kernels() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """By name each kernel, with the arguments and options of the first case that starts it."""
    found: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.setdefault(kernel.fn.__name__, (kernel, args, options))

    with recording(record):
        for _, call in aot._cases():
            call()
    return found


KERNELS = _kernels()


def _bound(name: str) -> dict[str, Any]:
    kernel, args, options = KERNELS[name]
    parameters = kernel.signature.parameters
    return dict(
        kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in parameters}).arguments
    )


@pytest.mark.parametrize("name", KERNELS)
def test_arguments_are_such_as_torch_compiles(name: str) -> None:
    """Inductor's launcher has a parameter `stream` of its own. torch 2.11 takes no number beyond 32 bits, and
    traces with plain ints, which have no methods: where one has to be widened, tl.cast does it."""
    kernel, constants = KERNELS[name][0], {p.name for p in KERNELS[name][0].params if p.is_constexpr}
    assert "stream" not in kernel.arg_names
    for argument, value in _bound(name).items():
        if isinstance(value, int | float) and argument not in constants:
            assert abs(value) < 2**31, argument
            assert not re.search(rf"\b{argument}\.to\(", kernel.src), argument


@needs_that_triton
@pytest.mark.parametrize(
    "name", [name for name in KERNELS if any(isinstance(v, float) for v in _bound(name).values())]
)
def test_nothing_is_computed_in_fp64(name: str) -> None:
    """Inductor declares Python's floats as fp64, where Triton's own launcher makes them fp32."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    kernel, _, options = KERNELS[name]
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = _bound(name)[parameter.name]
        if isinstance(value, torch.Tensor):
            types[parameter.name] = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}[
                value.dtype
            ]
        elif isinstance(value, float):
            types[parameter.name] = "fp64"
        elif isinstance(value, int) and not parameter.is_constexpr and value != 1:
            types[parameter.name] = "i32"
        else:
            types[parameter.name], constants[place,] = "constexpr", value
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    parsed = backend.parse_options({k: v for k, v in options.items() if k.startswith("num_")})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, types, constants)
    made = source.make_ir(
        target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    )
    wide = [line for line in str(made).splitlines() if re.search(r"\bf64\b", line)]
    assert wide
    assert not [line for line in wide if re.search(r" = (?:arith|math)\.(?!truncf)", line)]
