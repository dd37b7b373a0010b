"""Doing one thing on every rank, and learning alike whether it went well.

A failure on one rank is told to all before anyone goes on, so all raise the same error and none waits.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megalite.checkpoint.format import explain
from megalite.errors import CheckpointError
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Axis

_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "free some space, lower checkpoint.keep_last or move run_dir",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable for this user or move run_dir"
    ),
}


def everywhere(axis: Axis, device: torch.device, action: Callable[[], Any], root: Path) -> list[Any]:
    """Run `action` on every rank; then every rank has every JSON-able result, or all raise alike.

    Comm:    one gather of small JSON over the axis, on the device its backend talks from
    Raises:  CheckpointError that names the ranks that failed and why
    """
    value, failure, cause = None, None, None
    try:
        value = action()
    except Exception as error:  # whatever it was, the other ranks are waiting to hear of it
        failure, cause = explain_failure(error, root), error
    outcomes = gather_json([value, failure], axis, device)
    failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
    if not failures:
        return [value for value, _ in outcomes]
    rank, text = next(iter(failures.items()))
    where = f"rank {rank}: " if axis.size > 1 else ""
    more = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    raise CheckpointError(f"{where}{text}{more}") from cause


def explain_failure(error: Exception, root: Path) -> str:
    """One line: what went wrong, where, what would help."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, ValidationError):
        return explain(error)
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    code = errno.errorcode.get(error.errno or 0, "")
    place = f" at {error.filename}" if error.filename else ""
    there = next((folder for folder in (root, *root.parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    remedy = _REMEDIES.get(error.errno or 0, "check the storage")
    return f"{error.strerror} ({code}){place}, {free:,} bytes free; {remedy}"
