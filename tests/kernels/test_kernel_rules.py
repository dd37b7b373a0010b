"""Rules for Triton sources, read from their syntax trees: offsets that do not overflow, nothing that is
not deterministic, nothing that a later Triton has removed.

A program's index, and a loop's that starts from it or strides over rows, counts rows in int32; multiplied
with a stride it passes 2³¹ long before memory ends. So such a number is `narrow`, a sum with something
`.to(tl.int64)` is not, and a narrow one may be multiplied with constants alone (in capitals).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_source_rules import dotted, place, sources

FORBIDDEN = {
    "tl.make_block_ptr": "newer Tritons have none; use pointers or descriptors",
    "triton.autotune": "tile sizes come from the tables",
    "triton.heuristics": "tile sizes come from the tables",
}
ATOMICS = "tl.atomic_"
LOOPS = {"range", "tl.range"}
# Functions that take a program's index apart: their products count programs, which a grid bounds.
INDEX_ARITHMETIC = {"block_and_head"}


def kernels() -> list[str]:
    """Modules of the Triton halves."""
    return [name for name in sources() if name.startswith("megalite_kernels.gpu.")]


def forbidden(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What no kernel may use, with the reason."""
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name in FORBIDDEN:
            yield node, f"{name}: {FORBIDDEN[name]}"
        if name.startswith(ATOMICS):
            yield node, f"{name}: the order of additions must not depend on the schedule"


def overflowing(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Products of a narrow number with something that is no constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and _is_kernel(node) and node.name not in INDEX_ARITHMETIC:
            narrow = _narrow_names(node)
            for part in ast.walk(node):
                if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult):
                    for one, other in ((part.left, part.right), (part.right, part.left)):
                        if (
                            _is_narrow(one, narrow)
                            and not _is_constant(other)
                            and not _is_wide(other, narrow)
                        ):
                            yield part, f"`{ast.unparse(part)}` may pass 2³¹: .to(tl.int64) first"
                            break


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in dotted(decorator) for decorator in function.decorator_list)


def _narrow_names(kernel: ast.FunctionDef) -> set[str]:
    """Names that hold narrow numbers; assignments are followed until nothing new is found."""
    narrow: set[str] = set()
    while True:
        before = len(narrow)
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                narrow |= _assigned(node.targets[0], node.value, narrow)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                if _is_narrow(node.value, narrow):
                    narrow.add(node.target.id)
            elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
                call = node.iter
                if isinstance(call, ast.Call) and dotted(call.func) in LOOPS:
                    narrow.add(node.target.id)
        if len(narrow) == before:
            return narrow


def _assigned(target: ast.expr, value: ast.expr, narrow: set[str]) -> set[str]:
    if isinstance(target, ast.Tuple):
        if not isinstance(value, ast.Tuple):
            names = {name.id for name in target.elts if isinstance(name, ast.Name)}
            return names if _is_narrow(value, narrow) else set()
        pairs = zip(target.elts, value.elts, strict=True)
        return {name for one, other in pairs for name in _assigned(one, other, narrow)}
    if isinstance(target, ast.Name) and _is_narrow(value, narrow):
        return {target.id}
    return set()


def _is_narrow(node: ast.expr, narrow: set[str]) -> bool:
    """Whether an int32 that counts rows comes out of an expression."""
    if isinstance(node, ast.Name):
        return node.id in narrow
    if isinstance(node, ast.Call):
        return dotted(node.func) in {"tl.program_id", *INDEX_ARITHMETIC}
    if isinstance(node, ast.Subscript):  # rows[:, None]
        return _is_narrow(node.value, narrow)
    if isinstance(node, ast.BinOp) and not _is_wide(node, narrow):
        return _is_narrow(node.left, narrow) or _is_narrow(node.right, narrow)
    return False


def _is_wide(node: ast.expr, narrow: set[str]) -> bool:
    """Whether an expression is made int64 in it."""
    if isinstance(node, ast.Call):
        is_cast = isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cast")
        return is_cast and bool(node.args) and dotted(node.args[-1]) == "tl.int64"
    if isinstance(node, ast.Subscript):
        return _is_wide(node.value, narrow)
    return isinstance(node, ast.BinOp) and (_is_wide(node.left, narrow) or _is_wide(node.right, narrow))


def _is_constant(node: ast.expr) -> bool:
    """A literal, a name in capitals, or arithmetic on those."""
    if isinstance(node, ast.BinOp):
        return _is_constant(node.left) and _is_constant(node.right)
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())


def test_there_are_kernels_to_look_at() -> None:
    text = "".join(sources()[name][0].read_text(encoding="utf-8") for name in kernels())
    assert text.count("tl.program_id") >= 2


def test_kernels_use_nothing_forbidden() -> None:
    found = [
        f"{place(sources()[name][0], node)}: {why}"
        for name in kernels()
        for node, why in forbidden(sources()[name][1])
    ]
    assert not found, "\n".join(found)


def test_offsets_do_not_overflow() -> None:
    found = [
        f"{place(sources()[name][0], node)}: {why}"
        for name in kernels()
        for node, why in overflowing(sources()[name][1])
    ]
    assert not found, "\n".join(found)


KERNEL = "@triton.jit\ndef kernel(x, dim, stride, BLOCK: tl.constexpr):\n    "


@pytest.mark.parametrize(
    "body",
    [
        "tl.load(x + tl.program_id(0) * dim)",
        "row = tl.program_id(0)\n    tl.load(x + row * stride)",
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n    tl.load(x + row[:, None] * stride)",
        "a, b = tl.program_id(0), 3\n    c = a // 4\n    tl.load(x + stride * c)",
        "tl.load(x + (tl.program_id(0) * stride).to(tl.int64))",
        "for start in range(0, dim, BLOCK):\n        tl.load(x + (start + tl.arange(0, BLOCK)) * stride)",
        "row = 0\n    row += tl.program_id(0)\n    tl.load(x + row * stride)",
        "block, head = block_and_head(dim, 4)\n    tl.load(x + head * stride)",
    ],
)
def test_the_rule_sees_an_overflow(body: str) -> None:
    assert list(overflowing(ast.parse(KERNEL + body)))


@pytest.mark.parametrize(
    "body",
    [
        "tl.load(x + tl.program_id(0).to(tl.int64) * dim)",
        "row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    tl.load(x + row * dim)",
        "row = tl.program_id(0)\n    tl.load(x + row.to(tl.int64) * dim)",
        "row = tl.program_id(0)\n    tl.load(x + tl.cast(row, tl.int64) * dim)",
        "for start in range(tl.program_id(0) * BLOCK, dim, 8):\n"
        "        row = start + tl.arange(0, BLOCK).to(tl.int64)\n        tl.load(x + row * stride)",
        "tl.load(x + tl.program_id(0) * 4 * BLOCK)",
        "tl.load(x + tl.program_id(0) * tl.cdiv(dim, 2).to(tl.int64))",
        "tl.load(x + tl.arange(0, BLOCK)[:, None] * dim)",
    ],
)
def test_the_rule_leaves_the_harmless_alone(body: str) -> None:
    assert not list(overflowing(ast.parse(KERNEL + body)))


@pytest.mark.parametrize(
    "line", ["tl.make_block_ptr(x)", "tl.atomic_add(x, 1)", "@triton.autotune([], [])\ndef f(): pass"]
)
def test_the_rule_sees_what_is_forbidden(line: str) -> None:
    assert list(forbidden(ast.parse(line)))
