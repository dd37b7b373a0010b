"""Batches are a function of the sample indices: the same for any split, resume, skip or damage."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.batch import Batch, Replacement
from megalite.data.loader import DataLoader, Share, check_same_tokenizer, open_datasets
from megalite.errors import ConfigError, DataError

from .datasets import DamagedDataset, WideTokenizer, loader, random_documents, write

SCHEDULE = {
    "schedule": [{"tokens": 16 * 40, "weights": [0.2, 0.8]}, {"tokens": 16 * 90, "temperature": 2.0}],
    "seq_len_schedule": [{"tokens": 0, "seq_len": 4}, {"tokens": 16 * 50, "seq_len": 16}],
    "sources": [{"weight": 0.7, "max_epochs": 1.5}, {"weight": 0.3}],
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    rng = np.random.default_rng(1)
    root = tmp_path_factory.mktemp("loader")
    for n, name in enumerate("abc"):
        write(root / name, random_documents(rng.integers(1, 60, 120), seed=n), batch_tokens=500)
    return open_datasets(str(root / name) for name in "abc")


@pytest.fixture(params=["concat", "best_fit"])
def data(request, datasets):
    return loader(datasets[:2], 16, seed=3, packing=request.param, **SCHEDULE)


def joined(batches: list[Batch]) -> dict[str, np.ndarray]:
    names = [f.name for f in fields(Batch) if f.name not in ("replaced", "cu_seqlens")]
    found = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names}
    sizes = np.cumsum([0, *(batch.tokens.size for batch in batches)])
    edges = [batch.cu_seqlens[:-1] + size for batch, size in zip(batches, sizes, strict=False)]
    return found | {"cu_seqlens": np.append(np.concatenate(edges), sizes[-1])}


def digest(batches: list[Batch]) -> str:
    arrays = joined(batches)
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in arrays)
    ).hexdigest()


@pytest.mark.parametrize("position", [0, 24 * 2, 24 * 1001])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(data, position):
    expected = digest(data.micro_batches(position, Share(24, 24)))
    for world in (1, 2, 3, 8):
        for micro in [m for m in (1, 3, 12) if 24 % (m * world) == 0]:
            ranks = [data.micro_batches(position, Share(24, micro, rank, world)) for rank in range(world)]
            assert {len(batches) for batches in ranks} == {24 // world // micro}
            assert digest([batch for batches in ranks for batch in batches]) == expected


def test_sizes_that_do_not_divide(data):
    with pytest.raises(ConfigError, match=r"global_batch_size=24 .*micro_batch_size=5 × 1"):
        data.steps(0, Share(24, 5))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    lives=st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 4]), st.integers(0, 3)
        ),
        min_size=1,
        max_size=5,
    ),
    packing=st.sampled_from(["concat", "best_fit"]),
    skipped=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), max_size=3),
)
def test_a_run_killed_anywhere_and_continued_anyhow_reads_what_an_unkilled_one_does(
    datasets, lives, packing, skipped
):
    """Each life continues from the state of the last one's newest save on its own number of ranks, with its
    own micro-batch size and prefetch."""
    make = {"seed": 3, "packing": packing, **SCHEDULE}
    whole = loader(datasets[:2], 16, **make)
    whole.skip([(start, start + length) for start, length in skipped])
    steps = iter(whole.steps(0, Share(24, 24), prefetch=0))
    state, position = json.dumps(whole.state(0)), 0
    for count, world, micro, prefetch in lives:
        ranks = []
        for rank in range(world):
            mine = loader(datasets[:2], 16, **make)
            assert not mine.restore(json.loads(state), position)
            ranks.append(mine.steps(position, Share(24, micro, rank, world), prefetch))
        for _ in range(count):
            parts = [next(rank) for rank in ranks]
            assert digest([batch for part in parts for batch in part]) == digest(next(steps))
            position += 24
        for rank in ranks:
            rank.close()
        state = json.dumps(mine.state(position))


def test_every_epoch_delivers_every_token_once(datasets):
    """Through two epochs of each source, across changes of weights and of row length."""
    plan = {
        "sources": [{"weight": 0.7, "max_epochs": 2}, {"weight": 0.3, "max_epochs": 2}],
        "schedule": [{"tokens": 16 * 55, "weights": [0.1, 0.9]}],
        "seq_len_schedule": [{"tokens": 0, "seq_len": 8}, {"tokens": 16 * 99, "seq_len": 16}],
    }
    data = loader(datasets[:2], 16, **plan)
    total = 2 * sum(data.samples)
    assert data.blend.end == total
    data.check_length(total)
    with pytest.raises(DataError, match="max_epochs"):
        data.check_length(total + 1)
    expected = np.zeros(257, dtype=np.int64)
    for dataset, samples in zip(datasets, data.samples, strict=False):
        expected += 2 * np.bincount(dataset.read(0, samples * 16).tokens, minlength=257)
    found = np.zeros(257, dtype=np.int64)
    seen = []
    for position in range(0, total, 1):
        (batch,) = data.micro_batches(position, Share(1, 1))
        found += np.bincount(batch.tokens.ravel(), minlength=257)
        seen.append(batch.tokens.ravel().tobytes())
    assert found.tolist() == expected.tolist()
    assert len(set(seen)) == sum(data.samples)
    with pytest.raises(DataError, match="past the data"):
        data.micro_batches(total, Share(1, 1))
    for left, world in product((21, 22, 23), (1, 2)):  # a step that is not whole is not begun, by any rank
        with data.steps(total - left, Share(4, 2, 0, world)) as steps:
            for n in range(5):
                assert next(steps)[0].sample_ids[0] == total - left + 4 * n
            with pytest.raises(DataError, match="past the data"):
                next(steps)


def test_a_changed_mixture_continues_where_each_source_stood(datasets):
    before = loader(datasets[:2], 16, sources=[{"weight": 0.5}, {"weight": 0.5}])
    state = json.loads(json.dumps(before.state(50)))
    assert list(state["cursors"].values()) == [25, 25]
    source, sample = before.locate(np.arange(50))
    # The second leaves, a third comes, the shares change; then the second is back.
    after = loader([datasets[2], datasets[0]], 16, sources=[{"weight": 0.75}, {"weight": 0.25}])
    assert after.restore(state, 50)
    # Continued on the way with nothing changed, it still knows where the one that left stood.
    same = loader([datasets[2], datasets[0]], 16, sources=[{"weight": 0.75}, {"weight": 0.25}])
    assert not same.restore(json.loads(json.dumps(after.state(70))), 70)
    state = json.loads(json.dumps(same.state(90)))
    assert dict(zip(after.names, [30, 35], strict=True)).items() <= state["cursors"].items()
    last = loader(datasets[:2], 16)
    assert last.restore(state, 90)
    first_kind = [
        *sample[source == 0],
        *(lambda s, n: n[s == 1])(*after.locate(np.arange(50, 90))),
        *(lambda s, n: n[s == 0])(*last.locate(np.arange(90, 150))),
    ]
    assert first_kind == loader(datasets[0], 16).locate(np.arange(len(first_kind)))[1].tolist()
    assert last.blend.cursors(90) == [35, 25]
    # Saved and restored with nothing changed, it goes on from the same origin.
    again = loader(datasets[:2], 16)
    assert not again.restore(json.loads(json.dumps(last.state(150))), 150)
    assert again.locate(np.arange(90, 200))[1].tolist() == last.locate(np.arange(90, 200))[1].tolist()


def test_another_cap_is_another_mixture(datasets):
    """It would move what was drawn before."""
    before = loader(datasets[:2], 16, sources=[{"max_epochs": 2}, {}])
    after = loader(datasets[:2], 16, sources=[{"max_epochs": 3}, {}])
    assert after.restore(before.state(50), 50)
    assert after.blend.origin == 50
    assert not loader(datasets[:2], 16, sources=[{"max_epochs": 2}, {}]).restore(before.state(50), 50)


def test_a_dataset_that_is_named_twice_is_two_sources(datasets):
    twice = loader([datasets[0], datasets[0]], 16, sources=[{"weight": 0.75}, {"weight": 0.25}])
    source, sample = twice.locate(np.arange(80))
    assert sample[source == 0][:20].tolist() != sample[source == 1].tolist()
    state = json.loads(json.dumps(twice.state(80)))
    assert list(state["cursors"].values()) == [60, 20]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seq_len": 8}, "data.seq_len=8, .* first 40 samples with 16"),
        ({"packing": "best_fit"}, "data.packing='best_fit'"),
        ({"shuffle": False}, "data.shuffle=False"),
        ({"shuffle_chunks": 3}, "data.shuffle_chunks=3"),
        ({"seed": 4}, "seed=4"),
    ],
)
def test_another_order_is_refused(datasets, changed, words):
    state = loader(datasets[0], 16).state(40)
    with pytest.raises(ConfigError, match=words):
        loader(datasets[0], **{"seq_len": 16, **changed}).restore(state, 40)


def test_ranges_left_out_move_what_comes_after(datasets):
    data = loader(datasets[:2], 16)
    plain = data.batch(range(200))
    data.skip([(10, 20), (50, 53)])
    data.skip([[15, 25]])
    expected = [n for n in range(200) if not (10 <= n < 25 or 50 <= n < 53)]
    (found,) = data.micro_batches(4, Share(60, 60))
    assert found.sample_ids.tolist() == expected[4:64]
    assert (found.tokens == plain.tokens[expected[4:64]]).all()
    other = loader(datasets[:2], 16)
    other.restore(json.loads(json.dumps(data.state(30))), 30)
    assert other.skips.ranges == ((10, 25), (50, 53))
    assert sum(data.state(30)["cursors"].values()) == 45  # what is left out is not read later either
    once = loader(datasets[:2], 16, sources=[{"max_epochs": 1}, {"max_epochs": 1}])
    once.skip([(3, 10)])
    once.check_length(once.blend.end - 7)
    with pytest.raises(DataError, match="past the data"):
        once.check_length(once.blend.end - 6)


def damaged(root, blocks, **settings) -> tuple[DataLoader, DataLoader]:
    """Loaders of a dataset as it was and with these blocks damaged."""
    documents = random_documents(np.random.default_rng(5).integers(1, 60, 200))
    sound = write(root / "d", documents, batch_tokens=300)
    bad = DamagedDataset(root / "d")
    bad.damaged = frozenset(blocks)
    return loader(sound, 16, max_bad_blocks=0.3, **settings), loader(bad, 16, max_bad_blocks=0.3, **settings)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_cannot_be_read_is_replaced_alike_on_all_ranks(tmp_path, monkeypatch, packing):
    monkeypatch.setattr("megalite.data.best_fit.CHUNK_TOKENS", 300)
    monkeypatch.setattr("megalite.data.best_fit.CHUNK_SAMPLES", 1)
    sound, bad = damaged(tmp_path, [], packing=packing)
    bad.datasets[0].damaged = frozenset({3, 7})  # type: ignore[attr-defined]  # after the table was made
    n = sound.samples[0]
    before, after = sound.batch(range(n)), bad.batch(range(n))
    lost = {each.sample_id for each in after.replaced}
    assert {each.batch for each in after.replaced} == {3, 7}
    assert 20 < len(lost) < n / 2
    rows = {row.tobytes() for row in before.tokens}
    for sample in range(n):
        assert after.tokens[sample].tobytes() in rows
        assert sample in lost or after.tokens[sample].tolist() == before.tokens[sample].tolist()
    # Whoever reads a sample, with whatever others, reads the same in its place.
    ranks = [bad.micro_batches(0, Share(24, 2, rank, 3)) for rank in range(3)]
    assert digest([batch for rank in ranks for batch in rank]) == digest(bad.micro_batches(0, Share(24, 24)))
    every = {each for rank in ranks for batch in rank for each in batch.replaced}
    assert every == set(bad.micro_batches(0, Share(24, 24))[0].replaced)


def test_a_damaged_chunk_packs_into_nothing_when_the_table_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.best_fit.CHUNK_TOKENS", 300)
    monkeypatch.setattr("megalite.data.best_fit.CHUNK_SAMPLES", 1)
    sound, bad = damaged(tmp_path, [3], packing="best_fit")
    assert list(bad.bad_blocks) == [(str(tmp_path / "d/shard_00000.arrow"), 3)]
    assert 0 < sound.samples[0] - bad.samples[0] < 40
    assert not bad.batch(range(bad.samples[0])).replaced


def test_no_chunk_without_a_damaged_record_batch(tmp_path):
    """Of a small dataset, which is one chunk, a single damaged one leaves nothing."""
    expected = r"packs \d+ record batches together, and none .*: record batch 3 is corrupt"
    with pytest.raises(DataError, match=expected):
        damaged(tmp_path, [3], packing="best_fit")


def test_too_many_damaged_blocks_end_the_run(tmp_path):
    _, bad = damaged(tmp_path, [2])
    total = bad.num_blocks
    allowed = int(0.3 * total)
    found = [Replacement(n, "shard", n, "is corrupt") for n in range(allowed + 1)]
    bad.quarantine([*found[:-1], *found[:-1]])  # the same ones again are no more
    assert len(bad.bad_blocks) == allowed
    exact = loader(bad.datasets, 16, max_bad_blocks=allowed / total)
    exact.quarantine(found[:-1])  # as many as that are not more
    other = loader(bad.datasets, 16, max_bad_blocks=0.3)
    other.restore(json.loads(json.dumps(bad.state(5))), 5)
    for each in (bad, other):
        with pytest.raises(
            DataError, match=f"shard: record batch {allowed} is corrupt; {allowed + 1} of {total}"
        ) as caught:
            each.quarantine(found[-1:])
        assert caught.value.is_shared


def test_damage_is_an_error_where_nothing_may_be_replaced(tmp_path):
    _, bad = damaged(tmp_path, range(1000))
    with pytest.raises(DataError, match="is corrupt"):
        bad.batch([0])
    _, bad = damaged(tmp_path / "x", [0])
    strict = DataLoader(bad.config.model_copy(update={"max_bad_blocks": 0.0}), 0, bad.datasets)
    with pytest.raises(DataError, match="record batch 0 is corrupt"):
        strict.batch(range(strict.samples[0]))


def test_too_small_a_model_and_no_data(tmp_path, datasets):
    data = loader(datasets[0], 5)
    data.check_vocab(257)
    with pytest.raises(DataError, match=r"vocabulary of 257, but model\.vocab_size=256"):
        data.check_vocab(256)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        loader([], 5)


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
        loader([a, b], 5)


@pytest.mark.parametrize("masked", [False, True])
def test_arrays_come_from_the_given_allocator(datasets, masked):
    made = []

    def allocate(shape, dtype):
        made.append(np.full(shape, 7, dtype=dtype))
        return made[-1]

    plain = loader(datasets[0], 16, document_mask=masked)
    batch = DataLoader(plain.config, 0, datasets[:1], allocate=allocate).batch([0, 1])
    for array in (batch.tokens, batch.labels, batch.positions, batch.doc_starts):
        assert array is None or any(np.shares_memory(array, each) for each in made)
    expected = plain.batch([0, 1])
    assert (batch.tokens == expected.tokens).all()
    assert (batch.positions == expected.positions).all()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_steps_are_the_micro_batches_in_order(data, prefetch):
    with data.steps(40, Share(8, 2, 1, 2), prefetch=prefetch) as steps:
        for n in range(12):
            assert digest(next(steps)) == digest(data.micro_batches(40 + 8 * n, Share(8, 2, 1, 2)))
        assert steps.wait_s > 0
    with pytest.raises(StopIteration):
        next(steps)


def test_datasets_are_told_what_is_read_next(datasets, monkeypatch):
    monkeypatch.setattr("megalite.data.loader.PLANNED", 16)
    told, read = [], []
    data = loader(datasets[0], 16, shuffle=False)
    dataset = data.datasets[0]
    monkeypatch.setattr(dataset, "prefetch", lambda blocks: told.extend(blocks))
    block = dataset.block
    monkeypatch.setattr(
        dataset, "block", lambda number: read.append((number, number in told)) or block(number)
    )
    with data.steps(0, Share(4, 4), prefetch=0) as steps:
        for _ in range(data.samples[0] // 4):
            next(steps)
    assert told == sorted(set(told)), "each once"
    assert {number for number, was_told in read if not was_told} == {0}  # the first batch waits for its own


def test_what_is_read_again_is_told_again(datasets, monkeypatch):
    monkeypatch.setattr("megalite.data.loader.PLANNED", 16)
    monkeypatch.setattr("megalite.data.loader.MAX_HINTED", 2)
    told = []
    data = loader(datasets[0], 16, shuffle=False)
    monkeypatch.setattr(data.datasets[0], "prefetch", lambda blocks: told.extend(blocks))
    with data.steps(0, Share(4, 4), prefetch=0) as steps:
        for _ in range(2 * data.samples[0] // 4):
            next(steps)
    last = data.num_blocks - 1
    assert last > 4
    assert told.count(last) >= 2, "in each epoch"


def test_a_summary_of_what_is_read(datasets):
    (entry,) = loader(datasets[0], 16).summary()
    assert (entry["documents"], entry["samples"]) == (120, (datasets[0].total_tokens - 1) // 16)
    data = loader(datasets[0], 16, packing="best_fit")
    (entry,) = data.summary()
    labels = data.batch(range(data.samples[0])).labels.size
    assert entry["padding"] == round(1 - datasets[0].total_tokens / labels, 6)
    lengths = [len(document.tokens) for document in datasets[0].documents()]
    assert entry["documents_cut"] == sum(length > 16 for length in lengths)


def test_resuming_far_in_is_immediate(datasets):
    data = loader(datasets[:2], 16)
    data.batch(range(8))
    began = time.perf_counter()
    data.batch(range(10**12, 10**12 + 8))
    assert time.perf_counter() - began < 0.05
