"""Encode many texts by the compiled loops: pre-tokens, the table of those met before, merges on a miss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.bpe import Encoded
from data_tools.bpe.classes import engine_classes
from data_tools.bpe.merges import build_merges, merge
from data_tools.bpe.model import Model
from data_tools.bpe.pretokens import split
from data_tools.bpe.table import MAX_KEY_BYTES, PADDING, Table, empty_table, find, key_words, put, signed
from data_tools.compiled import compiled
from data_tools.documents import Texts

CHUNK_BYTES = 1 << 20  # what is worked on stays in the processor's cache
TABLE_SLOTS = 1 << 20  # 32 MiB, and as much again for long keys and ids


class BpeEncoder:
    """A byte-level BPE at work. One thread at a time; remembers pre-tokens in bounded memory."""

    def __init__(self, model: Model, end_id: int, slots: int = TABLE_SLOTS) -> None:
        self._pattern, self._end_id = model.pattern, end_id
        self._classes = engine_classes()
        self._merges = build_merges(model.byte_ids, model.rules)
        self._met = empty_table(slots, 16 * slots, 4 * slots)
        self._words, self._longest_word = _word_table(model.words), max(map(len, model.words), default=0)
        self._links, self._heap, self._found = _work_space(MAX_KEY_BYTES)
        self.widest = np.zeros(0, np.int64)

    def encode(self, texts: Texts) -> Encoded:
        """The ids of every text. Then `widest` int64 [texts] is the bytes of each one's longest pre-token."""
        parts = [np.zeros(0, np.int32)]
        rows = len(texts.offsets) - 1
        bounds, self.widest = np.zeros(rows + 1, np.int64), np.zeros(rows, np.int64)
        start = 0
        while start < rows:
            limit = texts.offsets[start] + CHUNK_BYTES
            stop = max(start + 1, int(np.searchsorted(texts.offsets, limit, side="right")) - 1)
            ids, ends, self.widest[start:stop] = self._encode_chunk(
                texts.data, texts.offsets[start : stop + 1]
            )
            parts.append(ids)
            bounds[start + 1 : stop + 1] = bounds[start] + ends
            start = stop
        return Encoded(np.concatenate(parts), bounds)

    def _encode_chunk(
        self, data: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        base, size = int(offsets[0]), int(offsets[-1] - offsets[0])
        padded = np.zeros(size + PADDING, np.uint8)
        padded[:size] = data[base : base + size]
        ends = np.empty(size, np.int32)
        counts, widest = np.empty((2, len(offsets) - 1), np.int64)
        split(self._pattern, padded, offsets - base, self._classes, ends, counts, widest)
        if (longest := int(widest.max(initial=0))) > self._found.size:
            self._links, self._heap, self._found = _work_space(longest)
        ids = np.empty(size + len(counts), np.int32)
        total = _encode(
            padded,
            ends,
            counts,
            self._end_id,
            *self._met,
            *self._words[:2],
            self._longest_word,
            *self._merges,
            self._links,
            self._heap,
            self._found,
            ids,
        )
        return ids[:total].copy(), counts, widest


def _work_space(size: int) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.int32]]:
    """For merges in a pre-token of so many bytes."""
    return np.zeros((2, size), np.int32), np.zeros(3 * size, np.uint64), np.zeros(size, np.int32)


def _word_table(words: dict[bytes, int]) -> Table:
    data = np.frombuffer(b"".join(words) + bytes(PADDING), dtype=np.uint8).copy()
    sizes = np.array([len(word) for word in words], dtype=np.int64)
    table = empty_table(4 << len(words).bit_length(), int(sizes.sum()), 1)
    _enter_words(*table, data, sizes, np.array(list(words.values()), dtype=np.int32))
    return table


@compiled
def _enter_words(
    slots: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    ids: NDArray[np.int32],
    used: NDArray[np.int64],
    data: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    numbers: NDArray[np.int32],
) -> None:
    start = signed(0)
    for i in range(sizes.size):
        first, second = key_words(data, start, sizes[i])
        put(slots, arena, ids, used, data, start, sizes[i], first, second, numbers[i : i + 1], signed(1))
        start += sizes[i]


@compiled
def _encode(
    data: NDArray[np.uint8],
    ends: NDArray[np.int32],
    counts: NDArray[np.int64],
    end_id: int,
    slots: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    known: NDArray[np.int32],
    used: NDArray[np.int64],
    word_slots: NDArray[np.uint64],
    word_arena: NDArray[np.uint8],
    longest_word: int,
    byte_ids: NDArray[np.int32],
    pairs: NDArray[np.uint64],
    links: NDArray[np.int32],
    heap: NDArray[np.uint64],
    found: NDArray[np.int32],
    ids: NDArray[np.int32],
) -> int:
    """Write the ids of pre-tokens, return how many. `counts` [documents], how many pre-tokens end in and
    before each document, becomes how many ids."""
    total = signed(0)
    number = signed(0)
    start = signed(0)
    for document in range(counts.size):
        while number < counts[document]:
            size = signed(ends[number]) - start
            number += 1
            first, second = key_words(data, start, min(size, MAX_KEY_BYTES))
            if size <= MAX_KEY_BYTES:
                place = find(slots, arena, data, start, size, first, second)
                if slots[place, 2]:
                    count = signed(slots[place, 3] & np.uint64(0xFFFF))
                    value = signed(slots[place, 3] >> np.uint64(16))
                    if count == 1:
                        ids[total] = value
                    else:
                        for i in range(count):
                            ids[total + i] = known[value + i]
                    total += count
                    start += size
                    continue
            count = signed(0)
            if size <= longest_word:
                count = _word(word_slots, word_arena, data, start, size, found)
            if not count:
                count = merge(data, start, size, byte_ids, pairs, links, heap, found)
            if size <= MAX_KEY_BYTES:
                put(slots, arena, known, used, data, start, size, first, second, found, count)
            for i in range(count):
                ids[total + i] = found[i]
            total += count
            start += size
        ids[total] = end_id
        total += 1
        counts[document] = total
    return total


@compiled
def _word(
    slots: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    data: NDArray[np.uint8],
    start: int,
    size: int,
    found: NDArray[np.int32],
) -> int:
    """Write the id of a pre-token that has one of its own; how many that are."""
    first, second = key_words(data, start, size)
    place = find(slots, arena, data, start, size, first, second)
    if not slots[place, 2]:
        return 0
    found[0] = np.int32(slots[place, 3] >> np.uint64(16))
    return 1
