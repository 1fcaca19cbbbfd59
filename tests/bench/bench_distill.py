"""Where a distillation step's time goes, on one rank or several.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_distill [--batch-size 256] [--json PATH] [recipe.toml]
    CPD_RANKS=2 OMP_NUM_THREADS=1 mpiexec -n 2 python -m tests.bench.bench_distill

Sizes are the recipe's (default: demo); data are synthetic, and memory is full. Medians over steps, in wall
milliseconds, so run it on an idle machine with as many free cores as ranks.
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

from cpd.comm import TORCH_THREADS, connect
from cpd.config import Config
from cpd.config.load import load, merge, read_toml
from cpd.student.actor import StudentActor
from jobs.launch_options import RECIPES
from tests.distill.synthetic import third_stage

STEPS = 60


def median_milliseconds(call: Callable[[], Any], calls: int = STEPS) -> float:
    """The median wall time of a call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


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
        student(batch.obs_RLO, task_B=batch.task_R, valid_BL=batch.valid_RL)

    actor = StudentActor(student, config.stream.distinct_tasks)
    actor.reset(config.stream.tasks[:1] * 5)
    obs_BO = batch.obs_RLO[:5, 0].float().numpy()
    times = {
        "step": median_milliseconds(trainer.train_step),
        "batch": median_milliseconds(lambda: source.batch(1)),
        "forward": median_milliseconds(forward),
        "reduce": median_milliseconds(lambda: trainer.learner.flat.reduce_grads(comm)),
        "update": median_milliseconds(lambda: trainer.learner.optimizer.step(0.0)),
        "act, 5 episodes": median_milliseconds(lambda: actor.act(obs_BO)),
    }
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
