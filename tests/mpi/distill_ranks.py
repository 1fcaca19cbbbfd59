"""What the ranks of tests/mpi/test_distill_mpi.py run.

`distill_ranks BACKEND train FOLDER METHOD...`, `BACKEND run RUN COUNT`, or `BACKEND fail RUN HOW`.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from cpd.comm import Comm, choose_device, connect
from cpd.config import Config
from cpd.config.load import load, merge
from cpd.distill import learner as learner_module
from cpd.distill import reduction
from cpd.distill import run_student as run_student_module
from cpd.distill.learner import LossTerms, StudentLearner
from cpd.distill.protection import ewc, masking
from cpd.distill.run_student import run_student
from cpd.distill.trainer import StudentTrainer
from cpd.run.directory import Run
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import cpu_seconds
from jobs.distill import main as distill
from tests.distill.synthetic import stage_data

CPU = torch.device("cpu")
TABLES = {
    "name": "ranks",
    "stream": {"tasks": ["drawer-close-v3", "handle-press-side-v3", "window-close-v3"]},
    "student": {"context": 4, "width": 16, "expert_width": 32, "opening_steps": 30},
    "rollouts": {"num_steps": 280},
    "memory": {"share": 0.2},
    # A batch that neither two nor three ranks divide evenly, and a norm that clips most steps.
    "distill": {
        "steps_per_stage": 45,
        "batch_size": 33,
        "lr_warmup_steps": 10,
        "max_grad_norm": 10.0,
        "load_balance_coef": 0.1,
        "router_z_coef": 0.01,
        "precision": "float64",
    },
    "evaluation": {"curve_points": 0},
}
SHORT = {"steps_per_stage": 20, "lr_warmup_steps": 5}
DENSE = {"context": 1, "num_experts": 1, "top_k": 1, "expansion": "none", "task_identity": "none"}
#: What the methods change. "ours" has growth, belief, scaled masks, rehearsal, load balance, z-loss and clipping,
#: and the longest stages; "plain" has experts that open to all tasks, and replay alone.
METHODS = {
    "ours": {
        "protection": {"mask_fraction": 0.5, "mask_mode": "scaled"},
        "distill": {"replay_share": 0.5, "rehearsal": True, "max_grad_norm": 60.0},
    },
    "plain": {
        "student": {"task_identity": "none", "num_experts": 4, "experts_per_task": 1, "opening_steps": 10},
        "memory": {"selection": "reservoir"},
        "protection": {"kind": "none"},
        "distill": {**SHORT, "replay_share": 0.5, "loss": "forward_kl"},
    },
    "ewc": {"protection": {"kind": "ewc", "strength": 10.0}, "distill": SHORT},
    "packnet": {
        "student": {"expansion": "none", "task_identity": "none"},
        "memory": {"selection": "none"},
        "protection": {"kind": "packnet"},
        "distill": {**SHORT, "weight_decay": 0.1},
    },
    "derpp": {
        "student": DENSE,
        "memory": {"selection": "reservoir"},
        "protection": {"kind": "derpp"},
        "distill": {**SHORT, "replay_share": 0.5},
    },
    "lwf": {"student": {**DENSE, "task_identity": "onehot"}, "protection": {"kind": "lwf"}, "distill": SHORT},
    "hat": {
        "student": DENSE,
        "memory": {"selection": "none"},
        "protection": {"kind": "hat"},
        "distill": SHORT,
    },
    "agem": {"protection": {"kind": "agem", "agem_windows": 17}, "distill": {**SHORT, "replay_share": 0.0}},
    "joint": {"distill": {**SHORT, "protocol": "joint"}},
    "single_task": {"distill": {**SHORT, "protocol": "single_task"}},
}


@patch.object(ewc, "FISHER_WINDOWS", 20)
@patch.object(masking, "FISHER_WINDOWS", 20)
def train(comm: Comm, method: str = "ours", device: torch.device = CPU) -> dict[str, np.ndarray]:
    """The steps of three stages; the importance of parameters is estimated from few states, for speed."""
    torch.set_num_threads(1)
    tables = merge(TABLES, METHODS[method])
    trainer = StudentTrainer(load(Config, tables, "ranks"), 1, comm, device)
    losses, norms = [], []
    for stage in range(3):
        data = stage_data(stage)
        if trainer.config.distill.protocol == "joint":
            data = replace(data, others=tuple(stage_data(other) for other in range(3) if other != stage))
        trainer.begin_stage(data)
        for _ in range(trainer.config.distill.steps_per_stage):
            report = trainer.train_step(report=True)
            losses.append(report.loss)
            norms.append(report.grad_norm)
        trainer.end_stage(data)
    return {
        "values": trainer.learner.flat.values.cpu().numpy(),
        "losses": np.array(losses),
        "norms": np.array(norms),
        "max_norm": np.array(trainer.config.distill.max_grad_norm),
        "memory": trainer.memory.segments.first_step,
    }


class AskedAfter(Interrupt):
    """Asks to stop when it is checked for the `count`-th time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    @property
    def requested(self) -> bool:
        self._count -= 1
        return self._count < 0


def fail(run: Run, how: str) -> int:
    """Distil as the command does; the last rank fails in a step, before it sums its gradient."""
    learn, comm = StudentLearner.gradient, connect()

    def gradient(learner: StudentLearner, *arguments: Any) -> LossTerms:
        if learner.progress.step == 5 and comm.rank == comm.size - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("this rank alone fails")
        return learn(learner, *arguments)

    with patch.object(StudentLearner, "gradient", gradient):
        return distill([str(run.root)])


def main() -> int:
    comm = connect()
    backend, verb, place, *arguments = sys.argv[1:]
    # Small buckets, of which a step has several.
    patch.object(learner_module, "choose_backend", lambda comm, device: backend).start()
    patch.object(reduction, "BUCKET_BYTES", 4096).start()
    if verb == "train":
        device = choose_device(comm) if backend == "nccl" else CPU
        for method in arguments:
            np.savez(Path(place) / f"{method}-{comm.rank}.npz", **train(comm, method, device))
        assert dist.is_initialized() == (backend != "mpi")
        return 0
    run = Run(Path(place))
    if verb == "fail":
        return fail(run, arguments[0])
    # Only the last rank is asked, as when a signal reaches one process.
    interrupt = AskedAfter(int(arguments[0])) if comm.rank == comm.size - 1 else Interrupt()
    run_student_module.AGREE_EVERY = 1
    try:
        run_student(run, run.students()[0], comm, interrupt=interrupt, log=lambda line: None)
    except InterruptedBySignal:
        return 75
    finally:
        (run.root / f"cpu-{comm.rank}").write_text(str(cpu_seconds()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
