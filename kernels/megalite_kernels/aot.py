"""Compile every shipped kernel for chips that are not here, and say what it would take there.

    python -m megalite_kernels.aot [--arch sm_90] [--match attention] [--golden DIR [--write]]

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
from queue import Empty, SimpleQueue
from typing import Any

from megalite_kernels.tiles import ARCHITECTURES, assume

SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}  # what one program may ask for: 163 and 227 KiB
MORE_REGISTERS = 8  # how many more than the golden file's are no finding
_PRODUCT = re.compile(r"tt\.dot .*: tensor<[x\d]*b?f16>")  # a product of 16-bit matrices, before lowering
_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync")

Case = tuple[str, str]  # architecture, "module:name"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes spilled a thread, shared memory a program.

    `products` counts its products of 16-bit matrices, `tensor_core` the instructions they became.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: int
    tensor_core: int


Found = list[Resources] | str  # a launcher may start several kernels; or why one could not be compiled


def case_names(match: str = "") -> list[str]:
    """Every shipped configuration whose name contains `match`, as "module:name"."""
    return [name for name, _ in _cases() if match in name]


def compile_cases(cases: Sequence[Case], processes: int = 0) -> dict[Case, Found]:
    """What the kernels of each case take on its architecture.

    `processes` compile side by side, one a core by default.
    """
    waiting: SimpleQueue[Case] = SimpleQueue()
    for case in cases:
        waiting.put(case)
    found: dict[Case, Found] = {}
    count = min(processes or os.cpu_count() or 1, len(cases))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        for done in [pool.submit(_feed_workers, waiting, found) for _ in range(count)]:
            done.result()
    return {case: found[case] for case in cases}


def problems(found: Found, arch: str) -> list[str]:
    """What would make a kernel slow or impossible to launch; empty if nothing."""
    if isinstance(found, str):
        return [found]
    said = []
    for kernel in found:
        if kernel.spilled_bytes:
            said.append(f"{kernel.kernel} spills {kernel.spilled_bytes} bytes a thread")
        if kernel.shared_bytes > SHARED_BYTES[arch]:
            said.append(f"{kernel.kernel} asks for {kernel.shared_bytes} bytes of {SHARED_BYTES[arch]}")
        if kernel.products and not kernel.tensor_core:
            said.append(f"{kernel.kernel} multiplies 16-bit matrices without tensor cores")
    return said


def changes(golden: dict[str, dict[str, int]], found: dict[str, Found]) -> list[str]:
    """How compiled cases differ from a golden file: cases that came or went, kernels that grew."""
    said = [f"{name} is no longer a case" for name in golden.keys() - found.keys()]
    for name, result in found.items():
        if isinstance(result, str):
            continue
        now, before = _registers(result), golden.get(name)
        if before is None or now.keys() != before.keys():
            said.append(f"{name} starts {sorted(now)}, the golden file has {sorted(before or {})}")
            continue
        said += [
            f"{name}: {kernel} takes {count} registers, the golden file has {before[kernel]}"
            for kernel, count in now.items()
            if count > before[kernel] + MORE_REGISTERS
        ]
    return sorted(said)


def read_golden(folder: Path, arch: str) -> dict[str, dict[str, int]]:
    """Registers a thread of each kernel of each case, as last accepted; empty if there is no file."""
    path = folder / f"{arch}.json"
    golden: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
    return golden


def write_golden(folder: Path, arch: str, found: dict[str, Found]) -> None:
    """Accept what was found, one case a line."""
    lines = (
        f"{json.dumps(name)}: {json.dumps(_registers(result))}"
        for name, result in sorted(found.items())
        if not isinstance(result, str)
    )
    (folder / f"{arch}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _registers(result: list[Resources]) -> dict[str, int]:
    """By kernel; of one that a launcher starts twice, the larger."""
    counts: dict[str, int] = {}
    for part in result:
        counts[part.kernel] = max(part.registers, counts.get(part.kernel, 0))
    return counts


def _cases() -> Iterator[tuple[str, Any]]:
    from megalite_kernels import gpu

    for module in sorted(info.name for info in pkgutil.iter_modules(gpu.__path__)):
        found = import_module(f"{gpu.__name__}.{module}")
        if hasattr(found, "cases"):
            for case in found.cases():
                yield f"{module}:{case.name}", case.call


def _feed_workers(waiting: SimpleQueue[Case], found: dict[Case, Found]) -> None:
    """Hand case after case to one process; after a crash another goes on with the next case."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megalite_kernels.aot", "--worker"]
    while not waiting.empty():
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as worker,
        ):
            assert worker.stdin is not None
            assert worker.stdout is not None
            while True:
                try:
                    case = waiting.get_nowait()
                except Empty:
                    return
                try:
                    print(json.dumps(case), file=worker.stdin, flush=True)
                    line = worker.stdout.readline()
                except BrokenPipeError:
                    line = ""
                if not line:
                    errors.seek(0)
                    last = (errors.read().strip().splitlines() or [""])[-1]
                    found[case] = f"the compiler ended with {worker.wait()}: {last[:300]}"
                    break
                result = json.loads(line)
                found[case] = result if isinstance(result, str) else [Resources(**part) for part in result]


# --- in the worker ---------------------------------------------------------------------------------


class _Chip:
    """A driver for a chip that is not here: enough to compile, not to launch."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def _work() -> None:
    """For each case read from standard input, compile and print a line of JSON."""
    from triton.runtime.driver import driver

    from megalite_kernels.gpu.launch import recording

    calls = dict(_cases())
    for line in sys.stdin:
        arch, name = json.loads(line)
        driver.set_active(_Chip(arch))
        compiled: list[Resources] = []

        def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            compiled.append(_resources(kernel.warmup(*args, grid=(1,), **options)))  # noqa: B023

        try:
            with assume(arch), recording(record):
                calls[name]()
            result: list[dict[str, Any]] | str = [asdict(part) for part in compiled]
        except Exception as error:  # whatever the compiler raises is a finding about this case
            result = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        print(json.dumps(result), flush=True)


def _resources(compiled: Any) -> Resources:
    import triton

    # The instructions are counted in PTX: nvdisasm takes longer than the compiler.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command: list[str | Path] = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump gives no register count: {usage[:200]!r}")
    return Resources(
        compiled.metadata.name,
        int(registers[1]),
        int(registers[2]),
        compiled.metadata.shared,
        products=len(_PRODUCT.findall(compiled.asm["ttir"])),
        tensor_core=len(_TENSOR_CORE.findall(compiled.asm["ptx"])),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a table, and exit with 1 if a kernel spills, does not fit, does not compile or grew."""
    parser = argparse.ArgumentParser(prog="python -m megalite_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", choices=ARCHITECTURES, help="only this one")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="compare registers with DIR's files")
    parser.add_argument("--write", action="store_true", help="write DIR's files instead")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        _work()
        return 0
    if options.write and (options.golden is None or options.match):
        parser.error("--write needs --golden DIR and every case: no --match")
    architectures = [options.arch] if options.arch else list(ARCHITECTURES)
    names = case_names(options.match)
    everything = compile_cases([(arch, name) for arch in architectures for name in names])
    bad = 0
    for arch in architectures:
        found = {name: everything[arch, name] for name in names}
        for name, result in found.items():
            wrong = problems(result, arch)
            bad += bool(wrong)
            print(arch, name, *(wrong or [_summary(part) for part in result]), sep="  ")
        if options.write:
            write_golden(options.golden, arch, found)
        elif options.golden:
            golden = {n: r for n, r in read_golden(options.golden, arch).items() if options.match in n}
            wrong = changes(golden, found)
            bad += len(wrong)
            print(*(f"{arch}  {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{len(everything)} cases, {bad} with problems")
    return 1 if bad else 0


def _summary(part: Any) -> str:
    core = f", {part.tensor_core} tensor-core instructions" if part.products else ""
    return f"{part.registers} registers, {part.shared_bytes} bytes{core}"


if __name__ == "__main__":
    sys.exit(main())
