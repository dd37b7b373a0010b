"""What stays out of compiled graphs: communication, since no compiler should decide when a transfer
starts and when it is waited for.

`torch.compiler.disable` says so to torch, but imports its compiler, which takes a second and an eighth of a
gigabyte. So it is put off until something is to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_calls: list[list[Callable[..., Any]]] = []  # of each function, what is called for it


def uncompiled(function: Function) -> Function:
    """The function, run as it is also where compiled code calls it, once `prepare_to_compile` was called."""
    call: list[Callable[..., Any]] = [function]
    _calls.append(call)

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call[0](*args, **kwargs)

    return cast(Function, wrapper)


def prepare_to_compile() -> None:
    """To be called before torch.compile is, where a model is divided."""
    for call in _calls:
        call[0] = torch.compiler.disable(call[0])  # type: ignore[no-untyped-call]
    _calls.clear()
