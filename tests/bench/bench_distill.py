"""Where a distillation step's time goes, on one rank or several.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_distill [--batch-size 256] [--json PATH] [recipe.toml]
    CPD_RANKS=2 OMP_NUM_THREADS=1 mpiexec -n 2 python -m tests.bench.bench_distill

Sizes are the recipe's (default: demo); data are synthetic, and memory is full. Medians over steps, in wall
milliseconds, so run it on an idle machine with as many free cores as ranks.

On one rank it also compares the step of a first and of a third stage with that of the same network in plain torch:
dense, for windows of one step, without tasks. Processor time, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.comm import TORCH_THREADS, Comm, connect
from cpd.config import Config, StudentConfig
from cpd.config.load import load, merge, read_toml
from cpd.distill.losses import LOSSES
from cpd.distill.trainer import StudentTrainer
from cpd.envs.metaworld.tasks import ACTION_SIZE, OBSERVATION_SIZE
from cpd.student.actor import StudentActor
from jobs.launch_options import RECIPES
from tests.bench.bench_moe import best_milliseconds
from tests.distill.synthetic import stage_data, third_stage

STEPS = 60


def median_milliseconds(call: Callable[[], Any], calls: int = STEPS) -> float:
    """The median wall time of a call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


class PlainLayer(nn.Module):
    """What a layer of the student computes for a single task and windows of one step."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.top_k * config.expert_width
        self.attention = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width))
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, config.top_k, bias=False)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """`[B, D]` to `[B, D]`."""
        x_BD = x_BD + self.attention(x_BD)
        normed_BD = self.norm(x_BD)
        gates_Bk1 = self.router(normed_BD).softmax(-1).unsqueeze(-1)
        hidden_BkF = F.gelu(self.up(normed_BD)).unflatten(1, (gates_Bk1.shape[1], -1))
        return x_BD + self.down((hidden_BkF * gates_Bk1).flatten(1))


def plain_step(config: Config) -> Callable[[], None]:
    """A step of the dense network: reverse KL divergence, clipping, torch's AdamW."""
    student, data = config.student, stage_data(0, config.rollouts.num_steps // 100, 100)
    layers = [PlainLayer(student) for _ in range(student.num_layers)]
    head = [nn.LayerNorm(student.width), nn.Linear(student.width, 2 * ACTION_SIZE)]
    net = nn.Sequential(nn.Linear(OBSERVATION_SIZE, student.width), *layers, *head)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.distill.lr, weight_decay=0.0, fused=True)
    obs, mean, log_std = map(torch.from_numpy, (data.observations, data.teacher_mean, data.teacher_log_std))

    def step() -> None:
        rows = torch.randint(len(obs), (config.distill.batch_size,))
        student_mean, spread = net(obs[rows]).split(ACTION_SIZE, -1)
        loss = LOSSES["reverse_kl"](student_mean, -1.25 + 1.75 * spread.tanh(), mean[rows], log_std[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), config.distill.max_grad_norm)
        optimizer.step()

    return step


def compare_with_plain(config: Config, comm: Comm) -> dict[str, float]:
    """Processor milliseconds of a step of each."""
    first = StudentTrainer(config, 1, comm, torch.device("cpu"))
    first.begin_stage(stage_data(0, config.rollouts.num_steps // 100, 100))
    third = third_stage(config, comm, torch.device("cpu"))
    return best_milliseconds(
        {"plain": plain_step(config), "first stage": first.train_step, "third stage": third.train_step}
    )


def main() -> None:
    """Time whole steps, then their parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPES / "demo.toml")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    over = {"distill": {"batch_size": arguments.batch_size}} if arguments.batch_size else {}
    config = load(Config, merge(read_toml(arguments.recipe), over), str(arguments.recipe))
    torch.set_num_threads(TORCH_THREADS)
    comm = connect()
    trainer = third_stage(config, comm, torch.device("cpu"))
    source, student = trainer.learner.source, trainer.learner.student
    batch = source.batch(0)

    def forward() -> None:
        student(batch.obs_RLO, task_B=batch.task_R if batch.task is None else batch.task, valid_BL=batch.valid_RL)

    actor = StudentActor(student, config.stream.distinct_tasks)
    actor.reset(config.stream.tasks[:1] * 5)
    obs_BO = batch.obs_RLO[:5, 0].float().numpy()
    times = {
        "step": median_milliseconds(trainer.train_step),
        "batch": median_milliseconds(lambda: source.batch(1)),
        "forward": median_milliseconds(forward),
        "reduce": median_milliseconds(lambda: trainer.learner.reduction.sum(trainer.learner.flat.grads)),
        "update": median_milliseconds(lambda: trainer.learner.optimizer.step(0.0)),
        "act, 5 episodes": median_milliseconds(lambda: actor.act(obs_BO)),
    }
    if comm.size == 1:
        plain = compare_with_plain(config, comm)
        for name, milliseconds in plain.items():
            print(f"{name:12s} {milliseconds:8.2f} ms  {milliseconds / plain['plain']:5.2f} of plain")
    if comm.rank:
        return
    tokens = config.distill.batch_size * config.student.context
    sizes = f"{trainer.learner.flat.size} parameters, {student.num_experts} experts a layer"
    print(f"{comm.size} ranks, {tokens} tokens a step, {sizes}")
    for name, milliseconds in times.items():
        print(f"  {name:16s} {milliseconds:8.2f} ms  {100 * milliseconds / times['step']:5.1f} % of a step")
    print(f"  {tokens / times['step'] * 1e3:.0f} tokens/s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ranks": comm.size, "tokens": tokens, **times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
