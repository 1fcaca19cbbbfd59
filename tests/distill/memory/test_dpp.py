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
    select,
)

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, num_candidates: int, num_features: int) -> Similarity:
    """Random candidates."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_candidates, num_features))
    return Similarity.rbf(features, median_bandwidth(features, rng))


def dense_kernel(similarity: Similarity) -> np.ndarray:
    """S by its definition."""
    x, n = similarity.features, len(similarity)

    def entry(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-((a - b) ** 2).sum() / 2)

    return np.array([[entry(x[i], x[j]) for j in range(n)] for i in range(n)]) + dpp.JITTER * np.eye(n)


def log_det(kernel: np.ndarray, chosen: list[int]) -> float:
    sign, value = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])
    return float(value) if sign > 0 else -math.inf


def naive_greedy(kernel: np.ndarray, num_items: int) -> tuple[list[int], float]:
    """Greedy selection with every determinant recomputed, and the closest call: best minus second best.

    The first choice is no call: all gains are equal, and the lowest index wins.
    """
    chosen: list[int] = []
    closest = math.inf
    for _ in range(num_items):
        gains = {i: log_det(kernel, [*chosen, i]) for i in range(len(kernel)) if i not in chosen}
        best, *others = sorted(gains, key=lambda i: -gains[i])
        if chosen and others:
            closest = min(closest, gains[best] - gains[others[0]])
        chosen.append(best)
    return chosen, closest


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_argmax_of_the_gain_at_every_step(seed: int) -> None:
    similarity = draw(seed, 40, 16)
    expected, closest = naive_greedy(dense_kernel(similarity), 14)
    assert closest > 1e-9
    assert greedy_map(similarity, 14).tolist() == expected


@pytest.mark.parametrize(("num_contenders", "max_block"), [(1, 1), (4, 3), (30, 64), (200, 5)])
def test_looking_at_few_contenders_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, num_contenders: int, max_block: int
) -> None:
    similarity = draw(3, 150, 40)
    expected, closest = naive_greedy(dense_kernel(similarity), 20)
    assert closest > 1e-9
    monkeypatch.setattr(dpp, "NUM_CONTENDERS", num_contenders)
    monkeypatch.setattr(dpp, "MAX_BLOCK", max_block)
    assert greedy_map(similarity, 20).tolist() == expected


def test_greedy_over_thousands_equals_greedy_over_the_whole_matrix() -> None:
    similarity = draw(11, 1300, 12)
    kernel = similarity.rows(np.arange(1300)) + dpp.JITTER * np.eye(1300)
    variance, chosen = np.diag(kernel).copy(), []
    for _ in range(100):  # Gaussian elimination of the chosen one's row
        item = int(np.argmax(variance))
        chosen.append(item)
        kernel -= np.outer(kernel[:, item], kernel[item] / kernel[item, item])
        variance = np.diag(kernel).copy()
        variance[chosen] = 0
    assert greedy_map(similarity, 100).tolist() == chosen


def test_greedy_comes_close_to_the_likeliest_set() -> None:
    shortfalls, hits = [], 0
    for seed in range(20):
        similarity = draw(seed, 10, 5)
        kernel = dense_kernel(similarity)
        best = max(log_det(kernel, [0, *s]) for s in combinations(range(1, 10), 3))  # 0 is chosen first
        shortfalls.append(best - log_det(kernel, greedy_map(similarity, 4).tolist()))
        hits += shortfalls[-1] < 1e-12
    assert min(shortfalls) > -1e-9
    assert max(shortfalls) < 0.5
    assert hits >= 10


@settings(deadline=None, max_examples=25)
@given(seed=seeds, shorter=st.integers(0, 10), longer=st.integers(0, 10))
def test_a_prefix_is_the_choice_for_a_smaller_budget(seed: int, shorter: int, longer: int) -> None:
    similarity = draw(seed, 25, 10)
    shorter, longer = sorted((shorter, longer))
    order = greedy_map(similarity, longer)
    assert order.dtype == np.int64 and len(set(order.tolist())) == longer
    assert np.array_equal(order[:shorter], greedy_map(similarity, shorter))


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_the_order_of_the_candidates_does_not_matter(seed: int) -> None:
    similarity = draw(seed, 20, 9)
    order, closest = naive_greedy(dense_kernel(similarity), 8)
    assume(closest > 1e-8)
    permutation = np.append(0, 1 + np.random.default_rng(seed).permutation(19))
    permuted = greedy_map(similarity.take(permutation), 8)
    assert permutation[permuted].tolist() == order


@settings(deadline=None, max_examples=25)
@given(seed=seeds, copies=st.lists(st.integers(1, 4), min_size=2, max_size=12))
def test_copies_come_after_all_distinct_candidates(seed: int, copies: list[int]) -> None:
    rng = np.random.default_rng(seed)
    distinct = rng.normal(size=(len(copies), 6))
    kind = rng.permutation(np.repeat(np.arange(len(copies)), copies))
    similarity = Similarity.rbf(distinct[kind], median_bandwidth(distinct, rng))
    order = greedy_map(similarity, len(kind))
    assert set(kind[order[: len(copies)]].tolist()) == set(range(len(copies)))
    assert sorted(order.tolist()) == list(range(len(kind)))


def test_ties_go_to_the_lowest_index() -> None:
    corners = np.eye(6)
    assert greedy_map(Similarity.rbf(corners, 1.0), 6).tolist() == [0, 1, 2, 3, 4, 5]
    twice = np.concatenate([corners, corners])[::-1]
    assert greedy_map(Similarity.rbf(twice, 1.0), 6).tolist() == [0, 1, 2, 3, 4, 5]
    # More copies than contenders, so that some of the tied are looked at and some are not. Points 0 and 2 are
    # farther apart than 0 and 1; after all three, copies add only jitter, point 0's less after each.
    many = np.tile(np.array([[0.0, 1.0], [2.0, 5.0], [9.0, 1.0]]), (1500, 1))
    assert greedy_map(Similarity.rbf(many, 1.0), 7).tolist() == [0, 2, 1, 3, 4, 5, 6]


def test_diversity_by_hand() -> None:
    # From 0 all the way to 6, which leaves 3 unexplained; 0.1 adds next to nothing.
    similarity = Similarity.rbf(np.array([[0.0], [0.1], [3.0], [6.0]]), 1.0)
    assert greedy_map(similarity, 4).tolist() == [0, 3, 2, 1]


def test_the_full_matrix_is_never_formed() -> None:
    num_candidates, num_features, num_items = 20_000, 8, 10
    similarity = draw(0, num_candidates, num_features)
    tracemalloc.start()
    greedy_map(similarity, num_items)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * num_candidates * (4 * num_items + num_features + 20) < 8 * num_candidates**2 / 50


def test_greedy_sets_are_more_diverse_than_uniform_ones() -> None:
    rng = np.random.default_rng(8)
    similarity = draw(8, 200, 3)
    kernel = dense_kernel(similarity)
    uniform = [log_det(kernel, rng.choice(200, 8, replace=False).tolist()) for _ in range(20)]
    assert log_det(kernel, greedy_map(similarity, 8).tolist()) > max(uniform) + 1


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
    near, far = (Similarity.rbf(features + shift, 2.0).rows(np.arange(30)) for shift in (0.0, 1e4))
    assert np.allclose(near, far, rtol=0, atol=1e-10)
    assert near[0, 1] == pytest.approx(math.exp(-((features[0] - features[1]) ** 2).sum() / 8))


def test_select_is_its_parts_in_a_row() -> None:
    features = np.random.default_rng(6).normal(size=(2500, 6))
    chosen = select(features, 12, np.random.default_rng(1), limit=300)
    rng = np.random.default_rng(1)
    left = preselect(2500, 300, rng)
    similarity = Similarity.rbf(features[left], median_bandwidth(features[left], rng))
    assert np.array_equal(chosen, left[greedy_map(similarity, 12)])


def test_nothing_wanted() -> None:
    assert greedy_map(draw(0, 4, 2), 0).tolist() == []
