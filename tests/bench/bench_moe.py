"""Cost of the mixture-of-experts block beside a dense block of its active size, and beside all experts at work.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_moe [--tokens 512] [--width 64] [--json PATH]

Forward and backward, processor seconds, the contestants in turn and of several repeats the fastest. `dense` is one
feed-forward block of k times an expert's width: the same multiplications without routing, hence the floor.
`masked` computes every expert for every token, as code without dispatch would. Ratios travel, times do not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cpd.student.moe import MoE

REPEATS, CALLS = 9, 20


def best_milliseconds(contestants: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The least processor time of a call, over repeats in turn."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(REPEATS):
        for name, call in contestants.items():
            call()
            start = time.process_time()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.process_time() - start) / CALLS * 1e3)
    return best


def compare(num_tokens: int, width: int, expert_width: int, num_experts: int, top_k: int) -> dict[str, float]:
    """Milliseconds of one forward and backward pass."""
    rng = torch.Generator().manual_seed(1)
    moe = MoE(width, expert_width, num_experts, top_k, torch.float32)
    hidden = top_k * expert_width
    dense = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
    with torch.no_grad():
        for parameter in [*moe.parameters(), *dense.parameters()]:
            parameter.normal_(0, 0.1, generator=rng)
    x = torch.randn(num_tokens, width, generator=rng, requires_grad=True)
    valid = torch.ones(num_tokens)

    def masked(x_ND: torch.Tensor) -> torch.Tensor:
        logits_NE = F.linear(x_ND, moe.router.stack)
        top_Nk, chosen_Nk = logits_NE.topk(top_k)
        gates_NE = torch.zeros_like(logits_NE).scatter(1, chosen_Nk, top_Nk.softmax(-1))
        stacks = enumerate(zip(moe.up.stack, moe.down.stack, strict=True))
        return sum(gates_NE[:, e : e + 1] * (F.gelu(x_ND @ up.t()) @ down) for e, (up, down) in stacks)

    def routed(x_ND: torch.Tensor) -> torch.Tensor:
        y_ND, stats = moe(x_ND, valid)
        assert stats is not None
        return y_ND.sum() + stats.prob_sums_E.sum() + stats.z_square_sum

    torch.testing.assert_close(masked(x), moe(x)[0])
    return best_milliseconds(
        {
            "dense": lambda: dense(x).sum().backward(),
            "moe": lambda: routed(x).backward(),
            "masked": lambda: masked(x).sum().backward(),
        }
    )


def main() -> None:
    """Compare over numbers of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{arguments.tokens} tokens, width {arguments.width}, experts of {arguments.expert_width}")
    print("experts top_k | ms: dense     moe  masked | moe/dense masked/moe")
    for num_experts, top_k in ((4, 1), (4, 2), (8, 2), (16, 2), (50, 2)):
        ms = compare(arguments.tokens, arguments.width, arguments.expert_width, num_experts, top_k)
        rows.append({"experts": num_experts, "top_k": top_k, **ms})
        print(
            f"{num_experts:7d} {top_k:5d} | {ms['dense']:9.2f} {ms['moe']:7.2f} {ms['masked']:7.2f} | "
            f"{ms['moe'] / ms['dense']:9.2f} {ms['masked'] / ms['moe']:10.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
