"""DPP selection against brute force over all subsets, and against greedy choice by recomputed determinants."""

from __future__ import annotations

import math
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cpd.distill.memory import dpp
from cpd.distill.memory.dpp import (
    Similarity,
    greedy_map,
    median_bandwidth,
    preselect,
    rbf_similarity,
    select,
    standardise,
)
from cpd.student.observations import observation_scaling

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, num_candidates: int, num_features: int) -> tuple[Similarity, np.ndarray]:
    """Random candidates with qualities from 1/3 to 3."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_candidates, num_features))
    quality = 3.0 ** rng.uniform(-1, 1, num_candidates)
    return rbf_similarity(features, median_bandwidth(features, rng)), quality


def dense_kernel(similarity: Similarity, quality: np.ndarray) -> np.ndarray:
    """L, written down from its definition."""
    x, n = similarity.features, len(similarity)

    def entry(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-((a - b) ** 2).sum() / 2)

    similarities = np.array([[entry(x[i], x[j]) for j in range(n)] for i in range(n)])
    similarities += similarity.jitter * np.eye(n)
    return np.diag(quality) @ similarities @ np.diag(quality)


def log_det(kernel: np.ndarray, chosen: list[int]) -> float:
    sign, value = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])
    return float(value) if sign > 0 else -math.inf


def naive_greedy(kernel: np.ndarray, num_items: int) -> tuple[list[int], float]:
    """Greedy selection with every determinant recomputed, and the closest call: best minus second best."""
    chosen: list[int] = []
    closest = math.inf
    for _ in range(num_items):
        gains = {i: log_det(kernel, [*chosen, i]) for i in range(len(kernel)) if i not in chosen}
        best, *others = sorted(gains, key=lambda i: -gains[i])
        if others:
            closest = min(closest, gains[best] - gains[others[0]])
        chosen.append(best)
    return chosen, closest


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_argmax_of_the_gain_at_every_step(seed: int) -> None:
    similarity, quality = draw(seed, 40, 16)
    expected, closest = naive_greedy(dense_kernel(similarity, quality), 14)
    assert closest > 1e-9
    assert greedy_map(similarity, quality, 14).tolist() == expected


@pytest.mark.parametrize(("num_contenders", "max_block"), [(1, 1), (4, 3), (30, 64), (200, 5)])
def test_looking_at_few_contenders_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, num_contenders: int, max_block: int
) -> None:
    similarity, quality = draw(3, 150, 40)
    expected, closest = naive_greedy(dense_kernel(similarity, quality), 20)
    assert closest > 1e-9
    monkeypatch.setattr(dpp, "NUM_CONTENDERS", num_contenders)
    monkeypatch.setattr(dpp, "MAX_BLOCK", max_block)
    assert greedy_map(similarity, quality, 20).tolist() == expected


def test_greedy_over_thousands_equals_greedy_over_the_whole_matrix() -> None:
    similarity, quality = draw(11, 1300, 12)
    kernel = similarity.matrix() * np.outer(quality, quality)
    variance, chosen = np.diag(kernel).copy(), []
    for _ in range(100):  # Gaussian elimination of the chosen one's row
        item = int(np.argmax(variance))
        chosen.append(item)
        kernel -= np.outer(kernel[:, item], kernel[item] / kernel[item, item])
        variance = np.diag(kernel).copy()
        variance[chosen] = 0
    assert greedy_map(similarity, quality, 100).tolist() == chosen


def test_greedy_comes_close_to_the_likeliest_set() -> None:
    shortfalls, hits = [], 0
    for seed in range(20):
        similarity, quality = draw(seed, 10, 5)
        kernel = dense_kernel(similarity, quality)
        best = max(log_det(kernel, list(s)) for s in combinations(range(10), 4))
        shortfalls.append(best - log_det(kernel, greedy_map(similarity, quality, 4).tolist()))
        hits += shortfalls[-1] < 1e-12
    assert min(shortfalls) > -1e-9
    assert max(shortfalls) < 0.5
    assert hits >= 10


@settings(deadline=None, max_examples=25)
@given(seed=seeds, shorter=st.integers(0, 10), longer=st.integers(0, 10))
def test_a_prefix_is_the_choice_for_a_smaller_budget(seed: int, shorter: int, longer: int) -> None:
    similarity, quality = draw(seed, 25, 10)
    shorter, longer = sorted((shorter, longer))
    order = greedy_map(similarity, quality, longer)
    assert order.dtype == np.int64 and len(set(order.tolist())) == longer
    assert np.array_equal(order[:shorter], greedy_map(similarity, quality, shorter))


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_the_order_of_the_candidates_does_not_matter(seed: int) -> None:
    similarity, quality = draw(seed, 20, 9)
    order, closest = naive_greedy(dense_kernel(similarity, quality), 8)
    assume(closest > 1e-8)
    permutation = np.random.default_rng(seed).permutation(20)
    permuted = greedy_map(similarity.take(permutation), quality[permutation], 8)
    assert permutation[permuted].tolist() == order


@settings(deadline=None, max_examples=25)
@given(seed=seeds, exponent=st.floats(-100, 100))
def test_scaling_all_qualities_changes_nothing(seed: int, exponent: float) -> None:
    similarity, quality = draw(seed, 20, 9)
    scaled = quality * 10.0**exponent
    assert np.array_equal(greedy_map(similarity, quality, 8), greedy_map(similarity, scaled, 8))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, copies=st.lists(st.integers(1, 4), min_size=2, max_size=12))
def test_copies_come_after_all_distinct_candidates(seed: int, copies: list[int]) -> None:
    rng = np.random.default_rng(seed)
    distinct = rng.normal(size=(len(copies), 6))
    kind = rng.permutation(np.repeat(np.arange(len(copies)), copies))
    similarity = rbf_similarity(distinct[kind], median_bandwidth(distinct, rng))
    order = greedy_map(similarity, 3.0 ** rng.uniform(-1, 1, len(copies))[kind], len(kind))
    assert set(kind[order[: len(copies)]].tolist()) == set(range(len(copies)))
    assert sorted(order.tolist()) == list(range(len(kind)))


def test_ties_go_to_the_lowest_index() -> None:
    corners = np.eye(6)
    assert greedy_map(rbf_similarity(corners, 1.0), np.ones(6), 6).tolist() == [0, 1, 2, 3, 4, 5]
    twice = np.concatenate([corners, corners])[::-1]
    assert greedy_map(rbf_similarity(twice, 1.0), np.ones(12), 6).tolist() == [0, 1, 2, 3, 4, 5]
    # More copies than contenders, so that some of the tied are looked at and some are not. Points 0 and 2 are
    # farther apart than 0 and 1; after all three, copies add only jitter, point 0's less after each.
    many = np.tile(np.array([[0.0, 1.0], [2.0, 5.0], [9.0, 1.0]]), (1500, 1))
    assert greedy_map(rbf_similarity(many, 1.0), np.ones(4500), 7).tolist() == [0, 2, 1, 3, 4, 5, 6]


def test_quality_and_diversity_by_hand() -> None:
    similarity = rbf_similarity(np.array([[0.0], [0.1], [3.0], [6.0]]), 1.0)
    assert greedy_map(similarity, np.array([1.0, 1.1, 1.0, 0.9]), 3).tolist() == [1, 2, 3]
    assert greedy_map(similarity, np.array([1.0, 1.1, 1.0, 1e-3]), 3).tolist() == [1, 2, 0]


def test_the_full_matrix_is_never_formed() -> None:
    num_candidates, num_features, num_items = 20_000, 8, 10
    similarity, quality = draw(0, num_candidates, num_features)
    tracemalloc.start()
    greedy_map(similarity, quality, num_items)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * num_candidates * (4 * num_items + num_features + 20) < 8 * num_candidates**2 / 50


def test_greedy_sets_are_more_diverse_than_uniform_ones() -> None:
    rng = np.random.default_rng(8)
    similarity, _ = draw(8, 200, 3)
    quality = np.ones(200)
    kernel = similarity.matrix()
    uniform = [log_det(kernel, rng.choice(200, 8, replace=False).tolist()) for _ in range(20)]
    assert log_det(kernel, greedy_map(similarity, quality, 8).tolist()) > max(uniform) + 1


def test_preselection_takes_one_of_every_stretch() -> None:
    chosen = preselect(50_000, 700, np.random.default_rng(1))
    assert np.array_equal(chosen, preselect(50_000, 700, np.random.default_rng(1)))
    assert not np.array_equal(chosen, preselect(50_000, 700, np.random.default_rng(2)))
    assert len(chosen) == 700 and (np.diff(chosen) > 0).all()
    edges = [i * 50_000 // 700 for i in range(701)]
    assert all(edges[i] <= chosen[i] < edges[i + 1] for i in range(700))
    assert preselect(5, 9, np.random.default_rng(1)).tolist() == [0, 1, 2, 3, 4]


def test_preselection_is_uniform_over_the_stream() -> None:
    rng = np.random.default_rng(4)
    counts = np.zeros(30)
    for _ in range(3000):
        counts[preselect(30, 10, rng)] += 1
    assert np.abs(counts / 3000 - 1 / 3).max() < 4 * math.sqrt(2 / 9 / 3000)


def test_bandwidth_is_the_median_distance() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [6.0, 8.0]])
    unused = np.random.default_rng(0)
    state = unused.bit_generator.state
    assert median_bandwidth(features, unused) == 5.0  # 5, 5, 10, 0, 5, 5
    assert unused.bit_generator.state == state
    assert median_bandwidth(np.ones((4, 2)), unused) == 1.0
    assert median_bandwidth(np.ones((1, 2)), unused) == 1.0
    large = np.random.default_rng(1).normal(size=(5000, 10))
    sampled = [median_bandwidth(large, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0] == pytest.approx(math.sqrt(20), rel=0.05)
    assert median_bandwidth(10 * large, np.random.default_rng(0)) == pytest.approx(10 * sampled[0])


def test_rbf_far_from_the_origin() -> None:
    features = np.random.default_rng(0).normal(size=(30, 5))
    near, far = (rbf_similarity(features + shift, 2.0).matrix() for shift in (0.0, 1e4))
    assert np.allclose(near, far, rtol=0, atol=1e-10)
    assert near[0, 1] == pytest.approx(math.exp(-((features[0] - features[1]) ** 2).sum() / 8))


def test_standardise_with_the_students_constants() -> None:
    centre, scale = observation_scaling()
    observations = np.random.default_rng(0).normal(size=(7, 39)).astype(np.float32)
    features = standardise(observations, centre, scale)
    assert features.shape == (7, 39) and features.dtype == np.float64
    assert np.allclose(features * scale + centre, observations)
    assert np.array_equal(features[2:4], standardise(observations[2:4], centre, scale))
    with pytest.raises(ValueError, match=r"centre \(38,\)"):
        standardise(observations, centre[1:], scale)
    with pytest.raises(ValueError, match=r"scale\[3\] = 0.0"):
        standardise(observations, centre, np.where(np.arange(39) == 3, 0.0, 1.0))


def test_select_is_its_parts_in_a_row() -> None:
    data = np.random.default_rng(6)
    features, quality = data.normal(size=(2500, 6)).astype(np.float32), data.uniform(1, 2, 2500)
    chosen = select(features, quality, 12, np.random.default_rng(1), limit=300)
    rng = np.random.default_rng(1)
    left = preselect(2500, 300, rng)
    similarity = rbf_similarity(features[left], median_bandwidth(features[left], rng))
    assert np.array_equal(chosen, left[greedy_map(similarity, quality[left], 12)])


def test_a_rank_too_low_is_an_error_with_a_remedy() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 7))
    assert len(select(features, np.ones(50), 40, rng, jitter=0)) == 40
    copies, ones = np.repeat(features[:5], 2, axis=0), np.ones(10)
    assert len(select(copies, ones, 5, rng, jitter=0)) == 5
    with pytest.raises(ValueError, match="rank 5, which cannot give 6 items: use a jitter, or ask for at most 5"):
        select(copies, ones, 6, rng, jitter=0)
    assert len(set(select(copies, ones, 6, rng).tolist())) == 6


def test_mistakes_are_named() -> None:
    rng = np.random.default_rng(0)
    features, ones = rng.normal(size=(20, 3)), np.ones(20)
    similarity = rbf_similarity(features, 1.0)
    with pytest.raises(ValueError, match="21 items cannot be chosen from 20 candidates"):
        greedy_map(similarity, ones, 21)
    with pytest.raises(ValueError, match=r"quality\[4\] = -1.0"):
        greedy_map(similarity, np.where(np.arange(20) == 4, -1.0, 1.0), 3)
    with pytest.raises(ValueError, match=r"quality has shape \(19,\)"):
        greedy_map(similarity, ones[1:], 3)
    with pytest.raises(ValueError, match=r"features\[2\] holds a value that is not finite"):
        rbf_similarity(np.where(np.arange(20)[:, None] == 2, np.nan, features), 1.0)
    with pytest.raises(ValueError, match=r"shape \[N, D\]"):
        rbf_similarity(features[0], 1.0)
    with pytest.raises(ValueError, match="jitter = 1e-12 must be 0 or at least 1e-09"):
        rbf_similarity(features, 1.0, 1e-12)
    with pytest.raises(ValueError, match=r"bandwidth = 0\.0"):
        rbf_similarity(features, 0.0)
    with pytest.raises(ValueError, match="limit = 0"):
        preselect(20, 0, rng)
    with pytest.raises(ValueError, match="limit = 4 leaves fewer candidates than the 5"):
        select(features, ones, 5, rng, limit=4)


def test_nothing_wanted() -> None:
    rng = np.random.default_rng(0)
    similarity = rbf_similarity(rng.normal(size=(4, 2)), 1.0)
    assert greedy_map(similarity, np.ones(4), 0).tolist() == []
    assert select(np.zeros((0, 3)), np.zeros(0), 0, rng).tolist() == []
