"""An iterator read ahead by a thread. Worker processes would have to copy what they read; numpy's copies
let go of the interpreter lock, so one thread beside the training step is enough."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The items of an iterator, up to `ahead` of them taken before they are asked for; only one until that
    is asked for, since whoever waits for the first should not wait for the interpreter, too. Close it, or
    use `with`. With `ahead` 0 there is no thread.

    `wait_s` is the time its consumer has spent waiting.

    Raises:  whatever the iterator raised, once the items before it are consumed
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self.wait_s = 0.0
        self._items = items
        self._ahead = ahead
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._begun = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if ahead:
            # A daemon, so that a consumer that dies without closing does not keep the process alive.
            self._thread = threading.Thread(target=self._read_ahead, name="megalite-data", daemon=True)
            self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return self._read() if self._thread is None else self._take()
        finally:
            self.wait_s += time.perf_counter() - began

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end. May be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> T:
        if self._closed:
            raise StopIteration
        if self._error is not None:
            raise self._error
        try:
            return next(self._items)
        except BaseException as error:
            self._error = error
            raise

    def _take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._ready:
                self._begun = True
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _has_room(self) -> bool:
        return self._closed or len(self._ready) < (self._ahead if self._begun else 1)

    def _read_ahead(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_room)
                    if self._closed:
                        return
                item = next(self._items)
                with self._changed:
                    if not self._closed:
                        self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
