"""Training throughput per rank against torch's DistributedDataParallel with gloo, and weak scaling.

    python -m tests.bench.bench_ddp [--ranks 2] [--batch-size 256] [recipe.toml]

starts that many ranks on this machine. All in one job, one thread a rank, alternating in short blocks, so that
whatever else the machine does meets all alike. A block counts as much as its median step (and, in a column of its
own, as its mean, which other work on the machine moves most), and of the blocks' ratios the median is told. Not
the fastest steps: both ranks must be lucky at once for those. Wanted are as many free cores as ranks: on a busy
machine ranks that wait for their turn on a core wait for each other too, and MPI, which does not sleep while it
waits, loses more by it than gloo.

Against DDP, a student that a plain torch program could have too, with no losses but its own:

- plain: the trainer's step on the global batch, over MPI.
- DDP: the same student on the same rows with the same losses under DistributedDataParallel (one bucket, gradients
  as views of it), torch's clipping and fused AdamW. It is spared what it does not do: its experts' shares are each
  rank's own, where ours are the global batch's, at the price of a second collective.

For weak scaling, the recipe as it stands:

- ours: the trainer's step on the global batch, over MPI.
- alone: one rank's step with as many rows, while the others sleep; the ranks take turns, since cores differ.
- beside: the same on all ranks at once, without a word between them: what they take from each other in memory
  bandwidth and by heat, which no communication library can give back.
- slowest: of those, every step's slowest rank: what they would wait for each other if communication took no time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpd.cluster.element_job import MPIEXEC_ENVIRONMENT, mpi_command
from cpd.comm import RANKS_VARIABLE, Comm, SerialComm, asked_size, connect
from cpd.config import Config
from cpd.config.load import load, merge, read_toml
from cpd.distill.batches import Batch
from cpd.distill.losses import LOSSES, load_balance_loss, router_z_loss
from cpd.distill.trainer import StudentTrainer, learning_rate
from jobs.launch_options import RECIPES
from tests.distill.synthetic import third_stage

CPU = torch.device("cpu")
#: What leaves the student with nothing but its own losses.
PLAIN = {"student": {"task_identity": "none"}, "protection": {"kind": "none"}}


class LocalLoss(nn.Module):
    """A rank's loss on its own rows, as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, trainer: StudentTrainer) -> None:
        super().__init__()
        self.student, self.config = trainer.learner.student, trainer.config.distill

    def forward(self, batch: Batch, num_tokens: int) -> Tensor:
        """The mean over this rank's tokens."""
        out = self.student(batch.obs_RLO, task_B=batch.task_R, valid_BL=batch.valid_RL)
        distance_RL = batch.valid_RL * LOSSES[self.config.loss](
            out.mean_BLA, out.log_std_BLA, batch.teacher_mean_RLA, batch.teacher_log_std_RLA
        )
        counts_LE = torch.stack([stats.counts_E for stats in out.stats])
        shares_LE = counts_LE / (num_tokens * self.student.config.top_k)
        balance = load_balance_loss(
            torch.stack([stats.prob_sums_E for stats in out.stats]),
            shares_LE,
            num_tokens,
            self.student.moes[0].group_E[: shares_LE.shape[1]],
        )
        router_z = router_z_loss(torch.stack([stats.z_square_sum for stats in out.stats]), num_tokens)
        imitation: Tensor = distance_RL.sum() / num_tokens
        return imitation + self.config.load_balance_coef * balance + self.config.router_z_coef * router_z


def ddp_step(config: Config, comm: Comm) -> Callable[[], Any]:
    """A training step of the same student under DistributedDataParallel."""
    trainer = third_stage(config, comm, CPU)
    for parameter in trainer.learner.student.parameters():  # no views of the flat vector: torch's own way
        parameter.data, parameter.grad = parameter.data.clone(), None
    wrapped = DistributedDataParallel(LocalLoss(trainer), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=config.distill.lr, weight_decay=0.0, fused=True)

    def step() -> None:
        batch = trainer.learner.source.batch(trainer.learner.progress.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.distill, trainer.learner.progress.step)
        optimizer.zero_grad(set_to_none=False)
        wrapped(batch, int(batch.valid_RL.sum())).backward()
        norm = nn.utils.clip_grad_norm_(wrapped.parameters(), config.distill.max_grad_norm)
        assert torch.isfinite(norm)
        optimizer.step()
        trainer.learner.progress.step += 1

    return step


def milliseconds(step: Callable[[], Any], steps: int) -> list[float]:
    """The wall times of a block's steps."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def asleep_until(flag: Path) -> None:
    """Wait without using the core, which MPI's barrier would."""
    while not flag.exists():
        time.sleep(0.002)


def measure(comm: Comm, recipes: Mapping[str, Config], blocks: int, steps: int) -> dict[str, list[list[float]]]:
    """Milliseconds of every step, block by block; complete on rank 0."""
    folder = comm.broadcast(Path(tempfile.mkdtemp()) if comm.rank == 0 else None)
    assert folder is not None
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=comm.size)
    plain, ddp = third_stage(recipes["plain"], comm, CPU).train_step, ddp_step(recipes["plain"], comm)
    ours = third_stage(recipes["ours"], comm, CPU).train_step
    serial = third_stage(recipes["alone"], SerialComm(), CPU).train_step
    together = {"plain": plain, "DDP": ddp, "ours": ours, "beside": serial}
    times: dict[str, list[list[float]]] = {name: [] for name in (*together, "alone")}
    for block in range(blocks):
        for name, step in together.items():
            comm.barrier()
            times[name].append(milliseconds(step, steps))
        for rank in range(comm.size):
            flag = folder / f"block-{block}-{rank}"
            comm.barrier()
            if comm.rank == rank:
                times["alone"].append(milliseconds(serial, steps))
                flag.touch()
            asleep_until(flag)
    dist.destroy_process_group()
    alone, beside = comm.gather(times["alone"]), comm.gather(times["beside"])
    if comm.rank == 0:
        times["alone"], times["beside"] = np.mean(alone, axis=0).tolist(), np.mean(beside, axis=0).tolist()
        times["slowest"] = np.max(beside, axis=0).tolist()
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPES / "demo.toml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="windows per step and rank (default: the recipe's)")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=30, help="per block")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if asked_size() == 1:
        command = mpi_command(arguments.ranks, [sys.executable, "-m", "tests.bench.bench_ddp", *sys.argv[1:]])
        rank_environment = {RANKS_VARIABLE: str(arguments.ranks), "OMP_NUM_THREADS": "1"}
        sys.exit(
            subprocess.run(
                command, env={**os.environ, **MPIEXEC_ENVIRONMENT, **rank_environment}, check=False
            ).returncode
        )
    comm = connect()
    torch.set_num_threads(1)

    # No schedule that ends within the measurement.
    tables = merge(read_toml(arguments.recipe), {"distill": {"steps_per_stage": 100_000}})

    def config(batch_size: int, changes: Mapping[str, Any]) -> Config:
        changed = merge(tables, {"distill": {"batch_size": batch_size}})
        return load(Config, merge(changed, changes), str(arguments.recipe))

    recipe = load(Config, tables, str(arguments.recipe))
    num_windows = arguments.batch_size or recipe.distill.batch_size
    recipes = {
        "plain": config(num_windows * comm.size, PLAIN),
        "ours": config(num_windows * comm.size, {}),
        "alone": config(num_windows, {}),
    }
    times = measure(comm, recipes, arguments.blocks, arguments.steps)
    if comm.rank:
        return
    tokens = num_windows * recipe.student.context
    print(f"{comm.size} ranks, {num_windows} windows ({tokens} tokens) a rank and step")
    for name, block_times in times.items():
        value = statistics.median(itertools.chain(*block_times))
        print(f"  {name:7s} {value:8.2f} ms a step  {tokens / value * 1e3:9.0f} tokens/s and rank")
    pairs = {
        "throughput, plain / DDP": ("DDP", "plain"),
        "weak scaling, alone / ours": ("alone", "ours"),
        "  for sharing the machine, alone / beside": ("alone", "beside"),
        "  for waiting for the slowest, beside / slowest": ("beside", "slowest"),
        "  for communication, slowest / ours": ("slowest", "ours"),
    }
    ratios = {
        text: [
            statistics.median(typical(a) / typical(b) for a, b in zip(times[over], times[under], strict=True))
            for typical in (statistics.median, statistics.mean)
        ]
        for text, (over, under) in pairs.items()
    }
    print(f"by median and by mean step, of {arguments.blocks} blocks:")
    for text, (by_median, by_mean) in ratios.items():
        print(f"  {by_median:5.2f} {by_mean:5.2f}  {text}")
    if arguments.json:
        record = {"ranks": comm.size, "tokens": tokens, "milliseconds": times, "ratios": ratios}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
