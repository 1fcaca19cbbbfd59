"""What the ranks of tests/mpi/test_teacher_mpi.py run: `python -m tests.mpi.teacher_ranks update|run ...`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cpd.comm import Comm, connect
from cpd.config import PPOConfig
from cpd.run.directory import Run
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.teachers import trainer
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.ranks import RanksDifferError, check_ranks_agree, slots_of_rank
from cpd.teachers.rollout import Experience
from cpd.teachers.run_teacher import env_pool, run_teacher
from tests.mpi.distill_ranks import AskedAfter

#: Seven environments, which two ranks cannot divide evenly.
CONFIG = PPOConfig(hidden_sizes=(32, 32), num_envs=7, steps_per_env=40, minibatch_size=70, num_epochs=2)
NUM_ITERATIONS = 3


def batch(iteration: int, slots: range) -> Experience:
    """Columns `slots` of an iteration's samples, the same on every rank."""
    rng = np.random.default_rng(iteration)
    shape = (CONFIG.steps_per_env, CONFIG.num_envs)
    ends = rng.random(shape) < 0.05
    ends[-1] = True
    terminated = ends & (rng.random(shape) < 0.5)
    obs, next_obs = rng.normal(size=(2, *shape, 39)).astype(np.float32)
    actions = rng.normal(size=(*shape, 4)).astype(np.float32)
    rewards = 12 * rng.random(shape).astype(np.float32)
    arrays = (obs, next_obs, actions, rewards, terminated, ends)
    return Experience(*(np.ascontiguousarray(array[:, slots.start : slots.stop]) for array in arrays), 0.0, 0.0)


def update(comm: Comm, *, one_step: bool) -> dict[str, np.ndarray]:
    """Learn from the same global samples, this rank from its own columns of them."""
    torch.set_num_threads(1)
    whole = CONFIG.num_envs * CONFIG.steps_per_env
    config = replace(CONFIG, minibatch_size=whole, num_epochs=1) if one_step else CONFIG
    learner = PPOLearner(config, seed=1, comm=comm)
    slots = slots_of_rank(comm, config.num_envs)
    learned_values = []
    for iteration in range(1 if one_step else NUM_ITERATIONS):
        learned = learner.update(batch(iteration, slots), iteration, critic_only=iteration == 1)
        learned_values.append(list(learned.values()))
    check_ranks_agree([*learner.parameters(), *learner.policy.normalizer.state_dict().values()], comm)
    return {
        "learned": np.array(learned_values),
        "values": torch.cat([p.detach().flatten() for p in learner.parameters()]).numpy(),
        "grads": torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]).numpy(),
        "normalizer": torch.stack([learner.policy.normalizer.mean, learner.policy.normalizer.std]).numpy(),
    }


def main() -> int:
    comm = connect()
    if sys.argv[1] == "update":
        for name in ("one-step", "all"):
            arrays = update(comm, one_step=name == "one-step")
            np.savez(Path(sys.argv[2]) / f"{name}-{comm.size}-{comm.rank}.npz", **arrays)
        try:
            check_ranks_agree([torch.full((3,), float(comm.rank))], comm)
        except RanksDifferError as error:
            (Path(sys.argv[2]) / f"differ-{comm.size}-{comm.rank}").write_text(str(error))
        return 0
    trainer.VALIDATE_FROM = 0.0
    run = Run(Path(sys.argv[2]))
    # Only the last rank is asked, as when a signal reaches one process.
    interrupt = AskedAfter(int(sys.argv[3])) if comm.rank == comm.size - 1 else Interrupt()
    try:
        pool = env_pool(run.config, 1, comm.size)
        run_teacher(run, run.teachers()[0], pool, interrupt=interrupt, log=lambda line: None, comm=comm)
    except InterruptedBySignal:
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
