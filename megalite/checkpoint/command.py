"""`megalite checkpoint list|verify`: what a run has saved, and whether every byte of it is whole."""

from __future__ import annotations

import argparse
import json
import time
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.errors import CheckpointError
from megalite.progress import progress

if TYPE_CHECKING:
    from megalite.checkpoint.format import Manifest

_HELP = """\
Look at the checkpoints of a run. list reads the manifests and the files' sizes, verify reads every byte
and compares it with its CRC, as the start of a run does.

examples:
  megalite checkpoint list runs/mine
  megalite checkpoint verify runs/mine
  megalite checkpoint verify runs/mine/checkpoints/step_00001000 --json

exit codes: 0 all are whole, 2 one is broken or there is none
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `checkpoint` to the command line."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="list and verify the checkpoints of a run",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoint.set_defaults(func=None, show_help=checkpoint.print_help)
    actions = checkpoint.add_subparsers(metavar="ACTION")
    for name, meaning in (("list", "read manifests and sizes"), ("verify", "read every byte")):
        action = actions.add_parser(
            name, help=meaning, description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        action.add_argument("run", type=Path, help="a run, its checkpoints folder, or one checkpoint")
        action.add_argument("--json", action="store_true", help="print one JSON object a checkpoint")
        action.set_defaults(func=_run, reads_all=name == "verify")


def _run(args: argparse.Namespace) -> int:
    folders = _folders(args.run)
    records = [describe(folder, args.reads_all) for folder in folders]
    # What a run at work has deleted meanwhile is not broken.
    records = [r for r, folder in zip(records, folders, strict=True) if not r["fault"] or lexists(folder)]
    if not records:
        raise CheckpointError(
            f"{args.run}: newer ones have taken the place of all of them meanwhile; ask again"
        )
    if args.json:
        print("\n".join(json.dumps(record) for record in records))
    else:
        print(_table(records))
    broken = [record["name"] for record in records if record["fault"] is not None]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of {len(records)} in {folders[0].parent} are broken: {', '.join(broken)}; "
            "a run goes on from the newest that is whole"
        )
    return 0


def _folders(path: Path) -> list[Path]:
    """The checkpoints `path` stands for, newest first.

    Raises:  CheckpointError if there are none
    """
    from megalite.checkpoint.format import MANIFEST
    from megalite.checkpoint.retention import candidates

    if (path / MANIFEST).exists():
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = candidates(root) if root.is_dir() else []
    if not names:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder or a checkpoint in it")
    return [root / name for name in names]


def describe(folder: Path, reads_all: bool) -> dict[str, Any]:
    """What one checkpoint is; `fault` is None where it is whole, as far as was read."""
    from megalite.checkpoint.format import MANIFEST, read_manifest
    from megalite.checkpoint.retention import step_of

    record: dict[str, Any] = dict.fromkeys(("step", "position", "loss", "val_loss", "bytes", "layout"))
    record |= {"name": folder.name, "age_s": None, "fault": None}
    try:
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a symbolic link; put the folder itself there")
        manifest = read_manifest(folder / MANIFEST)
        record |= {
            "step": manifest.step,
            "position": manifest.position,
            "loss": manifest.meta.get("loss"),
            "val_loss": manifest.meta.get("val_loss"),
            "bytes": sum(file.bytes for file in manifest.files),
            "layout": _layout(manifest),
            "age_s": round(time.time() - (folder / MANIFEST).stat().st_mtime),
        }
        if folder.name.startswith("step_") and manifest.step != step_of(folder.name):
            raise CheckpointError(f"{folder} holds step {manifest.step}; its name says otherwise")
        _check_files(folder, manifest, reads_all)
    except (CheckpointError, FileNotFoundError) as error:
        record["fault"] = str(error)
    return record


def _check_files(folder: Path, manifest: Manifest, reads_all: bool) -> None:
    """Compare the files' sizes with the manifest, or every byte with its CRC.

    Raises:  CheckpointError
    """
    from megalite.checkpoint.format import check_size, verify_file

    if not reads_all:
        for file in manifest.files:
            check_size(folder, file)
        return
    done, total = 0, sum(file.bytes for file in manifest.files)
    with progress(f"verifying {folder.name}") as update:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            update(done, total)

        for file in manifest.files:
            verify_file(folder, file, advance)


def _layout(manifest: Manifest) -> str:
    """The processes that wrote it, and how they divided the model."""
    keys = manifest.meta.get("config")
    mesh = keys.get("mesh") if isinstance(keys, dict) else None
    size = manifest.world.get("size", len(manifest.files))
    if not isinstance(mesh, dict):
        return f"{size} processes"
    tp, pp, stage = (mesh.get(key) for key in ("tp", "pp", "zero_stage"))
    return f"{size} = dp {size // max(_count(tp) * _count(pp), 1)} × pp {pp} × tp {tp}, zero {stage}"


def _count(value: object) -> int:
    return value if isinstance(value, int) else 1


def _table(records: list[dict[str, Any]]) -> str:
    heads = ("name", "position", "loss", "val_loss", "bytes", "age", "written by", "state")
    rows = [heads]
    for record in records:
        numbers = [record["position"], record["loss"], record["val_loss"], record["bytes"]]
        shown = [
            f"{n:,}" if isinstance(n, int) else f"{n:.4f}" if isinstance(n, float) else "-" for n in numbers
        ]
        state = "whole" if record["fault"] is None else f"broken: {record['fault']}"
        rows.append((record["name"], *shown, _age(record["age_s"]), record["layout"] or "-", state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _age(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{max(seconds, 0)} s"
