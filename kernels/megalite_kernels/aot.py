"""Compile every shipped kernel for a chip that is not here, and say what it would take there.

    python -m megalite_kernels.aot --arch sm_90 [--match attention] [--json FILE]

Each module of `megalite_kernels.gpu` lists its shipped configurations in `cases()`. A case calls the
launcher itself on meta tensors, so what is compiled is what would be launched. Compiling happens in
worker processes, for a failed one may take its process with it.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from megalite_kernels.tiles import ARCHITECTURES, assume

SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}  # what one program may ask for: 163 and 227 KiB
_BATCH = 8  # cases a process compiles before another takes over
_TENSOR_CORE = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA")}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes spilled a thread, shared memory a program,
    and its tensor-core instructions."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: int


def case_names(match: str = "") -> list[str]:
    """Every shipped configuration whose name contains `match`, as "module:name"."""
    return [name for name, _ in _cases() if match in name]


def compile_cases(names: Sequence[str], arch: str, processes: int = 0) -> dict[str, list[Resources] | str]:
    """What the kernels of each case take on `arch`, or the reason why one could not be compiled.

    A launcher may start several kernels. `processes` compile side by side, one a core by default.
    """
    batches = [names[i : i + _BATCH] for i in range(0, len(names), _BATCH)]
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        parts = pool.map(lambda batch: _compile_in_process(batch, arch), batches)
        return {name: found for part in parts for name, found in part.items()}


def problems(found: Sequence[Resources] | str, arch: str) -> list[str]:
    """What would make a kernel slow or impossible to launch; empty if nothing."""
    if isinstance(found, str):
        return [found]
    said = []
    for kernel in found:
        if kernel.spilled_bytes:
            said.append(f"{kernel.kernel} spills {kernel.spilled_bytes} bytes a thread")
        if kernel.shared_bytes > SHARED_BYTES[arch]:
            said.append(f"{kernel.kernel} asks for {kernel.shared_bytes} bytes of {SHARED_BYTES[arch]}")
    return said


def _cases() -> Iterator[tuple[str, Any]]:
    from megalite_kernels import gpu

    for module in sorted(info.name for info in pkgutil.iter_modules(gpu.__path__)):
        found = import_module(f"{gpu.__name__}.{module}")
        if hasattr(found, "cases"):
            for case in found.cases():
                yield f"{module}:{case.name}", case.call


def _compile_in_process(names: Sequence[str], arch: str) -> dict[str, list[Resources] | str]:
    """Compile in another process; after a crash go on behind the case that caused it."""
    found: dict[str, list[Resources] | str] = {}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    while len(found) < len(names):
        left = [name for name in names if name not in found]
        command = [sys.executable, "-m", "megalite_kernels.aot", "--worker", "--arch", arch, *left]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            name, result = json.loads(line)
            found[name] = result if isinstance(result, str) else [Resources(**part) for part in result]
        if done.returncode:
            crashed = next(name for name in names if name not in found)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            found[crashed] = f"the compiler ended with {done.returncode}: {last[:300]}"
    return found


# --- in the worker ---------------------------------------------------------------------------------


class _Chip:
    """A driver for a chip that is not here: enough to compile, not to launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def _work(names: Sequence[str], arch: str) -> None:
    """Compile and print a line of JSON for each case, as soon as it is there."""
    from triton.runtime.driver import driver

    from megalite_kernels.gpu.launch import recording

    driver.set_active(_Chip(int(arch.removeprefix("sm_"))))
    calls = dict(_cases())
    for name in names:
        compiled: list[Resources] = []

        def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            compiled.append(_resources(kernel.warmup(*args, grid=(1,), **options), arch))  # noqa: B023

        try:
            with assume(arch), recording(record):
                calls[name]()
            result: list[dict[str, Any]] | str = [asdict(part) for part in compiled]
        except Exception as error:  # whatever the compiler raises is a finding about this case
            result = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        print(json.dumps([name, result]), flush=True)


def _resources(compiled: Any, arch: str) -> Resources:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        assembly = _output(tools / "nvdisasm", file.name)
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump gives no register count: {usage[:200]!r}")
    count = sum(len(re.findall(rf"\b{name}\b", assembly)) for name in _TENSOR_CORE[arch])
    return Resources(
        compiled.metadata.name, int(registers[1]), int(registers[2]), compiled.metadata.shared, count
    )


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a table, and exit with 1 if a kernel spills, does not fit or does not compile."""
    parser = argparse.ArgumentParser(prog="python -m megalite_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", choices=ARCHITECTURES, required=True)
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        _work(options.names, options.arch)
        return 0
    found = compile_cases(case_names(options.match), options.arch)
    bad = 0
    for name, result in found.items():
        wrong = problems(result, options.arch)
        bad += bool(wrong)
        print(name, *(wrong or [_summary(part) for part in result]), sep="  ")
    print(f"{len(found)} cases, {bad} with problems")
    if options.json:
        lines = {name: r if isinstance(r, str) else [asdict(part) for part in r] for name, r in found.items()}
        options.json.write_text(json.dumps(lines, indent=1) + "\n")
    return 1 if bad else 0


def _summary(part: Any) -> str:
    core = f", {part.tensor_core} tensor-core instructions" if part.tensor_core else ""
    return f"{part.registers} registers, {part.shared_bytes} bytes{core}"


if __name__ == "__main__":
    sys.exit(main())
