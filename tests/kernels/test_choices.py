"""What `auto` picks can be printed: `megalite kernels`."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from megalite.cli import main
from megalite_kernels import choices, dispatch, tiles
from megalite_kernels.dispatch import recording_choices, resolve
from tests.test_source_rules import dotted, sources

MEASURED = {"choices": {"d128/doc": {"winner": "triton", "speedup": 1.25}}, "tiles": {}}


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if attention over documents had been measured on sm_90."""
    shipped = tiles.table

    def table(operation: str, name: str) -> object:
        return MEASURED if (operation, name) == ("attention", "sm_90") else shipped(operation, name)

    monkeypatch.setattr(tiles, "table", table)
    monkeypatch.setattr(choices, "operations", lambda: ["attention", "norm"])
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def test_every_operation_that_is_chosen_is_listed() -> None:
    asked = {
        node.args[1].value
        for name, (_, tree) in sources().items()
        if name.startswith("megalite_kernels.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and dotted(node.func) == "resolve"
        and isinstance(node.args[1], ast.Constant)
    }
    assert asked
    assert asked <= set(choices.operations())


@pytest.mark.usefixtures("_measured")
def test_measured_variants_come_with_their_evidence() -> None:
    found = {(c.operation, c.variant): c for c in choices.choices(torch.device("cpu"))}
    assert set(found) == {("attention", "d128/doc"), ("attention", ""), ("norm", "")}
    documents = found["attention", "d128/doc"]
    assert documents.here == "torch"  # on CPU, whatever the tables say
    assert documents.tables["sm_90"] == choices.Measured("triton", 1.25)
    assert documents.tables["sm_80"] == choices.Measured("torch", None)


@pytest.mark.usefixtures("_measured")
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == "MEGALITE_KERNELS: not set; choices here follow the measurements"
    assert rows[3:] == [
        "operation variant here sm_80 sm_90",
        "attention d128/doc torch torch (not measured) triton (1.25 ×)",
        "attention all others torch torch (not measured) torch (not measured)",
        "norm all torch torch (not measured) torch (not measured)",
    ]


def test_json_and_the_override(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert main(["kernels", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said[dispatch.VARIABLE] == "reference"
    assert {choice["here"] for choice in said["choices"]} == {"reference"}


def test_an_impossible_override_is_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "fastest")
    assert main(["kernels"]) == 2
    assert "MEGALITE_KERNELS='fastest' is no kernel implementation" in capsys.readouterr().err


@pytest.mark.usefixtures("_measured")
def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert main(["kernels"]) == 0
    assert "operation" in capsys.readouterr().out


def test_a_compiled_graph_asks_and_traces_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, where Triton is looked for and a table is read from its file."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "has_triton", lambda: torch._dynamo.graph_break() or True)
    tiles.table.cache_clear()

    def factor(x: torch.Tensor) -> torch.Tensor:
        settings = ("auto", "attention", "d128/doc", torch.device("cuda"), torch.bfloat16)
        return x * len(dispatch._resolve(*settings))

    x = torch.ones(2)
    picked = tiles.choice("attention", "d128/doc", "sm_90")
    tiles.table.cache_clear()
    whole = torch.compile(factor, fullgraph=True, backend="eager")
    assert torch.equal(whole(x), x * len(picked))


def test_recording_choices() -> None:
    with recording_choices() as asked:
        resolve("torch", "norm", torch.empty(0), "rms_norm/64")
    resolve("torch", "norm", torch.empty(0))
    assert asked == [("norm", "rms_norm/64")]


def test_measured_choices_are_applied(tmp_path: Path) -> None:
    from benchmarks.gpu.apply import apply

    shipped = Path(tiles.__file__).parent / "sm_90" / "norm.json"
    (tmp_path / "sm_90").mkdir()
    table = tmp_path / "sm_90" / "norm.json"
    table.write_text(shipped.read_text())
    measured = {"rms_norm/4096": {"winner": "triton", "speedup": 1.3}}
    assert apply({"architecture": "sm_90", "choices": {"norm": measured}}, tmp_path) == [table]
    before, after = (json.loads(path.read_text()) for path in (shipped, table))
    assert after["choices"] == before["choices"] | measured
    assert after["tiles"] == before["tiles"]
    kept = [line for line in shipped.read_text().splitlines() if "num_warps" in line]
    assert [line for line in table.read_text().splitlines() if "num_warps" in line] == kept
