"""Rows hold what the stream holds: each token once, documents apart, labels where there is one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.batch import IGNORE
from megalite.data.best_fit import Chunks, Table, pack
from megalite.data.loader import DataLoader, Share
from megalite.data.passages import passages
from megalite.errors import DataError

from .datasets import loader, random_documents, write

lengths_of_documents = st.lists(st.integers(1, 50) | st.just(1), min_size=1, max_size=25)


def naive_row(lengths, stream, sample, seq, mask):
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
@given(lengths=lengths_of_documents, seq=st.integers(1, 24), mask=st.booleans())
def test_rows_against_a_naive_reference(tmp_path_factory, lengths, seq, mask):
    lengths = [*lengths, seq + 1]
    documents = random_documents(lengths)
    dataset = write(tmp_path_factory.mktemp("x") / "d", documents, batch_tokens=37)
    stream = np.concatenate(documents)
    samples = (len(stream) - 1) // seq
    data = loader(dataset, seq, document_mask=mask, shuffle=False)
    assert data.samples == [samples]
    batch = data.batch(range(samples))
    for sample in range(samples):
        tokens, labels, positions, starts = naive_row(lengths, stream, sample, seq, mask)
        assert batch.tokens[sample].tolist() == tokens
        assert batch.labels[sample].tolist() == labels
        assert batch.positions[sample].tolist() == positions
        if mask:
            assert batch.doc_starts[sample].tolist() == starts
    assert (batch.doc_starts is None) == (not mask)
    edges = np.flatnonzero(np.append(batch.positions.ravel(), 0) == 0)
    assert batch.cu_seqlens.tolist() == edges.tolist()
    assert [batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype] == [np.int64] * 3
    assert batch.cu_seqlens.dtype == np.int32
    assert batch.doc_starts is None or batch.doc_starts.dtype == np.int32


@pytest.mark.parametrize("first", [16, 17, 18])
def test_a_document_that_begins_beside_a_rows_end(tmp_path, first):
    """Of sample 0 token 15 is the last, and 16 a label only; it crosses record batches, and is not followed
    by sample 1."""
    lengths = [9, first - 9, 20, 20]
    documents = random_documents(lengths)
    dataset = write(tmp_path / "d", documents, batch_tokens=9)
    batch = loader(dataset, 16, shuffle=False).batch([1, 0, 2])
    for row, sample in enumerate([1, 0, 2]):
        expected = naive_row(lengths, np.concatenate(documents), sample, 16, True)
        found = (batch.tokens, batch.labels, batch.positions, batch.doc_starts)
        assert [each[row].tolist() for each in found] == list(expected)


def test_the_last_label_counts_among_a_samples_record_batches(tmp_path):
    dataset = write(tmp_path / "d", random_documents([32] * 4), batch_tokens=32)
    packing = loader(dataset, 16).packings[0]
    assert packing.blocks(np.array([0])).tolist() == [0]
    assert packing.blocks(np.array([1])).tolist() == [0, 1]
    assert packing.pieces(1) == [(0, 16, 32)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=60), st.integers(1, 64))
def test_best_fit_cuts_only_what_is_too_long_and_loses_nothing(lengths, seq):
    bins = pack(np.array(lengths, dtype=np.int64), seq)
    assert bins.edges[0] == 0
    pieces = list(zip(bins.document.tolist(), bins.start.tolist(), bins.length.tolist(), strict=True))
    assert bins.edges[-1] == len(pieces)
    for first, last in pairwise(bins.edges.tolist()):
        assert 0 < sum(length for _, _, length in pieces[first:last]) <= seq
    covered = Counter((d, at) for d, start, length in pieces for at in range(start, start + length))
    assert covered == Counter((d, at) for d, length in enumerate(lengths) for at in range(length))
    parts = Counter(document for document, _, _ in pieces)
    assert all(parts[d] == -(-length // seq) for d, length in enumerate(lengths))
    # Two bins less than half full would have been one.
    used = [sum(length for _, _, length in pieces[a:b]) for a, b in pairwise(bins.edges.tolist())]
    assert sum(2 * tokens <= seq for tokens in used) <= 1


def test_best_fit_takes_the_tightest_gap():
    bins = pack(np.array([6, 5, 4, 3, 2]), 10)
    assert [bins.document[a:b].tolist() for a, b in pairwise(bins.edges)] == [[0, 2], [1, 3, 4]]
    bins = pack(np.array([3, 4, 7, 6]), 10)  # the longest first, or it would take three
    assert [bins.document[a:b].tolist() for a, b in pairwise(bins.edges)] == [[2, 0], [3, 1]]


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_documents, seq=st.integers(1, 24), mask=st.booleans())
def test_packed_rows_hold_whole_documents(tmp_path_factory, lengths, seq, mask):
    documents = random_documents(lengths)
    for n, document in enumerate(documents):
        document[:] = n  # so that a row tells which documents are in it
        document[-1] = 256
    dataset = write(tmp_path_factory.mktemp("x") / "d", documents, batch_tokens=60)
    data = loader(dataset, seq, document_mask=mask, shuffle=False, packing="best_fit")
    batch = data.batch(range(data.samples[0]))
    pieces = [d[at : at + seq].tolist() for d in documents for at in range(0, len(d), seq)]
    found = []
    rows, row_len = batch.tokens.shape
    edges = batch.cu_seqlens.tolist() if mask else []
    for start, stop in pairwise(edges):
        assert start // row_len == (stop - 1) // row_len
        tokens, labels = batch.tokens.ravel()[start:stop], batch.labels.ravel()[start:stop]
        assert batch.positions.ravel()[start:stop].tolist() == list(range(stop - start))
        assert set(batch.doc_starts.ravel()[start:stop].tolist()) == {start % row_len}
        assert labels[:-1].tolist() == tokens[1:].tolist() or (labels == IGNORE).all()
        if (labels == IGNORE).all() and not (tokens.tolist() == [256] and [256] in pieces):
            assert (tokens == 256).all()  # padding
            continue
        found.append(tokens.tolist())
    if mask:
        extra = Counter(map(tuple, found)) - Counter(map(tuple, pieces))
        assert set(extra) <= {(256,)}  # a padding of one looks like a document of one
        assert not Counter(map(tuple, pieces)) - Counter(map(tuple, found))
        asked = (batch.labels != IGNORE).sum()
        assert asked == sum(map(len, documents)) - len(documents)  # all but each document's first token
    else:
        assert batch.cu_seqlens.tolist() == list(range(0, rows * row_len + 1, row_len))
        assert (batch.positions == np.arange(row_len)).all()
        followed = (batch.labels[:, :-1] != IGNORE) & (batch.labels[:, :-1] != batch.tokens[:, 1:])
        assert not followed.any()


@pytest.mark.parametrize("mask", [True, False])
def test_the_last_token_before_padding_predicts_nothing(tmp_path, mask):
    (document,) = documents = random_documents([3])
    dataset = write(tmp_path / "d", documents)
    batch = loader(dataset, 6, document_mask=mask, packing="best_fit").batch([0])
    assert batch.labels.tolist() == [[*document[1:].tolist(), IGNORE, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("length", [1, 2, 5, 10])
def test_shorter_rows_hold_the_same_tokens_and_labels(tmp_path, packing, length):
    """A sample cut into rows loses no label: the last token of a row is asked for the first of the next."""
    dataset = write(tmp_path / "d", random_documents([7, 3, 1, 25, 40, 9, 9, 2, 31]), batch_tokens=50)
    whole = loader(dataset, 10, packing=packing)
    short = loader(dataset, 10, packing=packing, seq_len_schedule=[{"tokens": 0, "seq_len": length}])
    expected = whole.micro_batches(0, whole_step(6))[0]
    (found,) = short.micro_batches(0, whole_step(6))
    assert found.tokens.shape == (60 // length, length)
    assert found.tokens.ravel().tolist() == expected.tokens.ravel().tolist()
    assert found.labels.ravel().tolist() == expected.labels.ravel().tolist()
    assert set(found.cu_seqlens) == set(expected.cu_seqlens) | set(range(0, 61, length))
    assert len(set(found.sample_ids.tolist())) == 60 // length


def whole_step(samples):

    return Share(samples, samples)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_tokens_that_do_not_count_are_never_asked(tmp_path, packing):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, 60)
    # A token's number in the stream is its value, so that a label says where it comes from.
    numbers = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    documents = [n % 250 for n in numbers]
    spans = [[(i, i + 1) for i in np.flatnonzero(n % 3).tolist()] for n in numbers]
    plain = write(tmp_path / "plain", documents, batch_tokens=70)
    masked = write(tmp_path / "masked", documents, batch_tokens=70, spans=spans)
    batches = [
        data.batch(range(data.samples[0]))
        for data in (loader(d, 12, packing=packing, shuffle=False) for d in (masked, plain))
    ]
    found, expected = (batch.labels for batch in batches)
    assert (found[found != IGNORE] == expected[found != IGNORE]).all()
    if packing == "concat":
        targets = np.arange(found.size).reshape(found.shape) + 1
        assert ((found == IGNORE) == ((expected == IGNORE) | (targets % 3 == 0))).all()
    else:
        stream = [n for n in np.concatenate([n[1:] for n in numbers]) if n % 3]
        assert Counter((found[found != IGNORE]).tolist()) == Counter((np.array(stream) % 250).tolist())


def test_the_table_is_built_in_parts_kept_and_checked(tmp_path):
    dataset = write(tmp_path / "d", random_documents([40, 3, 9, 9, 60, 1, 30] * 20), batch_tokens=90)
    chunks = Chunks(dataset, 16)
    chunks.width, chunks.count = 1, dataset.num_blocks
    whole = Table.build(chunks)
    parts = [Table.from_json(Table.build(chunks, rank, 3).to_json()) for rank in range(3)]
    joined = Table.join(parts)
    assert joined.counts.tolist() == whole.counts.tolist()
    assert whole.counts[:, 1:].sum(axis=0).tolist() == [140, 60, 3040]  # 3 of 7 are longer than 16
    assert Table.load(tmp_path, chunks) is None
    whole.save(tmp_path / "packing", chunks)
    assert Table.load(tmp_path / "packing", chunks).counts.tolist() == whole.counts.tolist()
    (file,) = (tmp_path / "packing").iterdir()
    other = Chunks(dataset, 8)
    other.width, other.count = 1, dataset.num_blocks
    assert Table.load(tmp_path / "packing", other) is None
    few, negative = json.dumps([whole.counts[1:].tolist(), []]), json.dumps([(-whole.counts).tolist(), []])
    shapes = (b"", b"[[1]]", b"[[[1, 2, 3, 4, 5]], []]", b"[3, 4]", b"{}")
    for broken in (*shapes, few.encode(), negative.encode()):
        file.write_bytes(broken)
        assert Table.load(tmp_path / "packing", chunks) is None


def test_a_table_of_other_data_is_refused(tmp_path):
    dataset = write(tmp_path / "d", random_documents([40, 3, 9, 9, 60, 1, 30]))
    table = Table.build(Chunks(dataset, 16))

    config = loader(dataset, 16, packing="best_fit").config
    wrong = Table(table.counts + 1, [])
    with pytest.raises(DataError, match=r"chunk 0 packs into \d+ samples, the run's table says \d+; delete"):
        DataLoader(config, 0, [dataset], [wrong]).batch([0])


def test_too_little_data(tmp_path):
    dataset = write(tmp_path / "d", random_documents([10]))
    assert loader(dataset, 9).samples == [1]
    assert loader(dataset, 100, packing="best_fit").samples == [1]
    with pytest.raises(DataError, match=r"has 10 tokens, one sample of data\.seq_len=10 needs 11"):
        loader(dataset, 10)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_passages_are_what_a_row_is_made_of(tmp_path, packing):
    documents = random_documents([7, 3, 1, 25, 40, 9, 9, 2, 31])
    data = loader(write(tmp_path / "d", documents, batch_tokens=50), 10, packing=packing)
    for sample in range(data.samples[0]):
        found = passages(data, sample)
        row = data.batch([sample]).tokens[0]
        read = np.concatenate([passage.tokens for passage in found])
        assert row[: len(read)].tolist() == read.tolist()
        assert packing == "best_fit" or len(read) == 10
        for passage in found:
            whole = documents[int(passage.doc_id.removeprefix("doc"))].tolist()
            part = passage.tokens.tolist()
            assert any(whole[at : at + len(part)] == part for at in range(len(whole)))
