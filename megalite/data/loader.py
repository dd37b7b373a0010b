"""Samples to batches. A batch is a pure function of (seed, global sample indices), nothing else.

    position ─ skips ─→ global sample index ─ blend ─→ source, n-th sample of it
        ─ order ─→ sample of the source ─ packing ─→ tokens of its documents ─→ a row of a Batch

Nothing is remembered between batches, so a run can continue at any position, on any number of
ranks, with any micro-batch size, and sees the samples it would have seen. What a checkpoint keeps of
the loader are the few numbers that let the mixture of sources be changed on the way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.config import DataConfig
from megalite.data.batch import Allocate, Batch, Replacement, Rows
from megalite.data.best_fit import BestFit, Chunks, Table
from megalite.data.order import Order, order_key, permute
from megalite.data.packing import Concat, Packing
from megalite.data.readahead import ReadAhead
from megalite.data.schedule import Blend, SeqLens, Skips, build_phases, first_sample
from megalite.data.shards import CorruptBlockError, Dataset
from megalite.errors import ConfigError, DataError

ATTEMPTS = 64  # samples tried in place of one that cannot be read
PLANNED = 512  # samples whose places are worked out together, for that costs little more than one
MAX_HINTED = 1024  # record batches remembered as already asked for

Ints = NDArray[np.int64]


class Share(NamedTuple):
    """A rank's part of every step: rank r takes the r-th of `world` equal runs of its samples."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world: int = 1

    @property
    def samples(self) -> int:
        """How many samples of a step are the rank's."""
        return self.global_batch_size // self.world

    def check(self) -> None:
        """The sizes must divide.

        Raises:  ConfigError
        """
        whole, micro, _, world = self
        if whole % (world * micro):
            raise ConfigError(
                f"train.global_batch_size={whole} is not a multiple of train.micro_batch_size={micro} × "
                f"{world} processes"
            )


class _Step(NamedTuple):
    """A rank's samples of one step, int64 [micro-batches, micro] each, and the length of their rows."""

    ids: Ints
    sources: Ints
    samples: Ints
    row_len: int


def open_datasets(paths: Iterable[str]) -> list[Dataset]:
    """Open the dataset of every source.

    Raises:  DataError if one cannot be opened
    """
    return [Dataset(path) for path in paths]


def check_same_tokenizer(datasets: Sequence[Dataset]) -> None:
    """Training and validation must speak of the same ids.

    Raises:  DataError naming two folders and their fingerprints
    """
    for other in datasets[1:]:
        first = datasets[0]
        if other.tokenizer != first.tokenizer:
            raise DataError(
                f"{first.path} and {other.path} come from different tokenizers: fingerprints "
                f"{first.tokenizer.fingerprint[:16]}… and {other.tokenizer.fingerprint[:16]}…; rebuild one "
                "with the other's tokenizer.json"
            )


class DataLoader:
    """Batches from weighted datasets, one for each of `config.sources`.

    `tables` are the datasets' packing tables, which best-fit packing counts anew where they are not
    given. `allocate` makes the arrays a batch is delivered in.

    Raises:  DataError if a source has no whole sample or the tokenizers differ; ConfigError if there
             are no sources or a weight is unusable
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        datasets: Sequence[Dataset],
        tables: Sequence[Table] = (),
        allocate: Allocate = np.empty,
    ) -> None:
        self.config, self.datasets = config, list(datasets)
        self.seq_len = config.seq_len
        self.allocate = allocate
        self._dtype = self.datasets[0].manifest.dtype if self.datasets else np.dtype(np.uint16)
        self._seed = seed
        check_same_tokenizer(self.datasets)
        digests = [dataset.manifest.digest for dataset in self.datasets]
        # A name says which data a source is, wherever it lies and whichever others there are.
        self.names = [f"{digest}.{digests[:n].count(digest)}" for n, digest in enumerate(digests)]
        self._tables: list[tuple[Chunks, Table]] = []
        self.packings = self._build_packings(tables)
        self._orders = [
            Order(packing.layout, seed, name, config.shuffle)
            for packing, name in zip(self.packings, self.names, strict=True)
        ]
        self._seq_lens = SeqLens(
            self.seq_len, [(first_sample(c.tokens, self.seq_len), c.seq_len) for c in config.seq_len_schedule]
        )
        self._phases = build_phases(config, [dataset.total_tokens for dataset in self.datasets])
        self._limits = [
            None if source.max_epochs is None else int(source.max_epochs * samples)
            for source, samples in zip(config.sources, self.samples, strict=True)
        ]
        self.bad_blocks: dict[tuple[str, int], str] = {}  # (file, record batch) → what is wrong with it
        self.quarantine([Replacement(-1, *bad) for _, table in self._tables for bad in table.damaged])
        self._gone: dict[str, int] = {}  # cursors of sources that a run has had and no longer has
        self._hinted: list[set[int]] = [set() for _ in self.datasets]
        self.skips = Skips()
        self.blend = Blend(self._phases, self._limits)

    @property
    def samples(self) -> list[int]:
        """Samples of each source."""
        return [packing.layout.num_samples for packing in self.packings]

    @property
    def num_blocks(self) -> int:
        """Record batches in all sources."""
        return sum(dataset.num_blocks for dataset in self.datasets)

    def summary(self) -> list[dict[str, Any]]:
        """What packing makes of each source, as JSON can hold it: counts, and the share of padding."""
        found = []
        for n, dataset in enumerate(self.datasets):
            samples, documents, tokens = self.samples[n], dataset.num_documents, dataset.total_tokens
            entry = {"path": str(dataset.path), "documents": documents, "tokens": tokens, "samples": samples}
            if self._tables:
                _, _, cut, packed = self._tables[n][1].counts.sum(axis=0).tolist()
                padding = round(1 - packed / (samples * self.seq_len), 6)
                entry |= {"documents_cut": cut, "padding": padding}
            found.append(entry)
        return found

    def check_vocab(self, vocab_size: int) -> None:
        """A model must have a row for every id the data can hold.

        Raises:  DataError naming both sizes
        """
        largest = max(self.datasets, key=lambda dataset: dataset.vocab_size)
        if largest.vocab_size > vocab_size:
            raise DataError(
                f"{largest.path} was made with a vocabulary of {largest.vocab_size}, but "
                f"model.vocab_size={vocab_size}; set it to at least {largest.vocab_size}"
            )

    # --- state ----------------------------------------------------------------------------------

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint taken after `position` samples keeps of the loader, as JSON can hold it."""
        index = self.skips.index_at(position)
        return {
            "order": self._order_settings(),
            "mixture": self._mixture_digest(),
            "origin": self.blend.origin,
            "origin_cursors": self._by_name(self.blend.cursors(self.blend.origin)),
            "cursors": self._by_name(self.blend.cursors(index)),
            "skipped": self.skips.ranges,
            "bad_blocks": [[*place, reason] for place, reason in self.bad_blocks.items()],
        }

    def restore(self, state: dict[str, Any] | None, position: int) -> bool:
        """Continue at `position` where the loader with this `state` stood, which is None before the first
        sample; whether the mixture is another.

        With the mixture it was saved with, the run draws what it would have drawn. With another one it
        begins that here, and every source, be there more or fewer of them, goes on at its cursor.

        Raises:  ConfigError if the settings that number a source's samples are others
        """
        if state is None:
            self._gone, self.blend = {}, Blend(self._phases, self._limits)
            return False
        for key, value in self._order_settings().items():
            if (old := state["order"][key]) != value:
                raise ConfigError(
                    f"{key}={value!r}, but this run has read its first {position} samples with {old!r}, and "
                    "another order would repeat some and lose others; keep it, or use another run_dir"
                )
        self.skip(state["skipped"])
        self.bad_blocks |= {(file, batch): reason for file, batch, reason in state["bad_blocks"]}
        is_changed: bool = state["mixture"] != self._mixture_digest()
        # Where it stood: what has been left out since then, a restart learns only after this.
        origin = Skips(state["skipped"]).index_at(position) if is_changed else state["origin"]
        cursors = state["cursors"] if is_changed else state["origin_cursors"]
        self._gone = {name: cursor for name, cursor in cursors.items() if name not in self.names}
        begun = [int(cursors.get(name, 0)) for name in self.names]
        self.blend = Blend(self._phases, self._limits, origin, begun)
        return is_changed

    def skip(self, ranges: Iterable[Sequence[int]]) -> None:
        """Leave out these half-open ranges of global sample indices too; what is before them stays.

        Raises:  ConfigError on a range that is empty or negative
        """
        self.skips = Skips([*self.skips.ranges, *((start, stop) for start, stop in ranges)])

    def check_length(self, positions: int) -> None:
        """A run that consumes so many samples must not run out of data.

        Raises:  DataError if `max_epochs` of all sources allow fewer
        """
        self.blend.check(self.skips.index_at(positions - 1))

    def quarantine(self, found: Iterable[Replacement]) -> None:
        """Count the record batches that these samples lie in as damaged. All ranks must be told alike.

        Raises:  DataError, on every rank, when more than `max_bad_blocks` of all record batches are
        """
        for _, file, batch, reason in found:
            self.bad_blocks[file, batch] = reason
            if len(self.bad_blocks) > self.config.max_bad_blocks * self.num_blocks:
                error = DataError(
                    f"{file}: record batch {batch} {reason}; {len(self.bad_blocks)} of {self.num_blocks} are "
                    f"damaged, data.max_bad_blocks={self.config.max_bad_blocks} allows fewer: restore the "
                    "file or rebuild the dataset"
                )
                error.is_shared = True
                raise error

    def save_tables(self, folder: Path) -> None:
        """Keep the packing tables, if there are any, for the next start.

        Raises:  OSError
        """
        for chunks, table in self._tables:
            table.save(folder, chunks)

    # --- reading --------------------------------------------------------------------------------

    def regime(self, position: int) -> tuple[int, int, int]:
        """What the loss of the step that begins at `position` depends on beside the weights: the tokens a
        row, how many of the mixture's phases have begun, and where the run began with this mixture."""
        index = self.skips.index_at(position)
        row_len = int(self._seq_lens.at(np.array([index]))[0])
        return row_len, sum(phase.start <= index for phase in self._phases), self.blend.origin

    def locate(self, sample_ids: Ints) -> tuple[Ints, Ints]:
        """Source and sample number within it of each global sample index; int64 [n] each.

        Raises:  DataError past the end of all sources
        """
        source, nth = self.blend.locate(sample_ids)
        sample = np.empty_like(nth)
        for s in sorted(set(source.tolist())):
            mine = source == s
            sample[mine] = self._orders[s].sample(nth[mine])
        return source, sample

    def batch(self, sample_ids: Sequence[int] | Ints) -> Batch:
        """The samples with these global indices, one a row, in this order.

        Raises:  DataError if one cannot be read and none is found in its place
        """
        ids = np.array(sample_ids, dtype=np.int64)
        return self._gather(ids, *self.locate(ids), row_len=self.seq_len)

    def micro_batches(self, position: int, share: Share) -> list[Batch]:
        """One rank's part of the step that begins after `position` consumed samples.

        The step holds `global_batch_size` samples. All ranks together see the same for any world.

        Raises:  ConfigError if the sizes do not divide; DataError as `batch` does
        """
        share.check()
        return self._read(*self._plan(position, share, 1)[0])

    def steps(self, position: int, share: Share, prefetch: int = 2) -> ReadAhead[list[Batch]]:
        """The run of steps from `position` on, `prefetch` of them read ahead by one thread. It has no end but
        that of the data, a DataError.

        Raises:  ConfigError if the sizes do not divide
        """
        share.check()
        return ReadAhead(self._steps(position, share), prefetch)

    def _steps(self, position: int, share: Share) -> Iterator[list[Batch]]:
        plan = self._plan(position, share, 1)  # little, for the first batch is waited for
        while True:
            position += len(plan) * share.global_batch_size
            yield self._read(*plan[0])
            ahead = None
            if not self._is_past(position, share):
                ahead = self._plan(position, share, max(1, PLANNED // share.samples))
                self._hint(ahead)
            for step in plan[1:]:
                yield self._read(*step)
            plan = ahead or self._plan(position, share, 1)  # which says that the data has ended

    def _is_past(self, position: int, share: Share) -> bool:
        """Whether the step at `position` has samples that no source can give."""
        end = self.blend.end
        return end is not None and self.skips.index_at(position + share.global_batch_size - 1) >= end

    def _plan(self, position: int, share: Share, steps: int) -> list[_Step]:
        """Where the samples of the next steps are: all of these that the data lasts for.

        Raises:  DataError if it does not last for the first
        """
        whole, micro, rank, _ = share
        while steps > 1 and self._is_past(position + (steps - 1) * whole, share):
            steps -= 1
        begins = np.arange(position, position + steps * whole, whole, dtype=np.int64)
        mine = np.arange(share.samples, dtype=np.int64) + rank * share.samples
        ids = self.skips.index((begins[:, None] + mine).ravel())
        self.blend.check(self.skips.index_at(position + whole - 1))
        parts = [array.reshape(steps, -1, micro) for array in (ids, *self.locate(ids))]
        row_lens = self._seq_lens.at(self.skips.index(begins)).tolist()
        return [_Step(*step) for step in zip(*parts, row_lens, strict=True)]

    def _hint(self, plan: list[_Step]) -> None:
        """Let the datasets begin to read what the plan needs and no plan before it did."""
        sources = np.concatenate([step.sources.ravel() for step in plan])
        samples = np.concatenate([step.samples.ravel() for step in plan])
        for source, dataset in enumerate(self.datasets):
            hinted = self._hinted[source]
            needed = self.packings[source].blocks(samples[sources == source]).tolist()
            if fresh := [number for number in needed if number not in hinted]:
                dataset.prefetch(fresh)
            if len(hinted) > MAX_HINTED:
                hinted.clear()
            hinted.update(fresh)

    def _read(self, ids: Ints, sources: Ints, samples: Ints, row_len: int) -> list[Batch]:
        """The micro-batches of a step."""
        return [self._gather(*part, row_len=row_len) for part in zip(ids, sources, samples, strict=True)]

    def _gather(self, ids: Ints, sources: Ints, samples: Ints, *, row_len: int) -> Batch:
        rows = Rows(len(ids), self.seq_len, self._dtype, self.config.document_mask)
        replaced = []
        for row, (source, sample) in enumerate(zip(sources.tolist(), samples.tolist(), strict=True)):
            try:
                self.packings[source].fill(sample, rows, row)
            except CorruptBlockError as error:
                self._replace(source, sample, rows, row, error)
                replaced.append(Replacement(int(ids[row]), error.file, error.batch, error.reason))
        return rows.batch(ids, row_len, tuple(replaced), self.allocate)

    def _replace(self, source: int, sample: int, rows: Rows, row: int, error: CorruptBlockError) -> None:
        """Read another sample of the source, which one being a function of the sample: every rank, in every
        epoch, finds the same.

        Raises:  CorruptBlockError if none of `ATTEMPTS` can be read, or none is to be
        """
        if not self.config.max_bad_blocks:
            raise error
        for attempt in range(ATTEMPTS):
            key = order_key(self._seed, attempt, self.names[source], "replacement")
            try:
                other = int(permute(sample, self.samples[source], key))
                return self.packings[source].fill(other, rows, row)
            except CorruptBlockError:
                continue
        raise error

    # --- construction ---------------------------------------------------------------------------

    def _build_packings(self, tables: Sequence[Table]) -> list[Packing]:
        config = self.config
        if config.packing == "concat":
            return [Concat(dataset, self.seq_len, config.shuffle_chunks) for dataset in self.datasets]
        chunks = [Chunks(dataset, self.seq_len) for dataset in self.datasets]
        found = tables or [Table.build(each) for each in chunks]
        self._tables = list(zip(chunks, found, strict=True))
        return [BestFit(*each, config.shuffle_chunks) for each in self._tables]

    def _order_settings(self) -> dict[str, Any]:
        """What numbers the samples of a source, by the key that sets it."""
        config = self.config
        return {
            "seed": self._seed,
            "data.seq_len": config.seq_len,
            "data.packing": config.packing,
            "data.shuffle": config.shuffle,
            "data.shuffle_chunks": config.shuffle_chunks,
        }

    def _mixture_digest(self) -> str:
        content = json.dumps([self.names, self.samples, self._limits, self._phases])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def _by_name(self, cursors: Sequence[int]) -> dict[str, int]:
        return self._gone | dict(zip(self.names, cursors, strict=True))
