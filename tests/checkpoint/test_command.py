"""`megalite checkpoint list|verify` as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megalite import progress
from megalite.checkpoint import format
from megalite.checkpoint.commit import save
from megalite.checkpoint.format import Manifest, read_manifest
from megalite.checkpoint.retention import Retention, discard
from megalite.cli import main
from tests.checkpoint.helpers import owned, save_step
from tests.ranks import SOLO, run_ranks

MESH = {"tp": 1, "pp": 1, "zero_stage": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with steps 1 (by two ranks, with losses) and 2."""
    root = tmp_path / "run" / "checkpoints"
    meta = {"loss": 2.25, "val_loss": 2.5, "config": {"mesh": MESH}}
    save(root, 1, 10, lambda: owned(0, 1, 1), meta, SOLO, Retention(9))
    run_ranks(save_step, 2, str(root), 2)
    return tmp_path / "run"


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """What --json printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("action", ["list", "verify"])
def test_what_is_whole_is_listed(run: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", action, str(run), "--json"]) == 0
    second, first = lines(capsys)
    assert (second["step"], second["position"], second["loss"], second["fault"]) == (2, 20, None, None)
    assert second["layout"] == "2 processes"
    assert (first["loss"], first["val_loss"], first["layout"]) == (
        2.25,
        2.5,
        "1 = dp 1 × pp 1 × tp 1, zero 1",
    )
    assert first["bytes"] == (run / "checkpoints/step_00000001/rank_00000.safetensors").stat().st_size
    assert main(["checkpoint", action, str(run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "position", "loss", "val_loss", "bytes", "age", "written", "by", "state"]
    assert [row.split()[0] for row in rows] == ["step_00000002", "step_00000001"]
    assert all(row.endswith("  whole") for row in rows)


def test_a_flipped_bit_is_found_by_verify_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step_00000002/rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["checkpoint", "list", str(run)]) == 0
    assert main(["checkpoint", "verify", str(run / "checkpoints/step_00000001")]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run)]) == 2
    output = capsys.readouterr()
    assert "broken: " in output.out.splitlines()[1]
    assert "rank_00001.safetensors is damaged" in output.out.splitlines()[1]
    assert output.err == (
        f"megalite: CheckpointError: 1 of 2 in {run}/checkpoints are broken: step_00000002; "
        "a run goes on from the newest that is whole\n"
    )


def test_who_waits_for_a_large_checkpoint_hears_how_far_it_is(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", -1.0)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert main(["checkpoint", "verify", str(run / "checkpoints/step_00000002")]) == 0
    lines = capsys.readouterr().err.splitlines()
    told = [re.fullmatch(r"verifying step_00000002: ([\d.]+) of ([\d.]+) MiB", line) for line in lines]
    assert len(told) >= 2
    assert all(told)
    assert told[-1] is not None
    assert told[-1][1] == told[-1][2]


def test_a_file_cut_or_missing_is_found_by_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step_00000002/rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (run / "checkpoints/step_00000001/manifest.json").unlink()
    assert main(["checkpoint", "list", str(run), "--json"]) == 2
    second, first = lines(capsys)
    assert "bytes; the manifest says" in str(second["fault"])
    assert "No such file" in str(first["fault"])
    assert first["step"] is None


def test_what_a_run_at_work_deletes_meanwhile_is_not_broken(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleted(path: Path) -> Manifest:
        """As soon as its manifest has been read."""
        manifest = read_manifest(path)
        if path.parent.name in gone:
            discard(path.parent)
        return manifest

    gone = ["step_00000001"]
    monkeypatch.setattr(format, "read_manifest", deleted)
    assert main(["checkpoint", "verify", str(run), "--json"]) == 0
    assert [record["step"] for record in lines(capsys)] == [2]
    gone.append("step_00000002")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "newer ones have taken the place of all of them" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_nothing_there_is_a_mistake(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(tmp_path / place)]) == 2
    assert "holds no checkpoint; give a run folder" in capsys.readouterr().err


def test_without_an_action_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint"]) == 2
    assert "megalite checkpoint verify runs/mine" in capsys.readouterr().out
