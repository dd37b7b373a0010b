"""Exit codes, left where launch/supervise.py reads them."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress


def record_exit(code: int) -> None:
    """Append the exit code of a failure to the file that launch/supervise.py names.

    torchrun exits with 1 whatever its processes' codes were, and pdsh with the largest of several.
    """
    path = os.environ.get("MEGALITE_EXIT_FILE")
    if code == 0 or not path:
        return
    record = {"rank": os.environ.get("RANK", "0"), "host": socket.gethostname(), "code": code}
    with suppress(OSError):  # a full disk must not change how the run ends
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, json.dumps(record).encode() + b"\n")  # one write, so that ranks do not mix
        os.close(file)
