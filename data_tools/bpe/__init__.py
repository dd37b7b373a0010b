"""Byte-level BPE, compiled: the ids a reference tokenizer gives, many times as fast."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Encoded(NamedTuple):
    """Ids of texts: text i's are `ids[bounds[i] : bounds[i + 1]]`, the end of a document last.

    Shapes:  ids int32 [tokens]; bounds int64 [texts + 1]
    """

    ids: NDArray[np.int32]
    bounds: NDArray[np.int64]
