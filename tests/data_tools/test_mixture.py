"""Mixtures: shares, caps and budgets, and that the loader draws what was planned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.mix.curriculum import couple
from data_tools.mix.mixture import MixSettings, run
from data_tools.mix.shares import fill
from data_tools.step import read_report
from megalite.config import Config
from megalite.config_file import build_config
from megalite.data.loader import DataLoader, open_datasets
from megalite.errors import DataError
from tests.daily import one_a_day
from tests.data_tools.corpora import crew, files_of
from tests.data_tools.tokenized import write_tokenized

SEQ = 16
BATCH = 8
PLAIN = {"web": (4001, 200), "code": (1601, 200), "wiki": (801, 0), "tiny": (9, 9)}
BUCKETED = {
    **{f"web.q{n}": (1601 + 160 * n, 100) for n in range(3)},
    **{f"code.q{n}": (801, 100) for n in range(3)},
    "wiki": (1601, 100),
}


def mix(tmp_path: Path, groups: dict[str, tuple[int, int]], **settings: Any) -> Path:
    """The finished step."""
    tokenized = tmp_path / "tokens"
    if not tokenized.exists():
        write_tokenized(tokenized, groups)
    with crew(tmp_path) as hands:
        run(MixSettings.model_validate({"seq_len": SEQ} | settings), tokenized, tmp_path / "mix", hands, True)
    return tmp_path / "mix"


def config(out: Path, *overrides: str) -> Config:
    """A run's configuration that reads the mixture."""
    samples = read_report(out)["samples"]
    values = {
        "model": {"vocab_size": 257, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8},
        "data": {"mixture": str(out / "data.toml")},
        "optim": {"lr": 1e-3},
        "train": {"steps": samples // BATCH, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    }
    return build_config(values, overrides)


def drawn(out: Path) -> tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any], DataLoader]:
    """By the loader itself: the groups, and the group and sample of every sample of the run."""
    data = config(out).data
    loader = DataLoader(data, 0, open_datasets(source.path for source in data.sources))
    report = read_report(out)
    loader.check_length(report["samples"])
    source, sample = loader.locate(np.arange(report["samples"]))
    return [entry["group"] for entry in report["groups"]], source, sample, loader


def counts(out: Path) -> dict[str, int]:
    """Samples that the loader draws of each group."""
    names, source, _, _ = drawn(out)
    return dict(zip(names, np.bincount(source, minlength=len(names)).tolist(), strict=True))


def test_a_sample_needs_the_token_after_it(tmp_path: Path) -> None:
    report = read_report(mix(tmp_path, {"web": (3 * SEQ, SEQ), "code": (3 * SEQ + 1, SEQ + 1)}))
    assert (report["samples"], report["without_validation"]) == (2 + 3, ["web"])


@pytest.mark.slow
def test_stages_of_unequal_length_make_the_whole_run(tmp_path: Path) -> None:
    report = read_report(mix(tmp_path, BUCKETED, token_budget=10 * SEQ, curriculum={"stages": 4}))
    assert report["stages"] == [2 * SEQ, 3 * SEQ, 2 * SEQ, 3 * SEQ]


def test_by_default_every_token_is_read_once(tmp_path: Path) -> None:
    out = mix(tmp_path, PLAIN)
    assert counts(out) == {"code": 100, "web": 250, "wiki": 50}
    report = read_report(out)
    assert [entry["epochs"] for entry in report["groups"]] == [1, 1, 1]
    assert report["too_small"] == ["tiny"]
    assert report["without_validation"] == ["wiki"]
    _, source, sample, _ = drawn(out)
    assert len(set(zip(source.tolist(), sample.tolist(), strict=True))) == 400
    assert len(config(out).data.validation) == 2


def test_weights_and_temperature(tmp_path: Path) -> None:
    weights = {"web": 1, "code": 3, "wiki": 0, "tiny": 0}
    assert counts(mix(tmp_path, PLAIN, weights=weights, token_budget=200 * SEQ)) == {
        "code": 150,
        "web": 50,
        "wiki": 0,
    }
    found = counts(mix(tmp_path, PLAIN, temperature=2.0, token_budget=300 * SEQ))
    roots = {"code": 1601**0.5, "web": 4001**0.5, "wiki": 801**0.5}
    for name, root in roots.items():
        assert abs(found[name] - 300 * root / sum(roots.values())) < 1


def test_what_a_cap_leaves_over_goes_to_the_others(tmp_path: Path) -> None:
    even = {"web": 1, "code": 1, "wiki": 1}
    out = mix(tmp_path, PLAIN, weights=even, max_epochs=2, source_epochs={"web": 1.5}, token_budget=600 * SEQ)
    assert counts(out) == {"code": 200, "web": 300, "wiki": 100}
    assert [entry["is_capped"] for entry in read_report(out)["groups"]] == [True, False, True]
    names, source, sample, _ = drawn(out)
    times = np.bincount(sample[source == names.index("wiki")])
    assert (times == 2).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"wbe": 1, "code": 1, "wiki": 1}}, "'wbe'.*did you mean 'web'"),
        ({"weights": {"web": 1, "code": 1}}, "none for 'wiki'"),
        ({"weights": {"web": 0, "code": 0, "wiki": 0}}, "all 0"),
        ({"weights": {"web": 1, "code": 1, "wiki": 1, "tiny": 1}}, "'tiny'.* has not the 17 tokens"),
        ({"source_epochs": {"cod": 2}}, "did you mean 'code'"),
        ({"token_budget": 1601 * SEQ}, f"use at most {1600 * SEQ}"),
        ({"token_budget": SEQ - 1}, "less than a sample"),
        ({"seq_len": 9000}, "no group has 9001 tokens"),
        ({"curriculum": {}}, "no source has any"),
    ],
)
def test_mistakes(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        mix(tmp_path, PLAIN, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.0, "weights": {"web": 1}},
        {"weights": {"web": -1}},
        {"max_epochs": 0},
        {"curriculum": {"stages": 3, "row_lens": [8, 16]}},
        {"curriculum": {"stages": 2, "row_lens": [5, 16]}},
        {"wieghts": {}},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MixSettings.model_validate({"seq_len": SEQ} | settings)


@pytest.mark.parametrize(
    ("order", "softness"),
    one_a_day(("ascending", 0.3), ("ascending", 0.0), ("descending", 0.0), ("ascending", 1.0)),
)
def test_a_curriculum_is_drawn_as_planned(tmp_path: Path, order: str, softness: float) -> None:
    curriculum = {"order": order, "stages": 4, "softness": softness, "row_lens": [4, 8, 8, 16]}
    weights = {"web": 0.5, "code": 0.3, "wiki": 0.2}
    out = mix(tmp_path, BUCKETED, weights=weights, token_budget=800 * SEQ, curriculum=curriculum)
    names, source, sample, loader = drawn(out)
    found = np.array([np.bincount(part, minlength=len(names)) for part in np.split(source, 4)])
    report = read_report(out)
    assert found.T.tolist() == [[t // SEQ for t in entry["stages"]] for entry in report["groups"]]
    assert report["most_off_plan_samples"] < BATCH
    by_source = {s: [n for n, name in enumerate(names) if name.split(".")[0] == s] for s in weights}
    for name, mine in by_source.items():
        # In every stage the source has its share, and over the run each bucket its part of the tokens.
        assert np.abs(found[:, mine].sum(axis=1) - 200 * weights[name]).max() < 2
        sizes = np.array([loader.datasets[n].total_tokens for n in mine])
        assert np.abs(found[:, mine].sum(axis=0) - 800 * weights[name] * sizes / sizes.sum()).max() < BATCH
    first, last = (names.index("web.q0"), names.index("web.q2"))
    if order == "descending":
        first, last = last, first
    if softness == 0:
        assert found[0, first] > 0 == found[0, last]
        assert found[3, last] > 0 == found[3, first]
    if softness == 0.3:
        assert found[0, first] > 3 * found[0, last] > 0
    if softness == 1:
        assert np.ptp(found, axis=0).max() <= 2
    for n, dataset in enumerate(loader.samples):
        assert np.bincount(sample[source == n], minlength=dataset).max() <= 4
    rows = [loader.regime(int(200 * stage))[0] for stage in range(4)]
    assert rows == [4, 8, 8, 16]


def test_a_run_that_needs_every_epoch_under_a_curriculum(tmp_path: Path) -> None:
    budget = 4 * sum((tokens - 1) // SEQ for tokens, _ in BUCKETED.values()) * SEQ
    out = mix(tmp_path, BUCKETED, token_budget=budget, curriculum={"softness": 0.3})
    assert {entry["epochs"] for entry in read_report(out)["groups"]} == {4.0}


@pytest.mark.slow
def test_the_same_wherever_it_lies_and_at_once_when_done(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        mix(tmp_path / name, BUCKETED, curriculum={})
    assert files_of(tmp_path / "a" / "mix") == files_of(tmp_path / "b" / "mix")
    (tmp_path / "a" / "mix" / "data.toml").unlink()
    mix(tmp_path / "a", BUCKETED, curriculum={})
    assert not (tmp_path / "a" / "mix" / "data.toml").exists()


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), min_size=1, max_size=8),
    st.floats(0.1, 300),
)
def test_filling_is_proportional_below_the_caps(sources: list[tuple[float, float]], total: float) -> None:
    wanted, limits = np.array(sources).T
    assume(wanted.max() > 0 and (wanted[wanted > 0].min() > 1e-3))
    parts = fill(wanted, limits, total)
    assert (parts <= limits * (1 + 1e-9)).all()
    assert not parts[wanted == 0].any()
    assert parts.sum() == pytest.approx(min(total, limits[wanted > 0].sum()), rel=1e-9, abs=1e-9)
    is_free = (wanted > 0) & (parts < limits * (1 - 1e-9))
    if is_free.any():
        level = (parts[is_free] / wanted[is_free]).max()
        assert parts[is_free] == pytest.approx(level * wanted[is_free], rel=1e-6, abs=1e-9)
        assert (limits[(wanted > 0) & ~is_free] <= level * wanted[(wanted > 0) & ~is_free] * (1 + 1e-6)).all()


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_couplings_keep_both_margins(
    rows: Sequence[float], columns: Sequence[float], softness: float
) -> None:
    assume(sum(columns) > 0.01)
    r, c = np.array(rows) / sum(rows), np.array(columns) / sum(columns)
    found = couple(r, c, softness)
    assert (found >= 0).all()
    assert found.sum(axis=1) == pytest.approx(r, abs=1e-12)
    assert found.sum(axis=0) == pytest.approx(c, abs=1e-12)
