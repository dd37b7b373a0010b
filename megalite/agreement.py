"""What every rank does before a run begins, and what ends it on all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from megalite.config import Config
from megalite.config_file import changed_keys
from megalite.data.loader import DataLoader
from megalite.errors import BusyError, ConfigError, DataError
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Mesh
from megalite.version import code_version

T = TypeVar("T")
_SHARED = {kind.__name__: kind for kind in (BusyError, ConfigError, DataError)}


def together(action: Callable[[], T], mesh: Mesh) -> T:
    """What `action` returns, once it has succeeded on every rank; else the first failure, on all.

    `action` communicates with nobody, for a rank that fails in it comes here at once.

    Raises:  BusyError, ConfigError, DataError, marked as shared
    """
    failure = None
    try:
        result = action()
    except tuple(_SHARED.values()) as error:
        failure = [type(error).__name__, str(error)]
    for found in gather_json(failure, mesh.world, mesh.device):
        if found is not None:
            shared = _SHARED[found[0]](found[1])
            shared.is_shared = True
            raise shared
    return result


def agree_on_config(config: Config, mesh: Mesh) -> None:
    """Every rank must have been given the same configuration, and run the same code.

    Raises:  ConfigError, on every rank, naming what differs first
    """
    mine = {"megalite": code_version(), "config": config.model_dump(mode="json")}
    everyone = gather_json(mine, mesh.world, mesh.device)
    first = everyone[0]
    for rank, other in enumerate(everyone[1:], 1):
        if other["megalite"] != first["megalite"]:
            raise ConfigError(
                f"rank 0 runs megalite {first['megalite']} but rank {rank} {other['megalite']}; install "
                "the same code on every host"
            )
        for key, (here, there) in changed_keys(first["config"], other["config"]).items():
            raise ConfigError(f"{key}={here!r} on rank 0 but {there!r} on rank {rank}; use one config")


def agree_on_data(loaders: Iterable[DataLoader], mesh: Mesh) -> None:
    """Every rank must see the same datasets, whatever its host keeps under these paths.

    Raises:  DataError, on every rank, naming the first dataset that differs
    """
    datasets = [dataset for loader in loaders for dataset in loader.datasets]
    everyone = gather_json([dataset.manifest.digest for dataset in datasets], mesh.world, mesh.device)
    for rank, others in enumerate(everyone[1:], 1):
        for dataset, here, there in zip(datasets, everyone[0], others, strict=True):
            if here != there:
                error = DataError(
                    f"{dataset.path} has manifest {here} on rank 0 but {there} on rank {rank}; copy one "
                    "dataset to every host, or put it on shared storage"
                )
                error.is_shared = True
                raise error
