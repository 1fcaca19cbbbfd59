"""Seconds of DPP selection, beside naive and plain greedy selection, with and without pre-selection.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_dpp [--quick] [--observations PATH.npy] [--json PATH]

Candidates are smooth synthetic trajectories of ten tasks, or the rows of PATH ([N, D], standardised by column).
Methods are timed in turn, and of several repeats the fastest counts. Ratios travel, absolute figures do not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpd.distill.memory.dpp import JITTER, Similarity, greedy_map, median_bandwidth, preselect, select

NUM_TASKS = 10
EPISODE = 100
PRESELECTED = 5_000


def trajectories(num_steps: int, num_features: int, seed: int = 0) -> np.ndarray:
    """Episodes that move smoothly between random points near their task's centre, with a little noise."""
    rng = np.random.default_rng(seed)
    num_episodes = -(-num_steps // EPISODE)
    centres = rng.normal(size=(NUM_TASKS, num_features))
    corners = rng.normal(size=(num_episodes, 4, num_features))
    corners += 2 * centres[np.arange(num_episodes) * NUM_TASKS // num_episodes, None]
    at = np.linspace(0, 2.999, EPISODE)
    left, share = at.astype(int), (at % 1)[:, None]
    paths = (1 - share) * corners[:, left] + share * corners[:, left + 1]
    return (paths + 0.02 * rng.normal(size=paths.shape)).reshape(-1, num_features)[:num_steps]


def kernel_of(similarity: Similarity) -> np.ndarray:
    """The whole matrix."""
    num_candidates = len(similarity)
    return similarity.rows(np.arange(num_candidates)) + JITTER * np.eye(num_candidates)


def naive_greedy(similarity: Similarity, num_items: int) -> list[int]:
    """The whole kernel, and a determinant per candidate and step."""
    kernel = kernel_of(similarity)
    chosen: list[int] = []
    for _ in range(num_items):
        open_ = [i for i in range(len(kernel)) if i not in chosen]
        sets = np.array([[*chosen, i] for i in open_])
        chosen.append(open_[int(np.argmax(np.linalg.slogdet(kernel[sets[:, :, None], sets[:, None]])[1]))])
    return chosen


def plain_greedy(similarity: Similarity, num_items: int) -> list[int]:
    """Chen, Zhang & Zhou (2018) as published: every candidate is brought up to date at every step."""
    factor = np.empty((num_items, len(similarity)))
    residual = np.full(len(similarity), 1.0 + JITTER)
    chosen: list[int] = []
    for j in range(num_items):
        item = int(np.argmax(residual))
        chosen.append(item)
        row = similarity.rows([item])[0] - factor[:j, item] @ factor[:j]
        factor[j] = row / np.sqrt(residual[item])
        residual -= factor[j] ** 2
        residual[item] = 0
    return chosen


def best_seconds(
    methods: dict[str, Callable[[], Any]], num_repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The fastest of several runs of each method, interleaved, and what they returned."""
    best, returned = dict.fromkeys(methods, float("inf")), {}
    for _ in range(num_repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            returned[name] = method()
            best[name] = min(best[name], time.perf_counter() - start)
    return best, returned


def bench_small(num_repeats: int) -> list[dict[str, float]]:
    """Against naive greedy selection, where that is affordable."""
    title = "greedy, small sets"
    print(f"\n{title:24s}{'naive s':>10s}{'plain s':>10s}{'ours s':>10s}{'naive/ours':>12s}{'same':>6s}")
    rows = []
    for num_candidates, num_items in ((100, 10), (300, 20), (600, 30)):
        features = trajectories(num_candidates, 39)
        similarity = Similarity.rbf(features, median_bandwidth(features, np.random.default_rng(0)))
        arguments = similarity, num_items
        seconds, chosen = best_seconds(
            {
                "naive": lambda a=arguments: naive_greedy(*a),
                "plain": lambda a=arguments: plain_greedy(*a),
                "ours": lambda a=arguments: greedy_map(*a).tolist(),
            },
            num_repeats,
        )
        same = chosen["naive"] == chosen["ours"]
        print(
            f"{f'{num_items} of {num_candidates}':24s}{seconds['naive']:10.4f}{seconds['plain']:10.4f}"
            f"{seconds['ours']:10.4f}{seconds['naive'] / seconds['ours']:12.0f}{'yes' if same else 'NO':>6s}"
        )
        rows.append({"num_candidates": num_candidates, "num_items": num_items, "same": same, **seconds})
    return rows


def spread(features: np.ndarray, bandwidth: float, chosen: np.ndarray) -> dict[str, float]:
    """log det(S_Y) per item, and how far the candidates are from the nearest chosen one, in bandwidths."""
    similarity = Similarity.rbf(features[chosen], bandwidth)
    log_det = np.linalg.slogdet(kernel_of(similarity))[1]
    some = features[:: max(1, len(features) // 2_000)]
    squares = (some**2).sum(1)[:, None] + (features[chosen] ** 2).sum(1) - 2 * some @ features[chosen].T
    nearest = np.sqrt(np.maximum(squares.min(axis=1), 0)) / bandwidth
    return {
        "log_det": float(log_det) / len(chosen),
        "mean_distance": float(nearest.mean()),
        "max_distance": float(nearest.max()),
    }


def bench_large(features: np.ndarray, num_items: int, num_repeats: int) -> dict[str, Any]:
    """All candidates and a pre-selection of them, with bandwidth and kernel in the time."""
    num_candidates, num_features = features.shape
    bandwidth = median_bandwidth(features, np.random.default_rng(0))

    def plain() -> np.ndarray:
        similarity = Similarity.rbf(features, median_bandwidth(features, np.random.default_rng(0)))
        return np.array(plain_greedy(similarity, num_items))

    def ours(limit: int = num_candidates) -> np.ndarray:
        return select(features, num_items, np.random.default_rng(0), limit)

    few = f"ours, {PRESELECTED} pre-selected"
    methods: dict[str, Callable[[], Any]] = {
        "plain, all": plain,
        "ours, all": ours,
        few: lambda: ours(PRESELECTED),
    }
    seconds, chosen = best_seconds(methods, num_repeats)
    chosen["uniform"] = preselect(num_candidates, num_items, np.random.default_rng(0))
    title = f"{num_items} of {num_candidates}, D = {num_features}"
    print(f"\n{title:28s}{'log det/k':>10s}{'mean dist':>10s}{'max dist':>10s}{'seconds':>9s}{'plain/it':>9s}")
    rows: dict[str, Any] = {"num_candidates": num_candidates, "num_features": num_features, "num_items": num_items}
    for name, items in chosen.items():
        rows[name] = spread(features, bandwidth, items)
        print(f"{name:28s}{''.join(f'{value:10.3f}' for value in rows[name].values())}", end="")
        if name in seconds:
            rows[name]["seconds"] = seconds[name]
            print(f"{seconds[name]:9.3f}{seconds['plain, all'] / seconds[name]:9.1f}", end="")
        print()
    same = bool((chosen["plain, all"] == chosen["ours, all"]).all())
    print(f"plain and ours choose the same items in the same order: {'yes' if same else 'NO'}")
    return {**rows, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sets and one repeat")
    parser.add_argument("--observations", type=Path, help="[N, D] .npy to choose from, beside the synthetic ones")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    arguments = parser.parse_args()
    num_steps, num_items, num_repeats = (10_000, 200, 1) if arguments.quick else (50_000, 500, 3)

    results: dict[str, Any] = {"small": bench_small(num_repeats), "large": {}}
    sources = {f"synthetic, D = {d}": trajectories(num_steps, d) for d in (39, 64)}
    if arguments.observations:
        observations = np.load(arguments.observations).astype(np.float64)
        scale = np.maximum(observations.std(axis=0), 0.1)
        sources[arguments.observations.name] = (observations - observations.mean(axis=0)) / scale
    for name, features in sources.items():
        print(f"\n{name}", end="")
        results["large"][name] = bench_large(features, min(num_items, len(features) // 10), num_repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
