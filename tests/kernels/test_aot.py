"""Every shipped kernel compiles for chips that are not here, without spills, and grows only on purpose.

Registers are held against `resources/sm_*.json`. To accept new ones:

    python -m megalite_kernels.aot --golden tests/kernels/resources --write
"""

from __future__ import annotations

import json
import os
import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from megalite_kernels import aot, gpu, tiles  # noqa: E402
from megalite_kernels.aot import Resources  # noqa: E402
from megalite_kernels.gpu.launch import recording  # noqa: E402
from megalite_kernels.tiles import ARCHITECTURES  # noqa: E402

GOLDEN = Path(__file__).parent / "resources"
MADE_WITH = "3.6.0"  # the Triton of the tile tables and golden files; others allot registers otherwise

needs_that_triton = pytest.mark.skipif(
    triton.__version__ != MADE_WITH,
    reason=f"registers are those of Triton {MADE_WITH}, not {triton.__version__}",
)


@pytest.fixture(scope="module")
def compiled() -> dict[aot.Case, aot.Found]:
    return aot.compile_cases([(arch, name) for arch in ARCHITECTURES for name in aot.case_names()])


@needs_that_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.slow
def test_shipped_kernels_fit_and_do_not_spill(arch: str, compiled: dict[aot.Case, aot.Found]) -> None:
    found = [
        f"{name}: {problem}"
        for (of, name), result in compiled.items()
        if of == arch
        for problem in aot.problems(result, arch)
    ]
    assert not found, "\n".join(found)


@needs_that_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.slow
def test_shipped_kernels_take_the_registers_they_took(arch: str, compiled: dict[aot.Case, aot.Found]) -> None:
    found = {name: result for (of, name), result in compiled.items() if of == arch}
    said = aot.changes(aot.read_golden(GOLDEN, arch), found)
    assert not said, "\n".join([*said, f"to accept: {(__doc__ or '').strip().splitlines()[-1].strip()}"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_that_ships_is_compiled(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {
        (path.stem, variant)
        for path in (Path(tiles.__file__).parent / arch).glob("*.json")
        for variant in json.loads(path.read_text())["tiles"]
    }
    asked = set()

    def tile(operation: str, variant: str, device: torch.device) -> dict[str, int]:
        asked.add((operation, variant))
        return tiles.tile(operation, variant, device)

    for info in pkgutil.iter_modules(gpu.__path__):
        module = import_module(f"{gpu.__name__}.{info.name}")
        if hasattr(module, "tile"):
            monkeypatch.setattr(module, "tile", tile)
    with tiles.assume(arch), recording(lambda *_: None):
        for _, call in aot._cases():
            call()
    assert asked == shipped


# --- that the check itself finds what it is for ---------------------------------------------------

FINE = Resources("k", registers=100, spilled_bytes=0, shared_bytes=1024, products=2, tensor_core=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"products": 0, "tensor_core": 0}, None),
        ({"spilled_bytes": 16}, "k spills 16 bytes a thread"),
        ({"shared_bytes": 166_913}, "k asks for 166913 bytes of 166912"),
        ({"tensor_core": 0}, "k multiplies 16-bit matrices without tensor cores"),
    ],
)
def test_problems(change: dict[str, int], said: str | None) -> None:
    assert aot.problems([replace(FINE, **change)], "sm_80") == ([said] if said else [])
    assert aot.problems("CompilationError: x", "sm_80") == ["CompilationError: x"]


def test_changes(tmp_path: Path) -> None:
    found: dict[str, aot.Found] = {"op:a": [FINE, replace(FINE, registers=90)], "op:b": [FINE]}
    aot.write_golden(tmp_path, "sm_80", found)
    golden = aot.read_golden(tmp_path, "sm_80")
    assert golden == {"op:a": {"k": 100}, "op:b": {"k": 100}}
    assert aot.changes(golden, found) == []
    grown = [replace(FINE, registers=100 + aot.MORE_REGISTERS + 1)]
    assert aot.changes(golden, {**found, "op:b": grown}) == [
        "op:b: k takes 109 registers, the golden file has 100"
    ]
    assert aot.changes(golden, {"op:a": found["op:a"], "op:c": [FINE]}) == [
        "op:b is no longer a case",
        "op:c starts ['k'], the golden file has []",
    ]
    assert aot.read_golden(tmp_path, "sm_90") == {}


def test_products_and_their_instructions_are_counted() -> None:
    ttir = """
    %1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x16xbf16> * tensor<16x64xbf16>
    %2 = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<64x16xf32> * tensor<16x64xf32>
    %3 = tt.dot %a, %b, %c : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32>"""
    ptx = """
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    wgmma.fence.sync.aligned; fma.rn.f32 %f1, %f2, %f3, %f4;"""
    assert len(aot._PRODUCT.findall(ttir)) == 2
    assert len(aot._TENSOR_CORE.findall(ptx)) == 2


@pytest.mark.slow
def test_a_case_that_does_not_compile_is_named_and_the_others_go_on() -> None:
    name = aot.case_names()[0]
    found = aot.compile_cases([("sm_80", "norm:no such case"), ("sm_80", name)], processes=1)
    assert found["sm_80", "norm:no such case"] == "KeyError: 'norm:no such case'"
    assert isinstance(found["sm_80", name], list)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that aborts takes its process with it: of two cases, both are told."""
    (tmp_path / "triton").mkdir()
    dies = "import os, sys; sys.stderr.write('MLIR\\nsaid why\\n'); os._exit(7)"
    (tmp_path / "triton/__init__.py").write_text(dies)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = aot.compile_cases([("sm_80", "a"), ("sm_90", "b")], processes=1)
    assert found == {
        ("sm_80", "a"): "the compiler ended with 7: said why",
        ("sm_90", "b"): "the compiler ended with 7: said why",
    }
