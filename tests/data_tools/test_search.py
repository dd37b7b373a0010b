"""The search for weights: on a known surface, on noise, killed and made longer, and one real proxy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.mix import search
from data_tools.mix.groups import Group, read_groups
from data_tools.mix.mixture import MixSettings
from data_tools.mix.mixture import run as mix
from data_tools.mix.proxy import ProxySettings, _environment, train_proxy
from data_tools.mix.regression import FEATURES, Power, cross_validate, fit, select, spearman
from data_tools.mix.search import Prior, SearchSettings
from data_tools.step import read_report
from megalite.errors import DataError
from tests.data_tools.corpora import crew, files_of
from tests.data_tools.tokenized import write_tokenized

SEQ = 16
GROUPS = {"code": (1601, 200), "noise": (6401, 200), "web.q0": (801, 100), "web.q1": (801, 100)}
SOURCES = ["code", "noise", "web"]
SIZES = np.array([1601, 6401, 1602]) / 9604

Surface = Callable[[NDArray[np.float64]], Mapping[str, float]]


def surface(shares: NDArray[np.float64]) -> dict[str, float]:
    """Losses as data mixing laws have them: each source teaches itself, code and web each other as well."""
    code, noise, web = shares
    return {
        "code": 2 + 0.6 * (code + 0.3 * web + 0.02) ** -0.25,
        "noise": 5.5 + 0.1 * (noise + 0.02) ** -0.2,
        "web": 2.5 + 0.5 * (web + 0.2 * code + 0.02) ** -0.3,
    }


def settings(**more: Any) -> SearchSettings:
    small = {"candidates": 1500, "bootstraps": 30, "best": 30, "proxy": {"seq_len": SEQ}}
    return SearchSettings.model_validate({"runs": 32, "target": {"code": 1, "web": 1}} | small | more)


class Proxies:
    """Stands for the trainer: losses from a surface, a little noise, and perhaps a failure."""

    def __init__(self, surface: Surface, fails_at: int = -1) -> None:
        self.surface, self.fails_at = surface, fails_at
        self.done: list[int] = []

    def __call__(
        self, proxy: ProxySettings, groups: Sequence[Group], weights: Mapping[str, float], folder: Path
    ) -> dict[str, float]:
        number = int(folder.name.removeprefix("proxy-"))
        if number == self.fails_at:
            raise DataError("killed")
        self.done.append(number)
        assert weights["web.q0"] == weights["web.q1"]
        web = weights["web.q0"] + weights["web.q1"]
        rng = np.random.default_rng(number)
        losses = self.surface(np.array([weights["code"], weights["noise"], web]))
        return {source: loss + 0.002 * rng.standard_normal() for source, loss in losses.items()}


@pytest.fixture
def tokenized(tmp_path: Path) -> Path:
    return write_tokenized(tmp_path / "tokens", GROUPS)


def look(
    tokenized: Path, proxies: Proxies, monkeypatch: pytest.MonkeyPatch, out: str = "search", **more: Any
) -> dict[str, Any]:
    """What a search on these proxies finds."""
    monkeypatch.setattr(search, "train_proxy", proxies)
    folder = tokenized.parent / out
    with crew(tokenized.parent) as hands:
        search.run(settings(**more), tokenized, folder, hands)
    found: dict[str, Any] = json.loads((folder / "mixture.json").read_text())
    return found


def test_a_known_surface(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(tokenized, Proxies(surface), monkeypatch, runs=64)
    weights = np.array([found["weights"][source] for source in SOURCES])
    at_sizes, at_proposal = (
        sum(surface(shares)[source] for source in ("code", "web")) / 2 for shares in (SIZES, weights)
    )
    gain = at_sizes - at_proposal
    assert gain > 0.05
    low, high = found["gain_interval"]
    assert 0 < low <= found["predicted_gain"] <= high
    assert abs(found["predicted_gain"] / gain - 1) < 0.2
    assert found["weights"]["noise"] < 0.25 < SIZES[1]
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    for source in SOURCES:
        low, high = found["intervals"][source]
        assert low - 0.02 < found["weights"][source] < high + 0.02
        assert high - low < 0.6
    assert found["fit"]["r2"] > 0.8 < found["fit"]["spearman"]
    with crew(tokenized.parent) as hands:  # [mix] takes it as it is
        mix(
            MixSettings(weights=found["weights"], seq_len=SEQ, max_epochs=20),
            tokenized,
            tokenized.parent / "mix",
            hands,
        )
    shares = {each["group"]: each["share"] for each in read_report(tokenized.parent / "mix")["groups"]}
    assert shares["code"] == pytest.approx(found["weights"]["code"], abs=0.01)


def test_losses_that_nothing_predicts_propose_nothing(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(tokenized, Proxies(lambda shares: dict.fromkeys(SOURCES, 2.0)), monkeypatch)
    assert found["weights"] is None
    assert "the fit does not predict" in found["conclusion"]
    assert "more search.runs" in found["conclusion"]


def test_a_search_goes_on_after_a_kill_and_can_be_made_longer(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = look(tokenized, Proxies(surface), monkeypatch, "whole", runs=14)
    killed, again, longer = Proxies(surface, fails_at=9), Proxies(surface), Proxies(surface)
    with pytest.raises(DataError, match="killed"):
        look(tokenized, killed, monkeypatch, "killed", runs=12)
    assert look(tokenized, again, monkeypatch, "killed", runs=12)["runs"] == whole["runs"][:12]
    assert read_report(tokenized.parent / "killed")["counters"] == {"proxy runs": 12}
    assert look(tokenized, longer, monkeypatch, "killed", runs=14) == whole
    report = read_report(tokenized.parent / "killed")
    assert report["counters"] == {"proxy runs": 14}
    assert report["conclusion"] == whole["conclusion"]
    assert (killed.done, again.done, longer.done) == ([*range(9)], [9, 10, 11], [12, 13])
    same = look(tokenized, Proxies(surface), monkeypatch, "same", runs=14)
    assert same == whole
    assert files_of(tokenized.parent / "same") == files_of(tokenized.parent / "whole")
    with pytest.raises(DataError, match="seed"):
        look(tokenized, longer, monkeypatch, "killed", seed=3)


def test_mixtures_stay_below_the_caps(tokenized: Path) -> None:
    chosen = settings(token_budget=9000, max_epochs=3, source_epochs={"noise": 1}, concentrations=[0.3, 5])
    prior = Prior(chosen, read_groups(tokenized))
    drawn = np.concatenate([[prior.mixture(n) for n in range(50)], prior.candidates(50)])
    limits = np.array([3, 1, 3]) * SIZES * 9604 / 9000
    assert drawn.sum(axis=1) == pytest.approx(1, abs=3e-6)
    assert (drawn <= limits + 1e-6).all()
    assert (drawn > 0).all()
    assert (drawn.max(axis=0) > limits - 1e-5).any()
    assert len({tuple(row) for row in drawn.tolist()}) > 90
    free = Prior(settings(), read_groups(tokenized))
    assert free.mixture(0) == pytest.approx(SIZES, abs=1e-6)
    centre = SIZES**0.5 / (SIZES**0.5).sum()
    assert free.candidates(400).mean(axis=0) == pytest.approx(0.98 * centre + 0.02 * SIZES, abs=0.05)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target": {"cod": 1}}, "did you mean 'code'"),
        ({"source_epochs": {"wbe": 1}}, "did you mean 'web'"),
        ({"token_budget": 10**6}, "use at most 384"),
        ({"proxy": {"seq_len": 1650}}, "two sources"),
        ({"target": {"web": 1}, "proxy": {"seq_len": 150}}, "'web', whose held-out"),
    ],
)
def test_mistakes(tokenized: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        look(tokenized, Proxies(surface), monkeypatch, **more)


@pytest.mark.slow
def test_a_real_proxy_learns_what_it_is_given(tokenized: Path) -> None:
    proxy = ProxySettings(
        hidden_size=32, num_layers=1, seq_len=32, steps=40, lr=1e-2, overrides=("train.z_loss=0.0",)
    )
    weights = {"code": 0.9, "noise": 0.02, "web.q0": 0.04, "web.q1": 0.04}
    losses = train_proxy(proxy, read_groups(tokenized), weights, tokenized.parent / "runs" / "proxy-00000")
    assert list(losses) == SOURCES
    assert losses["code"] < 3.5 < 5 < losses["noise"]
    assert list((tokenized.parent / "runs").iterdir()) == []


def test_a_proxy_that_cannot_run_says_why(tokenized: Path) -> None:
    proxy = ProxySettings(seq_len=SEQ, overrides=("train.stesp=3",))
    weights = dict.fromkeys(GROUPS, 0.25)
    with pytest.raises(DataError, match=r"proxy-00007 ended with code 2: .*did you mean train.steps"):
        train_proxy(proxy, read_groups(tokenized), weights, tokenized.parent / "proxy-00007")


def test_a_proxy_is_alone_on_the_gpu_of_its_rank() -> None:
    launched = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_PORT": "1", "HOME": "/h", "LOCAL_RANK": "1"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert _environment(launched) == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "1", **threads}
    shown = _environment(launched | {"CUDA_VISIBLE_DEVICES": "4,6"})
    assert shown["CUDA_VISIBLE_DEVICES"] == "6"
    assert _environment({"HOME": "/h"}) == {"HOME": "/h", **threads}


# --- the regression ---------------------------------------------------------------------------------


def random_runs(count: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet([1.0, 1.0, 1.0], count)
    losses = np.array([sum(surface(row).values()) for row in shares])
    return shares, losses + 0.01 * rng.standard_normal(count)


def test_selection_is_by_leaving_each_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, losses = random_runs(12)
    chosen = select(shares, losses)
    # The closed form holds for features whose standardisation stays; so the reference keeps it, too.
    errors = {}
    for features in FEATURES:
        x = FEATURES[features](shares)
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        x1 = np.concatenate([np.ones((12, 1)), x], axis=1)
        for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
            penalty = np.diag([0.0, *[ridge * 12] * x.shape[1]])
            total = 0.0
            for out in range(12):
                rest = np.arange(12) != out
                beta = np.linalg.solve(x1[rest].T @ x1[rest] + penalty, x1[rest].T @ losses[rest])
                total += float((losses[out] - x1[out] @ beta) ** 2)
            errors[features, ridge] = total
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-6)


def test_a_fit_without_shrinkage_is_least_squares() -> None:
    shares, losses = random_runs(30)
    model = fit(shares, losses, "log shares", 1e-12)
    x = np.concatenate([np.ones((30, 1)), np.log(shares + 0.01)], axis=1)
    beta = np.linalg.lstsq(x, losses, rcond=None)[0]
    assert model.predict(shares) == pytest.approx(x @ beta, abs=1e-6)


def test_cross_validation_tells_a_law_from_chance() -> None:
    shares, losses = random_runs(48)
    power = cross_validate(shares, losses, 0)
    assert power.r2 > 0.9 < power.spearman
    assert power.error == pytest.approx(((1 - power.r2) * losses.var()) ** 0.5)
    chance = [
        cross_validate(shares, np.random.default_rng(seed).standard_normal(48), seed) for seed in range(5)
    ]
    assert max(each.r2 for each in chance) < 0.2
    assert cross_validate(shares, np.ones(48), 0) == Power(0.0, 0.0, 0.0)


def test_rank_correlation() -> None:
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 6, 9])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([9.0, 6, 5])) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: products add up to 3, squares to 4.5 and 5.
    found = spearman(np.array([1.0, 2, 2, 7]), np.array([0.2, 0.1, 0.3, 0.4]))
    assert found == pytest.approx(3 / (4.5 * 5) ** 0.5)
