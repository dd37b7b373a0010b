"""Rules for the product's source, read from its syntax trees: what it never calls, who imports whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "megalite": ROOT / "megalite",
    "megalite_kernels": ROOT / "kernels" / "megalite_kernels",
    "data_tools": ROOT / "data_tools",
}

# A module may import from its own layer and those below; what is not named stands beside the trainer.
LAYERS = [
    {
        "megalite",
        "megalite.errors",
        "megalite.lock",
        "megalite.config",
        "megalite.config_file",
        "megalite.log",
        "megalite.progress",
    },
    {"megalite_kernels", "megalite.data"},
    {"megalite.parallel", "data_tools"},
    {"megalite.model", "megalite.optim"},
    {"megalite.engines", "megalite.checkpoint", "megalite.resilience"},
    {"megalite.trainer"},
    {"megalite.cli", "megalite.__main__"},
]
BESIDE_TRAINER = 5
WITHOUT_TORCH = {"megalite.data", "data_tools"}  # nor anything of ours that imports it
KERNELS_MAY = {"torch", "triton", "megalite_kernels"}

# Using any of these can run code that came with the data.
FORBIDDEN = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("torch.load", "torch.save", "torch.package", "torch.distributed.checkpoint"),
    *("torch.serialization", "torch.hub", "torch.jit.load", "numpy.lib.format", "runpy"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"),
}
OBJECT_COLLECTIVES = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
DEEPSPEED_CHECKPOINTS = {"load_checkpoint", "save_checkpoint"}  # of an engine: pickles
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Module name → its file and syntax tree."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = (path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def place(path: Path, node: ast.AST) -> str:
    """file:line of a node."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imported(name: str, node: ast.AST) -> list[str]:
    """Dotted names an import statement in module `name` brings in; a module where there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        is_package = sources()[name][0].name == "__init__.py"
        parents = name.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
        base = ".".join([*parents, base] if base else parents)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(name: str) -> list[tuple[str, ast.AST]]:
    """Everything module `name` imports anywhere in it, inside functions and `if TYPE_CHECKING` too."""
    tree = sources()[name][1]
    return [(target, node) for node in ast.walk(tree) for target in imported(name, node)]


def own_module(target: str) -> str | None:
    """The product's module that an imported name is or lies in."""
    if target in sources():
        return target
    parent = target.rpartition(".")[0]
    return parent if parent in sources() else None


def unit(module: str) -> str:
    """The part of the house a module belongs to: a sub-package or top-level module of megalite."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "megalite" else parts[0]


def layer(module: str) -> int:
    """Its place in LAYERS."""
    return next((number for number, units in enumerate(LAYERS) if unit(module) in units), BESIDE_TRAINER)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, or nothing."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def used_names(name: str, tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every dotted name imported or reached in module `name`, with aliases followed."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, target in zip(node.names, imported(name, node), strict=True):
                yield target, node
                if isinstance(node, ast.ImportFrom) or alias.asname:
                    aliases[alias.asname or alias.name] = target
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := dotted(node)):
            head, _, rest = chain.partition(".")
            yield f"{aliases.get(head, head)}.{rest}", node


def forbidden(name: str, tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Uses of what may never be used."""
    for target, node in used_names(name, tree):
        parts = target.split(".")
        prefixes = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        if prefixes & FORBIDDEN or parts[-1] in OBJECT_COLLECTIVES | DEEPSPEED_CHECKPOINTS:
            yield target, node
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                yield node.func.id, node
            # Its third argument, if not by name.
            is_long = dotted(node.func).endswith(("np.load", "numpy.load")) and len(node.args) > 2
            if is_long or any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield "allow_pickle", node


def test_the_product_is_found() -> None:
    assert {"megalite.errors", "megalite.checkpoint.store", "megalite_kernels"} <= set(sources())


def test_nothing_that_can_run_foreign_code_is_used() -> None:
    found = [
        f"{place(path, node)}: {what}"
        for name, (path, tree) in sources().items()
        for what, node in forbidden(name, tree)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch as t; t.load('x')",
        "import torch; torch.save({}, 'x')",
        "from torch import load",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import torch.distributed as dist; dist.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
        "from torch import distributed as d; d.checkpoint.save({})",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import numpy as np; np.load('x', None, True)",
        "import torch; torch.serialization.load('x')",
        "engine.load_checkpoint('x')",
        "import yaml; yaml.load('x')",
        "eval('1')",
        "exec('1')",
        "def f():\n    import marshal",
    ],
)
def test_the_rule_sees_each_way(line: str) -> None:
    assert list(forbidden("megalite.errors", ast.parse(line)))


@pytest.mark.parametrize("line", ["import torch; torch.compile(f)", "model.eval()", "json.load(file)"])
def test_the_rule_leaves_the_harmless_alone(line: str) -> None:
    assert not list(forbidden("megalite.errors", ast.parse(line)))


def test_imports_point_downwards() -> None:
    found = []
    for name, (path, _) in sources().items():
        for target, node in imports(name):
            module = own_module(target)
            if module and layer(module) > layer(name):
                found.append(f"{place(path, node)}: {unit(name)} may not import {unit(module)}")
    assert not found, "\n".join(found)


def test_kernels_import_torch_and_triton_only() -> None:
    found = []
    for name, (path, _) in sources().items():
        for target, node in imports(name):
            top = target.split(".")[0]
            if unit(name) == "megalite_kernels" and top not in {*KERNELS_MAY, *sys.stdlib_module_names}:
                found.append(f"{place(path, node)}: imports {target}")
    assert not found, "\n".join(found)


def test_data_is_without_torch() -> None:
    found = []
    reached = {name: name for name in sources() if unit(name) in WITHOUT_TORCH}
    waiting = list(reached)
    while waiting:
        name = waiting.pop()
        for target, node in imports(name):
            module = own_module(target)
            if target.split(".")[0] == "torch":
                found.append(f"{place(sources()[name][0], node)}: torch, for {reached[name]}")
            elif module and module not in reached:
                reached[module] = f"{reached[name]} → {module}"
                waiting.append(module)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("of", ["units", "modules"])
def test_imports_have_no_cycle(of: str) -> None:
    graph: dict[str, set[str]] = {}
    for name in sources():
        for target, _ in imports(name):
            module = own_module(target)
            if module:
                ends = (unit(name), unit(module)) if of == "units" else (name, module)
                if ends[0] != ends[1]:
                    graph.setdefault(ends[0], set()).add(ends[1])
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle in it


def test_everything_public_has_a_docstring() -> None:
    found = []
    for path, tree in sources().values():
        if ast.get_docstring(tree) is None and tree.body:
            found.append(f"{place(path, tree)}: module")
        scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
        scopes += [(f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef)]
        for prefix, scope in scopes:
            if prefix.startswith("_"):
                continue
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    continue
                if not node.name.startswith("_") and ast.get_docstring(node) is None:
                    found.append(f"{place(path, node)}: {prefix}{node.name}")
    assert not found, "\n".join(found)
