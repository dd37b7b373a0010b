"""Batches: right to the token, the same for any split among ranks, read ahead without surprises."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.loader import IGNORE, Batch, DataLoader, check_same_tokenizer, open_sources
from megalite.errors import ConfigError, DataError

from .datasets import WideTokenizer, random_documents, write


def naive_row(lengths: list[int], stream: np.ndarray, sample: int, seq: int, mask: bool):
    """A row token by token, as one would explain it."""
    document = [n for n, length in enumerate(lengths) for _ in range(length)]
    tokens, labels, positions, starts = [], [], [], []
    for place in range(seq):
        at = sample * seq + place
        first = next(p for p in range(place + 1) if not mask or document[sample * seq + p] == document[at])
        tokens.append(stream[at])
        labels.append(stream[at + 1] if not mask or document[at + 1] == document[at] else IGNORE)
        positions.append(place - first)
        starts.append(first)
    return tokens, labels, positions, starts


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50) | st.just(1), min_size=1, max_size=25),
    seq=st.integers(1, 24),
    mask=st.booleans(),
)
def test_rows_against_a_naive_reference(tmp_path_factory, lengths, seq, mask):
    lengths = [*lengths, seq + 1]
    documents = random_documents(lengths)
    dataset = write(tmp_path_factory.mktemp("x") / "d", documents, batch_tokens=37)
    stream = np.concatenate(documents)
    loader = DataLoader([(dataset, 1.0)], seq_len=seq, seed=0, document_mask=mask, shuffle=False)
    assert loader.samples == [(len(stream) - 1) // seq]
    batch = loader.batch(range(loader.samples[0]))
    for sample in range(loader.samples[0]):
        tokens, labels, positions, starts = naive_row(lengths, stream, sample, seq, mask)
        assert batch.tokens[sample].tolist() == tokens
        assert batch.labels[sample].tolist() == labels
        assert batch.positions[sample].tolist() == positions
        if mask:
            assert batch.doc_starts[sample].tolist() == starts
    assert (batch.doc_starts is None) == (not mask)
    assert [batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype] == [np.int64] * 3
    assert batch.doc_starts is None or batch.doc_starts.dtype == np.int32


@pytest.fixture
def loader(tmp_path):
    rng = np.random.default_rng(1)
    datasets = [
        write(tmp_path / name, random_documents(rng.integers(1, 60, 120), seed=n), batch_tokens=500)
        for n, name in enumerate("ab")
    ]
    return DataLoader([(datasets[0], 0.7), (datasets[1], 0.3)], seq_len=16, seed=3)


def joined(batches: list[Batch]) -> dict[str, np.ndarray]:
    return {f.name: np.concatenate([getattr(batch, f.name) for batch in batches]) for f in fields(Batch)}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("position", [0, 24, 24 * 1001])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(loader, world, position):
    expected = joined([loader.batch(range(position, position + 24))])
    for micro in [m for m in (1, 2, 3, 4, 6, 8, 12, 24) if 24 % (m * world) == 0]:
        ranks = [loader.micro_batches(position, 24, micro, rank, world) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {24 // world // micro}
        found = joined([batch for batches in ranks for batch in batches])
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_sizes_that_do_not_divide(loader):
    with pytest.raises(ConfigError, match=r"global_batch_size=24 .*micro_batch_size=5 × 1"):
        loader.micro_batches(0, 24, 5)


def test_every_epoch_delivers_every_sample_once_in_a_new_order(tmp_path):
    dataset = write(tmp_path / "d", random_documents([400, 300, 33]))
    loader = DataLoader([(dataset, 1.0)], seq_len=10, seed=3)
    n = loader.samples[0]
    epochs = [loader.locate(np.arange(e * n, (e + 1) * n))[1].tolist() for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(n))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != list(range(n))
    across = loader.locate(np.arange(n - 5, n + 5))[1].tolist()
    assert across == epochs[0][-5:] + epochs[1][:5]
    other = DataLoader([(dataset, 1.0)], seq_len=10, seed=4)
    assert other.locate(np.arange(n))[1].tolist() != epochs[0]
    plain = DataLoader([(dataset, 1.0)], seq_len=10, seed=3, shuffle=False)
    assert plain.locate(np.arange(2 * n))[1].tolist() == [*range(n), *range(n)]


def test_mixture_shares(loader):
    sources, _ = loader.locate(np.arange(1000))
    assert abs(np.bincount(sources) - [700, 300]).max() <= 1


def test_too_little_data_and_too_small_a_model(tmp_path):
    dataset = write(tmp_path / "d", random_documents([10]))
    assert DataLoader([(dataset, 1.0)], seq_len=9, seed=0).samples == [1]
    with pytest.raises(DataError, match=r"has 10 tokens, one sample of data\.seq_len=10 needs 11"):
        DataLoader([(dataset, 1.0)], seq_len=10, seed=0)
    loader = DataLoader([(dataset, 1.0)], seq_len=5, seed=0)
    loader.check_vocab(257)
    with pytest.raises(DataError, match=r"vocabulary of 257, but model\.vocab_size=256"):
        loader.check_vocab(256)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        DataLoader([], seq_len=5, seed=0)


def test_tokenizers_must_agree(tmp_path):
    class Other(WideTokenizer):
        content = '{"megalite":"byte","other":1}'

    a = write(tmp_path / "a", random_documents([10]))
    b = write(tmp_path / "b", random_documents([10]), tokenizer=Other())
    with pytest.raises(
        DataError, match=f"a and .*b come from different tokenizers.*{b.tokenizer.fingerprint[:16]}"
    ):
        check_same_tokenizer([a, a, b])
    with pytest.raises(DataError, match="different tokenizers"):
        DataLoader([(a, 1.0), (b, 1.0)], seq_len=5, seed=0)


def test_open_sources(tmp_path):
    @dataclass(frozen=True)
    class Source:
        path: str
        weight: float

    write(tmp_path / "a", random_documents([10]))
    ((dataset, weight),) = open_sources([Source(str(tmp_path / "a"), 2.0)])
    assert (dataset.total_tokens, weight) == (10, 2.0)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_steps_are_the_micro_batches_in_order(loader, prefetch):
    shape = {"global_batch_size": 8, "micro_batch_size": 2}
    with loader.steps(40, **shape, rank=1, world=2, prefetch=prefetch) as steps:
        for n in range(12):
            found = joined(next(steps))
            expected = joined(loader.micro_batches(40 + 8 * n, 8, 2, 1, 2))
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values)
        assert steps.wait_s > 0
    with pytest.raises(StopIteration):
        next(steps)


def test_reading_ahead_is_bounded_and_stops(loader):
    before = threading.active_count()
    calls = []
    read = loader.micro_batches
    loader.micro_batches = lambda *args: calls.append(args) or read(*args)  # type: ignore[method-assign]
    steps = loader.steps(0, global_batch_size=8, micro_batch_size=2, prefetch=3)
    deadline = time.monotonic() + 5
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(calls) == 3
    next(steps)
    steps.close()
    steps.close()
    assert threading.active_count() == before
    assert len(calls) <= 4


def test_an_error_arrives_after_the_steps_before_it(loader):
    read = loader.micro_batches

    def breaks(position, *args):
        if position == 16:
            raise DataError("batch 7 is corrupt")
        return read(position, *args)

    loader.micro_batches = breaks  # type: ignore[method-assign]
    with loader.steps(0, global_batch_size=8, micro_batch_size=2, prefetch=4) as steps:
        assert next(steps)[0].sample_ids[0] == 0
        assert next(steps)[0].sample_ids[0] == 8
        for _ in range(2):
            with pytest.raises(DataError, match="batch 7 is corrupt"):
                next(steps)


def test_closing_wakes_a_waiting_consumer(loader):
    release = threading.Event()
    read = loader.micro_batches
    loader.micro_batches = lambda *args: release.wait(10) and read(*args)  # type: ignore[method-assign]
    steps = loader.steps(0, global_batch_size=8, micro_batch_size=2, prefetch=1)
    ended = []
    consumer = threading.Thread(target=lambda: ended.append(next(steps, "end")))
    consumer.start()
    closer = threading.Thread(target=steps.close)
    closer.start()
    consumer.join(5)
    assert ended == ["end"]
    release.set()
    closer.join(5)
    assert not closer.is_alive()


def test_resuming_far_in_is_immediate(loader):
    loader.batch(range(8))
    began = time.perf_counter()
    loader.batch(range(10**12, 10**12 + 8))
    assert time.perf_counter() - began < 0.05
