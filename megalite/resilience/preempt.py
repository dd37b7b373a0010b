"""Being asked to stop: the signal only leaves a mark, the trainer acts on it between two steps.

One rank may hear a signal seconds before another (the deepspeed launcher signals its ranks one after
another), so no rank saves on its own mark: the trainer agrees on it in the step's all-reduce, all save
together, and the process exits with `PreemptedError.exit_code`.

A launcher that dies tells its ranks nothing (`deepspeed` on any signal, torchrun on SIGKILL or SIGUSR1), and
they would train on with nobody to stop them. To be without a launcher is to be asked to stop.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from megalite.errors import PreemptedError

_ORPHAN_CHECK_S = 0.5  # between looks at whether the launcher still lives
_REPEAT_S = 1.0  # launchers pass the terminal's Ctrl-C on, so one key press arrives twice at once


class PreemptionFlag:
    """Within this context SIGTERM, SIGUSR1 and the first Ctrl-C only set `requested`.

    A second Ctrl-C, a second or more after the first, ends the process at once (checkpoints bear that).
    Once it is left with a `PreemptedError` they are ignored: the process is on its way out with the
    save behind it, and a launcher that signals this rank only now must not turn its 75 into a -15.
    Enter it on the main thread, as Python demands of whoever handles signals.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.cause = ""  # name of the first signal heard, or what became of the launcher
        self._is_heard = False
        self._launchers = launchers()
        self._looked_at = 0.0
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        now = time.monotonic()
        if not self._is_heard and self._launchers and now - self._looked_at > _ORPHAN_CHECK_S:
            self._looked_at = now
            if any(parent_of(child) != parent for child, parent in self._launchers):
                self.cause, self._is_heard = "launcher gone", True
        return self._is_heard

    def __enter__(self) -> Self:
        """Install the handlers, keeping the previous ones."""
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the previous handlers back, or ignore the signals after a preemption."""
        for number, handler in self._previous.items():
            if isinstance(error, PreemptedError):
                # Not our own handler: the interpreter takes Python handlers down before it is gone.
                handler = signal.SIG_IGN
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at >= _REPEAT_S:
                # Not KeyboardInterrupt: unwinding could wait for peers that are gone.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            elif self._interrupted_at is None:
                self._interrupted_at = now
        self.cause = self.cause or signal.Signals(number).name
        self._is_heard = True


def launchers() -> list[tuple[int, int]]:
    """(child, parent) for each link from this process up to the launcher's top, as it is now.

    deepspeed has a helper on each host between its command, or the ssh session of it, and the ranks. A
    process that a person or a batch system started has none: it may outlive whoever did.
    """
    me, parent = os.getpid(), os.getppid()
    words = b""
    with suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_bytes()
    if b"deepspeed.launcher.launch" in words:
        return [(me, parent), (parent, parent_of(parent))]
    return [(me, parent)] if "TORCHELASTIC_RUN_ID" in os.environ else []


def parent_of(pid: int) -> int:
    """The parent of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
