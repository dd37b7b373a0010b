"""The detector on simulated runs: no false alarm on clean ones, none missed of those that BLOOM met.

The noise is Student's t with 6 degrees of freedom around curves that fall like a real run's: of the
logarithm of the loss 1% (and 2%), of the gradient norm 10% (and 20%). Its tails are heavier than those of
any run of ours that was recorded.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from megalite.config import ResilienceConfig
from megalite.resilience.spike import BLOCK, MIN_HISTORY, SpikeDetector
from tests.daily import one_a_day

# Loss and gradient norm as the BLOOM run reported them.
BLOOM_LOSS = [2.20, 2.30, 2.60, 3.40, 4.30, 5.10]
BLOOM_NORM = [0.24, 0.95, 2.4, 16.0, 145.0, 960.0]


def clean(steps: int, seed: int, loss_noise: float = 0.01, norm_noise: float = 0.1) -> np.ndarray:
    """Loss and gradient norm of a healthy run that has been going for a while; float64 [steps, 2]."""
    rng = np.random.default_rng(seed)
    time = 1 + np.arange(steps) / 500
    fall = np.log(2.0 + 0.2 * time**-0.5), np.log(0.2 + 0.04 * time**-0.5)
    noise = rng.standard_t(6, (2, steps)) / math.sqrt(6 / 4)
    scales = np.array([[loss_noise], [norm_noise]])
    return np.exp(np.array(fall) + scales * noise).T


def refused(detector: SpikeDetector, values: np.ndarray) -> list[int]:
    """Indices of the steps that were not accepted."""
    found = []
    for step, (loss, norm) in enumerate(values.tolist()):
        if detector.judge(loss, norm) == "healthy":
            detector.accept(step + 1, loss, norm)
        else:
            found.append(step)
        assert detector.slow_onset is None
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("loss_noise", "norm_noise"), [(0.01, 0.1), (0.02, 0.2)])
def test_at_most_one_false_alarm_in_40000_clean_steps(loss_noise: float, norm_noise: float) -> None:
    found = [
        step
        for seed in range(4)
        for step in refused(SpikeDetector(ResilienceConfig()), clean(10_000, seed, loss_noise, norm_noise))
    ]
    assert len(found) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_bloom_s_spike_and_a_smaller_one_after_it(seed: int) -> None:
    """Both are refused within two steps of their onset, the second with the first one's window."""
    values = clean(600, seed)
    first, second = 400, 460
    # A run that is not stopped: once up, it comes down slowly.
    for place, loss, norm in zip(range(first + 1, first + 6), BLOOM_LOSS[1:], BLOOM_NORM[1:], strict=True):
        values[place] = loss, norm
    values[first + 6 : first + 20, 0] = np.linspace(5.0, 3.2, 14)
    values[second : second + 10, 0] = 3.2
    found = refused(SpikeDetector(ResilienceConfig()), values)
    assert first + 1 <= found[0] <= first + 2
    assert second in found
    assert len([step for step in found if step < first]) == 0


def test_a_refused_value_never_enters_the_window() -> None:
    detector = SpikeDetector(ResilienceConfig())
    refused(detector, clean(300, 0))
    before = detector.state()
    for _ in range(1000):
        assert detector.judge(9.0, 50.0) == "wild"
    assert detector.state() == before


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_refused_at_once(values: tuple[float, float]) -> None:
    assert SpikeDetector(ResilienceConfig()).judge(*values) == "not finite"


def test_nothing_else_is_refused_before_there_is_a_history() -> None:
    detector = SpikeDetector(ResilienceConfig())
    for step, (loss, norm) in enumerate(clean(MIN_HISTORY - 1, 0).tolist()):
        detector.accept(step + 1, loss, norm)
    assert detector.judge(1e6, 1e6) == "healthy"
    detector.accept(MIN_HISTORY, 2.2, 0.24)
    assert detector.judge(1e6, 1e6) == "wild"


def test_a_calm_run_may_still_rise_a_little() -> None:
    detector = SpikeDetector(ResilienceConfig())
    for step in range(100):
        detector.accept(step + 1, 2.0, 0.5)
    assert detector.judge(2.09, 0.99) == "healthy"
    assert detector.judge(2.11, 0.5) == "wild"
    assert detector.judge(2.0, 1.01) == "wild"


@pytest.mark.parametrize("seed", one_a_day(*range(20)))
def test_a_slow_divergence_is_found_with_its_onset(seed: int) -> None:
    """A third more loss over a thousand steps, never a wild step among them."""
    onset = 2000
    values = clean(4000, seed)
    values[onset:, 0] *= np.exp(np.linspace(0, 0.6, 2000))
    detector, found, wild = SpikeDetector(ResilienceConfig()), None, 0
    for step, (loss, norm) in enumerate(values.tolist()):
        wild += detector.judge(loss, norm) == "wild"
        detector.accept(step + 1, loss, norm)
        if detector.slow_onset is not None:
            found = step
            break
    assert found is not None
    assert wild <= 1
    assert found < onset + 700
    assert detector.slow_onset is not None
    assert abs(detector.slow_onset - onset) <= 20 * BLOCK


@pytest.mark.slow
def test_a_noisy_loss_climbs_nowhere() -> None:
    """Of batches of a few hundred tokens: a tenth up or down from step to step."""
    for seed in range(4):
        refused(SpikeDetector(ResilienceConfig()), clean(10_000, seed, 0.13, 0.1))  # asserts that it does not


def test_a_climb_is_judged_once_eight_blocks_are_known() -> None:
    detector, found = SpikeDetector(ResilienceConfig()), []
    for block in range(9):
        for step in range(block * BLOCK, (block + 1) * BLOCK):
            detector.accept(step + 1, 3.0 if block else 1.0, 1.0)
        found.append(detector.slow_onset)
    assert found == [None] * 7 + [BLOCK] * 2


def test_a_climb_that_ends_is_none() -> None:
    values = clean(3000, 3)
    values[1000:1200, 0] *= np.exp(np.linspace(0, 0.08, 200))
    assert refused(SpikeDetector(ResilienceConfig()), values) == []


def test_the_state_goes_through_a_checkpoint() -> None:
    values = clean(70 * BLOCK, 5)  # more than is remembered of steps, and of blocks
    whole, first, second, fresh = (SpikeDetector(ResilienceConfig()) for _ in range(4))
    for step, (loss, norm) in enumerate(values.tolist()):
        whole.accept(step + 1, loss, norm)
        (first if step < 333 else second).accept(step + 1, loss, norm)
        if step == 332:
            second.load(first.state())
    assert second.state() == whole.state()
    whole.forget()
    assert whole.state() == fresh.state()


def test_zero_turns_either_test_off() -> None:
    detector = SpikeDetector(ResilienceConfig(spike_threshold=0, slow_divergence=0))
    values = clean(1000, 0)
    values[500:, 0] *= np.exp(np.linspace(0, 1.0, 500))
    assert refused(detector, values) == []
    assert detector.judge(math.nan, 1.0) == "not finite"
