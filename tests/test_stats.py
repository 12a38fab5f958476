"""The statistics are what they are by hand, and find what a simulation put in."""
import math

import numpy as np
import pytest

from lab.judges import agreement
from lab.reliability import variance_components
from support.stats import bootstrap_ci, forgetting, mean_ci, over_streams, share_changed

# ------------------------------------------------------------------------------- intervals

def test_the_bootstrap_interval_is_the_normal_one_where_there_are_many_values():
    low, high = bootstrap_ci([0, 1] * 100)

    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 200 ** 0.5, abs=0.01)
    assert high == pytest.approx(1 - low, abs=0.01)


def test_a_lower_level_makes_a_narrower_interval():
    low, high = bootstrap_ci([0, 1] * 100, level=0.5)

    assert low == pytest.approx(0.5 - 0.674 * 0.5 / 200 ** 0.5, abs=0.01)
    assert high == pytest.approx(1 - low, abs=0.01)


def test_the_bootstrap_interval_of_one_value_is_that_value():
    assert bootstrap_ci([0.3]) == [0.3, 0.3]


def test_the_bootstrap_interval_is_the_same_each_time():
    values = [0.1, 0.5, 0.2, 0.9]

    assert bootstrap_ci(values) == bootstrap_ci(values)


def test_the_interval_over_runs_is_students():
    mean, half = mean_ci([[0.1, 1.0], [0.2, 1.0], [0.3, 1.0]])

    assert mean == pytest.approx([0.2, 1])
    assert half == pytest.approx([4.30 * 0.1 / 3 ** 0.5, 0])


def test_one_run_has_no_interval():
    mean, half = mean_ci([[0.1, 0.4]])

    assert mean == pytest.approx([0.1, 0.4])
    assert np.isnan(half).all()


# ------------------------------------------------------------------------------- gains, losses

def test_shares_of_what_was_gained_and_lost():
    pairs = [(True, True), (True, False), (True, True), (True, True), (False, True), (False, False)]

    assert share_changed(pairs, known=True) == 1 / 4
    assert share_changed(pairs, known=False) == 1 / 2


def test_where_nothing_was_known_no_share_was_lost():
    assert math.isnan(share_changed([(False, True)], known=True))


def test_means_and_standard_errors_over_streams():
    mean, error = over_streams([[0.2, 1.0], [0.4, 1.0]])

    assert mean == pytest.approx([0.3, 1.0])
    assert error == pytest.approx([0.1, 0.0])       # 0.1 * sqrt(2) / sqrt(2)


def test_one_stream_has_no_standard_error():
    mean, error = over_streams([[0.2, 1.0]])

    assert mean == [0.2, 1.0]
    assert np.isnan(error).all()


def test_forgetting_by_hand():
    """Two streams of two passages."""
    before = [[0.0, 0.2], [0.4, 0.2]]
    after_one = [[0.6], [0.8]]
    after_two = [[0.2, 0.5], [0.4, 0.7]]

    found = forgetting([before, after_one, after_two])

    # Per stream: before 0.1, 0.3; just after its own edit (0.6 + 0.5) / 2, (0.8 + 0.7) / 2; after
    # the last edit 0.35, 0.55.
    (mean, error), (mean_one, error_one), (mean_two, _) = found["matrix"]
    assert mean == pytest.approx([0.2, 0.2])
    assert error == pytest.approx([0.2, 0])
    assert mean_one == pytest.approx([0.7])
    assert error_one == pytest.approx([0.1])
    assert mean_two == pytest.approx([0.3, 0.6])
    expected = {
        "before any edit": (0.2, 0.1),
        "just after its own edit": (0.65, 0.1),
        "after the last edit": (0.45, 0.1),
        "gain just after its own edit": (0.45, 0),
        "what is left of it after the last edit": (0.25, 0),
        "forgotten since its own edit": (0.2, 0)}
    for what, (mean, error) in expected.items():
        assert found[what][0] == pytest.approx(mean)
        assert found[what][1] == pytest.approx(error, abs=1e-9)


# ------------------------------------------------------------------------------- reliability

NOISE = "standard deviation of one inner loop, over seeds"
SPREAD = "true standard deviation between the self-edits of a passage"
CHOSEN = "the best of K, by the seeds that chose it"
HELD_OUT = "the best of K, chosen without one seed, by that seed"


def reliability(n):
    return f"reliability of a {n}-seed mean, among the edits of a passage"


def test_variance_components_by_hand():
    """Two self-edits with two seeds: what one seed prefers, the other one does not."""
    found = variance_components([np.array([[0.0, 1.0], [1.0, 0.0]])])

    assert list(found) == [NOISE, SPREAD, reliability(2), "mean reward", CHOSEN, HELD_OUT]
    assert found[NOISE] == pytest.approx(0.5 ** 0.5)
    assert found[SPREAD] == 0
    assert found[reliability(2)] == 0
    assert found["mean reward"] == 0.5
    assert found[CHOSEN] == 0.5
    assert found[HELD_OUT] == 0


def test_rewards_without_noise_are_wholly_reliable():
    found = variance_components([np.array([[0.2, 0.2], [0.6, 0.6]])])

    assert found[NOISE] == 0
    assert found[SPREAD] == pytest.approx(0.08 ** 0.5)      # the variance of 0.2 and 0.6
    assert found[reliability(2)] == 1
    assert found[CHOSEN] == 0.6
    assert found[HELD_OUT] == 0.6


def test_equal_rewards_have_no_reliability():
    assert np.isnan(variance_components([np.full((3, 2), 0.5)])[reliability(2)])


def test_one_self_edit_a_passage_has_no_spread():
    assert variance_components([np.array([[0.2, 0.4]])])[SPREAD] == 0


def test_variance_components_find_what_a_simulation_put_in():
    """Rewards with a known spread between self-edits and between seeds. The best of K is worth less
    than the seeds that chose it say."""
    rng = np.random.default_rng(0)
    truth = 0.1 * rng.standard_normal((4000, 5))
    noisy = []
    for of_passage in truth:
        noisy.append(of_passage[:, None] + 0.2 * rng.standard_normal((5, 3)))

    found = variance_components(noisy)

    assert found[NOISE] == pytest.approx(0.2, rel=0.03)
    assert found[SPREAD] == pytest.approx(0.1, rel=0.05)
    assert found[reliability(3)] == pytest.approx(0.01 / (0.01 + 0.04 / 3), abs=0.03)
    assert found["mean reward"] == pytest.approx(0, abs=0.01)
    assert found[CHOSEN] > 0.15
    assert found[HELD_OUT] < 0.15
    # What the choice of two seeds is truly worth.
    worth = []
    for of_passage, seeds in zip(truth, noisy):
        best = seeds[:, :2].mean(axis=1).argmax()
        worth.append(of_passage[best])
    assert found[HELD_OUT] == pytest.approx(np.mean(worth), abs=0.01)


# ------------------------------------------------------------------------------- agreement

def test_agreement_by_hand():
    assert agreement([1, 1, 0, 0], [1, 1, 0, 0]) == (1, 1)
    assert agreement([1, 1, 0, 0], [1, 0, 1, 0]) == (0.5, 0)    # as chance would have it
    assert agreement([1, 1, 0, 0], [0, 0, 1, 1]) == (0, -1)


def test_kappa_of_a_textbook():
    """Of 100 verdicts 45 are a common yes and 15 a common no."""
    a = [1] * 45 + [0] * 15 + [1] * 25 + [0] * 15
    b = [1] * 60 + [0] * 40

    observed, kappa = agreement(a, b)

    assert observed == pytest.approx(0.6)
    assert kappa == pytest.approx(0.1304, abs=1e-4)


def test_judges_that_always_say_the_same_agree():
    assert agreement([0, 0], [0, 0]) == (1, 1)
