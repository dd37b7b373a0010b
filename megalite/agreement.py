"""What every rank does before a run begins, and what ends it on all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megalite.errors import ConfigError, DataError
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Mesh

T = TypeVar("T")


def together(action: Callable[[], T], mesh: Mesh) -> T:
    """What `action` returns, once it has succeeded on every rank; else the first failure, on all.

    `action` communicates with nobody, for a rank that fails in it comes here at once.

    Raises:  ConfigError, DataError, marked as shared
    """
    failure = None
    try:
        result = action()
    except (ConfigError, DataError) as error:
        failure = [type(error).__name__, str(error)]
    for found in gather_json(failure, mesh.world, mesh.device):
        if found is not None:
            shared = {"ConfigError": ConfigError, "DataError": DataError}[found[0]](found[1])
            shared.is_shared = True
            raise shared
    return result
