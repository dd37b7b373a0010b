"""Which engine computes a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalite.config import Config
from megalite.engines.engine import Engine
from megalite.engines.native import NativeEngine
from megalite.parallel.mesh import Mesh


def engine_class(config: Config, device: torch.device) -> Callable[[Config, Mesh], Engine]:
    """The engine that `mesh.zero_engine` names.

    Raises:  ConfigError if it is DeepSpeed's, which is not installed or cannot compute in this precision
    """
    if config.mesh.zero_engine == "native":
        return NativeEngine
    from megalite.engines import deepspeed  # imported when asked for: it takes seconds

    deepspeed.load(device, config.train.precision)
    return deepspeed.DeepSpeedEngine
