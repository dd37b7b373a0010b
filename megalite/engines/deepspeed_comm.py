"""DeepSpeed's collectives, noted in our flight log. It calls torch's through a backend object of its own.

Those of several tensors at once (`…_coalesced`) and barriers are not.

Written against deepspeed 0.19.8: `comm/torch.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megalite.parallel.collectives import peer_errors
from megalite.parallel.flight import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    REDUCE,
    REDUCE_SCATTER,
    Place,
    flight_log,
)

_OPS = {
    "all_reduce": ALL_REDUCE,
    "reduce": REDUCE,
    "reduce_scatter_tensor": REDUCE_SCATTER,
    "all_gather": ALL_GATHER,
    "all_gather_into_tensor": ALL_GATHER,
    "broadcast": BROADCAST,
}


def note_collectives(library: Any) -> None:
    """Have the collectives of an initialised deepspeed noted from now on; a second call changes nothing."""
    backend = library.comm.comm.cdb
    for name, op in _OPS.items():
        call = getattr(backend, name)
        if not hasattr(call, "is_noted"):
            setattr(backend, name, _noted(call, op))


def _noted(call: Callable[..., Any], op: int) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        group = options.get("group") or dist.group.WORLD
        tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        if group is None or group.size() == 1 or not tensors:
            return call(*args, **options)
        place = flight_log.begin(op, "deepspeed", group, max(tensors, key=lambda tensor: tensor.nbytes))
        if options.get("async_op"):
            return _Handle(call(*args, **options), place)
        return _awaited(place, call, *args, **options)

    noted.is_noted = True  # type: ignore[attr-defined]
    return noted


class _Handle:
    """A work handle of torch's, whose wait is noted."""

    def __init__(self, work: Any, place: Place) -> None:
        self._work, self._place = work, place

    def wait(self, *args: Any) -> Any:
        """See `torch.distributed.Work`.

        Raises:  PeerError
        """
        return _awaited(self._place, self._work.wait, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _awaited(place: Place, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    waiting = flight_log.await_(place)
    with peer_errors():
        result = call(*args, **options)
    flight_log.end(place, waiting)
    return result
