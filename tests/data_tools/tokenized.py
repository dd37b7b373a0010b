"""Tokenized corpora as the tokenization leaves them, for the tests of what mixes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_tools.crew import Crew
from data_tools.flow import Flow
from data_tools.step import Step
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter
from tests.data_tools.corpora import Nothing


def write_tokenized(folder: Path, groups: Mapping[str, tuple[int, int]], document: int = 40) -> Path:
    """A finished step with datasets of so many (training, held-out) tokens by group; 0 held-out: none.

    Documents have `document` tokens; each is the one before, or noise in groups that are named so.
    """
    rng = np.random.default_rng(0)
    tokenizer = ByteTokenizer()
    with Crew(folder, workers=1) as crew:
        step = Step(folder, "test", 1, Nothing(), [], crew)
        for group, sizes in groups.items():
            for split, size in zip(("train", "valid"), sizes, strict=True):
                if not size:
                    continue
                with ShardWriter(folder / "data" / group / split, tokenizer) as writer:
                    for n, start in enumerate(range(0, size, document)):
                        length = min(document, size - start)
                        ids = rng.integers(0, 256, length)
                        if "noise" not in group:
                            ids = (ids[0] + np.arange(length) * 3) % 64
                        writer.write(
                            f"{split}-{n}", group.split(".q")[0], np.append(ids[:-1], tokenizer.eos_id)
                        )
        step.finish([Flow()])
    return folder
