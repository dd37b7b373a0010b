"""Being asked to stop: the signal only leaves a mark, the trainer acts on it between two steps.

One rank may hear a signal seconds before another (the deepspeed launcher signals its ranks one after
another), so no rank saves on its own mark: the trainer agrees on it in the step's all-reduce, all save
together, and the process exits with `PreemptedError.exit_code`.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

from megalite.errors import PreemptedError

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
        self.requested = False
        self.cause = ""  # name of the first signal heard
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

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
        self.requested = True
