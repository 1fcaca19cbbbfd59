"""Measures against hand-computed cases and the properties that define them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cpd.evaluation import intervals, measures

NAN = float("nan")


@dataclass(frozen=True)
class Row:
    stage: int | None
    task: str
    episodes: int
    successes: int
    goal_set: str = "held_out"

    @property
    def total(self) -> int:
        return self.successes


STREAM = ("a", "b", "c")
RATES = np.array(
    [
        [0.0, 0.1, 0.0],
        [0.9, 0.1, 0.0],
        [0.7, 0.8, 0.2],
        [0.5, 0.9, 1.0],
    ]
)
ALL = np.array([True, True, True])


def test_success_matrix_places_counts_and_leaves_gaps() -> None:
    rows = [
        Row(-1, "a", 10, 1),
        Row(0, "a", 50, 45),
        Row(2, "b", 50, 25),
        Row(2, "b", 50, 50, goal_set="training"),
    ]
    matrix = measures.success_matrix(rows, STREAM, "held_out")
    assert matrix.tasks == STREAM
    assert matrix.rates[0, 0] == 0.1
    assert matrix.rates[1, 0] == 0.9
    assert matrix.rates[3, 1] == 0.5
    assert np.isnan(matrix.rates).sum() == 12 - 3
    assert measures.success_matrix(rows, STREAM, "training").rates[3, 1] == 1.0


@pytest.mark.parametrize("row", [Row(3, "a", 1, 0), Row(0, "z", 1, 0), Row(None, "a", 1, 0), Row(0, "a", 1, 0)])
def test_success_matrix_refuses_rows_outside_the_stream_and_second_rows_of_a_cell(row: Row) -> None:
    with pytest.raises(ValueError, match=f"stage {row.stage}, task '{row.task}'"):
        measures.success_matrix([Row(0, "a", 1, 1), row], STREAM, "held_out")


def test_average_performance_counts_a_missing_teacher_as_zero() -> None:
    assert measures.average_performance(RATES[-1], ALL) == pytest.approx(0.8)
    # The student's .9 on b does not count once b has no admitted teacher.
    assert measures.average_performance(RATES[-1], np.array([True, False, True])) == pytest.approx(0.5)


def test_forgetting_by_hand() -> None:
    result = measures.forgetting(RATES, STREAM, ALL, final=2)
    np.testing.assert_allclose(result.per_task, [0.4, -0.1, 0.0])
    assert result.mean == pytest.approx(0.15)
    assert result.over_all == pytest.approx(0.1)
    assert result.worst == 0
    # max: a .9 over stages 0 and 1, b .8 at stage 1 alone
    assert result.max_based == pytest.approx((0.4 - 0.1) / 2)


def test_a_repeated_task_counts_from_its_own_last_stage() -> None:
    stream = ("a", "b", "a", "b")
    rates = np.array([[0, 0], [1.0, 0.0], [0.4, 0.9], [0.8, 0.5], [0.6, 0.7]])
    assert measures.own_stages(stream).tolist() == [2, 3]
    result = measures.forgetting(rates, stream, np.array([True, True]), final=3)
    np.testing.assert_allclose(result.per_task, [0.2, 0.0])
    assert result.mean == pytest.approx(0.2)
    assert result.over_all == pytest.approx(0.1)
    assert result.max_based == pytest.approx(0.4)


def test_tasks_without_a_teacher_stay_out_of_forgetting_and_recovery() -> None:
    admitted = np.array([True, False, True])
    result = measures.forgetting(RATES, STREAM, admitted, final=2)
    assert np.isnan(result.per_task[1])
    assert result.mean == pytest.approx(0.4)
    assert result.over_all == pytest.approx(0.2)
    share = measures.recovery(RATES[-1], np.array([1.0, NAN, 0.8]), admitted)
    assert share.mean == pytest.approx((0.5 + 1.0) / 2)
    assert share.unclipped == pytest.approx((0.5 + 1.25) / 2)


def test_forgetting_of_a_single_task_is_undefined() -> None:
    result = measures.forgetting(np.array([[0.0], [1.0]]), ("a",), np.array([True]), final=0)
    assert np.isnan(result.mean)
    assert result.worst is None


def test_final_stage_follows_skipped_and_missing_stages() -> None:
    assert measures.final_stage(RATES, STREAM, ALL) == 2
    unfinished = RATES.copy()
    unfinished[3] = NAN
    assert measures.final_stage(unfinished, STREAM, ALL) is None
    # c has no teacher: its stage is skipped, so that stage 1 is the last one.
    assert measures.final_stage(unfinished, STREAM, np.array([True, True, False])) == 1
    assert measures.final_stage(RATES, STREAM, np.array([True, True, False])) == 2


def test_recovery_by_hand() -> None:
    teacher = np.array([1.0, 0.9, 0.8])
    result = measures.recovery(RATES[-1], teacher, ALL)
    np.testing.assert_allclose(result.per_task, [0.5, 1.0, 1.25])
    assert result.mean == pytest.approx(2.5 / 3)
    assert result.unclipped == pytest.approx(2.75 / 3)
    assert result.ratio_of_means == pytest.approx(2.4 / 2.7)
    assert result.worst == 0


def test_recovery_leaves_out_a_teacher_that_never_succeeds() -> None:
    result = measures.recovery(np.array([0.5, 0.5]), np.array([0.0, 1.0]), np.array([True, True]))
    assert np.isnan(result.per_task[0])
    assert result.mean == 0.5
    assert np.isnan(measures.recovery(np.array([0.5]), np.array([0.0]), np.array([True])).mean)


def test_an_unmeasured_cell_is_never_averaged_away() -> None:
    rates = RATES.copy()
    rates[3, 0] = NAN
    assert np.isnan(measures.average_performance(rates[3], ALL))
    assert np.isnan(measures.forgetting(rates, STREAM, ALL, final=2).mean)
    assert np.isnan(measures.recovery(rates[3], np.ones(3), ALL).mean)


def test_area_under_curve() -> None:
    assert measures.area_under_curve([0, 50, 100], [0.0, 1.0, 1.0], 100) == pytest.approx(0.75)
    assert measures.area_under_curve([50], [0.4], 100) == pytest.approx(0.4)
    assert measures.area_under_curve([20, 60], [0.0, 1.0], 100) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"100.*\[50, 50\]"):
        measures.area_under_curve([50, 50], [0.0, 1.0], 100)
    with pytest.raises(ValueError, match=r"100.*\[\]"):
        measures.area_under_curve([], [], 100)


def test_forward_transfer_leaves_out_saturated_baselines() -> None:
    at_most = np.array([0.95, 0.95, 0.95])
    gains, left_out = measures.forward_transfer(np.array([[0.8, 0.5, 0.99]]), np.array([0.6, 0.6, 0.95]), at_most)
    np.testing.assert_allclose(gains, [[0.5, -0.25, np.nan]])
    assert left_out.tolist() == [False, False, True]
    gains, left_out = measures.forward_transfer(np.array([0.8, np.nan]), np.array([1.0, 0.5]), np.ones(2))
    assert np.isnan(gains).all()
    assert left_out.tolist() == [True, False]


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I (method 3)
    for successes, episodes, expected in [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ]:
        np.testing.assert_allclose(intervals.wilson(successes, episodes), expected, atol=5e-5)
    assert np.isnan(intervals.wilson(0, 0)).all()


def test_difference_interval_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II (method 10): 56/70 - 48/80 and 10/10 - 0/10
    for (x, m), (y, n), expected in [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ]:
        first = (np.float64(x / m), *intervals.wilson(x, m))
        second = (np.float64(y / n), *intervals.wilson(y, n))
        np.testing.assert_allclose(intervals.difference_interval(first, second), expected, atol=5e-5)


counts = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_wilson_contains_the_rate(count: tuple[int, int]) -> None:
    low, high = intervals.wilson(*count)
    assert 0 <= low <= count[0] / count[1] <= high <= 1
    mirrored = intervals.wilson(count[1] - count[0], count[1])
    np.testing.assert_allclose((1 - high, 1 - low), mirrored, atol=1e-12)


@given(counts, counts)
def test_difference_and_ratio_contain_their_estimates(first: tuple[int, int], second: tuple[int, int]) -> None:
    one = (np.array([first[0] / first[1]]), *(np.atleast_1d(v) for v in intervals.wilson(*first)))
    two = (np.array([second[0] / second[1]]), *(np.atleast_1d(v) for v in intervals.wilson(*second)))
    low, high = intervals.difference_interval(one, two)
    assert -1 - 1e-12 <= low <= one[0] - two[0] <= high <= 1 + 1e-12
    if second[0]:
        low, high = intervals.ratio_interval(one, two)
        assert 0 <= low <= one[0] / two[0] + 1e-12
        assert high >= one[0] / two[0] - 1e-12


def test_ratio_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(0)
    true_one, true_two, n = 0.75, 0.95, 50
    x, y = rng.binomial(n, true_one, 4_000), rng.binomial(n, true_two, 4_000)
    low, high = intervals.ratio_interval((x / n, *intervals.wilson(x, n)), (y / n, *intervals.wilson(y, n)))
    coverage = ((low <= true_one / true_two) & (true_one / true_two <= high)).mean()
    assert 0.93 < coverage < 0.98


def test_mean_interval_covers_the_mean_of_rates() -> None:
    rng = np.random.default_rng(1)
    true = np.array([0.2, 0.6, 0.9, 0.99, 1.0])
    hits = 0
    for _ in range(2_000):
        x = rng.binomial(50, true)
        low, high = intervals.mean_interval(x / 50, *intervals.wilson(x, 50))
        hits += low <= true.mean() <= high
    assert 0.93 < hits / 2_000 < 0.995


unit = st.floats(0, 1, width=32)


@st.composite
def score_tables(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    return draw(arrays(np.float64, shape, elements=unit))


@given(score_tables())
def test_aggregates_lie_in_order(scores: np.ndarray) -> None:
    assert intervals.lowest_task(scores) <= intervals.mean_score(scores) + 1e-12
    assert intervals.mean_score(scores) <= intervals.highest_task(scores) + 1e-12
    assert scores.min() - 1e-12 <= intervals.interquartile_mean(scores) <= scores.max() + 1e-12
    result = intervals.over_seeds(scores, intervals.mean_score, num_resamples=200)
    assert len(result.per_seed) == len(scores)
    assert np.mean(result.per_seed) == pytest.approx(result.estimate)
    if len(scores) < intervals.FEW_SEEDS:
        assert result.low is None
    else:
        assert result.low is not None
        assert result.high is not None
        assert scores.min() - 1e-9 <= result.low <= result.high <= scores.max() + 1e-9


@given(score_tables(), st.randoms(use_true_random=False))
def test_measures_do_not_depend_on_the_order_of_seeds(scores: np.ndarray, random: object) -> None:
    order = list(range(len(scores)))
    random.shuffle(order)
    for statistic in (
        intervals.mean_score,
        intervals.interquartile_mean,
        intervals.lowest_task,
        intervals.highest_task,
    ):
        assert statistic(scores[order]) == pytest.approx(statistic(scores))


def test_interquartile_mean_by_hand() -> None:
    assert intervals.interquartile_mean(np.array([[0.0, 0.2, 0.6, 1.0]])) == pytest.approx(0.4)
    # 5 scores: one is cut from either end, as scipy's trim_mean does.
    assert intervals.interquartile_mean(np.array([[0.0, 0.3, 0.6, 0.9, 1.0]])) == pytest.approx(0.6)


def test_bootstrap_is_seeded_and_draws_seeds_with_all_their_tasks() -> None:
    scores = np.random.default_rng(3).normal(0.5, 0.1, (20, 4))
    first = intervals.over_seeds(scores, intervals.mean_score, 4_000)
    assert first == intervals.over_seeds(scores, intervals.mean_score, 4_000)
    standard_error = scores.mean(axis=1).std() / np.sqrt(len(scores))
    assert first.high - first.low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)
    # If all tasks of a seed have the same score, ten tasks say no more than one.
    together = np.tile(scores[:, :1], (1, 10))
    alone = intervals.over_seeds(scores[:, :1], intervals.mean_score, 4_000)
    every = intervals.over_seeds(together, intervals.mean_score, 4_000)
    assert (every.low, every.high) == pytest.approx((alone.low, alone.high))
    # If all seeds agree, the interval has no width, however much tasks differ.
    constant = np.tile([0.0, 0.5, 1.0], (6, 1))
    result = intervals.over_seeds(constant, intervals.mean_score, 100)
    assert result.low == result.high == pytest.approx(0.5)


@given(score_tables(), st.integers(1, 4))
def test_probability_of_improvement_is_antisymmetric(scores: np.ndarray, num_other: int) -> None:
    other = np.random.default_rng(num_other).random((num_other, scores.shape[1])).round(1)
    forth = intervals.probability_of_improvement(scores, other)
    assert forth + intervals.probability_of_improvement(other, scores) == pytest.approx(1.0)
    assert intervals.probability_of_improvement(scores, scores) == pytest.approx(0.5)
    assert intervals.probability_of_improvement(scores + 2, other) == 1.0
