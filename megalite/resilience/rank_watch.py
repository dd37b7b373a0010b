"""What the ranks of a run are watched for: hangs, slowness, weights that differ."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from megalite.config import Config
from megalite.engines.engine import Engine
from megalite.errors import ReplicaError
from megalite.log import RunLog
from megalite.parallel.flight import flight_log
from megalite.parallel.mesh import Mesh
from megalite.resilience import replicas
from megalite.resilience.stragglers import WINDOWS, Stragglers
from megalite.resilience.watchdog import Watchdog


class RankWatch:
    """Within this context each step is done in a `step()`, and each save after `check_replicas`.

    Raises:  HangError in place of the error of a lost peer; ReplicaError
    """

    def __init__(self, config: Config, mesh: Mesh, engine: Engine, log: RunLog) -> None:
        self.config, self.mesh, self.engine, self.log = config.resilience, mesh, engine, log
        self.watchdog = Watchdog(Path(config.run_dir), mesh, config.resilience.hang_timeout_s)
        self.stragglers = Stragglers(config.resilience.straggler_every_steps, mesh)
        self._checked_step = -1
        if mesh.device.type == "cuda":
            flight_log.time_device()

    def __enter__(self) -> Self:
        self.watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.__exit__(kind, error, trace)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step, from waiting for its data to the weights' update.

        Comm:    now and then what `Stragglers.add` and `check_replicas` need
        """
        self._checked_step = -1
        flight_log.take_waited_s()
        began = time.monotonic()
        with self.watchdog.step(number):
            yield
        for slow in self.stragglers.add(time.monotonic() - began - flight_log.take_waited_s()):
            host = self.watchdog.roster[slow.rank]["host"]
            self.log.event(
                "straggler", number, rank=slow.rank, host=host, own_s=slow.own_s, others_s=slow.others_s
            )
            self.log.say(
                f"rank {slow.rank} on {host} holds the others up: for {WINDOWS * self.stragglers.window} "
                f"steps {slow.own_s:.3f} s each, theirs {slow.others_s:.3f} s ({slow.factor:.2f} times)"
            )
        every = self.config.digest_every_steps
        if every and number % every == 0:
            self.check_replicas(number)

    def check_replicas(self, step: int) -> None:
        """Compare the weights that several ranks hold, once a step.

        Raises:  ReplicaError, on every rank
        """
        if self.mesh.size == 1 or step == self._checked_step:
            return
        try:
            replicas.check_replicas(self.engine.replicas(), self.mesh)
        except ReplicaError as error:
            self.log.event("replicas_differ", step, error=str(error))
            raise
        self._checked_step = step
