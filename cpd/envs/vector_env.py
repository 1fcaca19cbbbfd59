"""Vector environments: one step advances many slots in lock-step, in this process or in worker processes.

Results do not depend on the number of workers: slots share no state that a step reads, and an environment computes
the same bits in every process.
"""

from __future__ import annotations

import abc
import json
import mmap
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from cpd.envs import worker
from cpd.envs.goals import Goal
from cpd.envs.slots import SlotArrays, SlotError, SlotGroup
from cpd.envs.suite import Suite, load_suite

_CLOSE_TIMEOUT_S: Final = 10.0


def make_vector_env(tasks: Sequence[str], num_workers: int, suite: Suite | None = None) -> VectorEnv:
    """A vector environment with one slot per entry of `tasks`.

    Args:
        tasks: the task of each slot; names may repeat.
        num_workers: processes that share the slots; with 0 or 1, all slots run in this process.
        suite: the suite of the tasks, from `load_suite`; None: Meta-World.

    Raises:
        ValueError: no tasks.
        SlotError: an environment cannot be constructed; the message names its task.
    """
    if not tasks:
        raise ValueError("a vector environment needs at least one task")
    num_workers, suite = min(num_workers, len(tasks)), suite or load_suite()
    if num_workers <= 1:
        return _SerialVectorEnv(suite, tasks)
    return _ProcessVectorEnv(suite, tasks, num_workers)


class VectorEnv(abc.ABC):
    """Slots stepped together. Make one with `make_vector_env`, and use it as a context manager.

    Attributes:
        tasks: the task of each slot.
        num_envs: N, the number of slots.
        suite: the suite of the tasks.
        spaces: its sizes of observations and actions, O and A, which all slots share.
        observations: [N, O] float32, the current observation of each slot; written in place.
        rewards: [N] float64 of each slot's last step, 0 after a reset; written in place.
        grasps: [N] float64, how close each slot's last step came to grasping the object (the
            environment's `grasp`); written in place while `want_grasps` is on, since it takes 3 % of a step.
        successes: [N] bool of each slot's last step, not latched, False after a reset; written in place.
    """

    def __init__(self, suite: Suite, tasks: Sequence[str], arrays: SlotArrays) -> None:
        self.suite, self.spaces = suite, suite.spaces
        self.tasks = tuple(tasks)
        self.num_envs = len(self.tasks)
        self._arrays = arrays
        self.observations: npt.NDArray[np.float32] = arrays.observations
        self.rewards: npt.NDArray[np.float64] = arrays.rewards
        self.grasps: npt.NDArray[np.float64] = arrays.grasps
        self.successes: npt.NDArray[np.bool_] = arrays.successes

    def want_grasps(self, wanted: bool) -> None:
        """Set whether steps fill `grasps`; by default they do not."""
        self._arrays.wants_grasps[:] = wanted

    def reset(self, slots: Sequence[int] | npt.NDArray[np.integer[Any]], goals: Sequence[Goal]) -> None:
        """Start an episode from `goals[i]` in `slots[i]`; other slots are unchanged.

        Raises:
            ValueError: unequal lengths, a slot out of range or named twice, or a goal of another task.
            SlotError: a reset failed, or its worker died.
        """
        if len(slots) != len(goals):
            raise ValueError(f"{len(slots)} slots but {len(goals)} goals to reset them to")
        arrays = self._arrays
        arrays.selected[:] = False
        for slot, goal in zip(slots, goals, strict=True):
            if not 0 <= slot < self.num_envs:
                raise ValueError(f"slot {slot} does not exist: there are {self.num_envs}, from 0")
            if arrays.selected[slot]:
                raise ValueError(f"slot {slot} is named twice in one reset")
            if goal.task != self.tasks[slot]:
                raise ValueError(f"slot {slot} runs {self.tasks[slot]}, but got a goal of {goal.task}")
            arrays.selected[slot] = True
            arrays.goal_sizes[slot] = goal.vector.size
            arrays.goal_vectors[slot, : goal.vector.size] = goal.vector
        self._run(worker.RESET)

    def step(self, actions: npt.NDArray[np.float32], active: npt.NDArray[np.bool_] | None = None) -> None:
        """Step the active slots; the rows of the others are unchanged.

        Args:
            actions: [N, A], taken as float32; rows of inactive slots are ignored.
            active: [N] bool; None steps all slots.

        Raises:
            ValueError: a wrong shape, or an active slot's action that is not finite.
            SlotError: a step failed (for instance beyond 500 in an episode), or its worker died.

        With workers, any exception but ValueError, such as an interrupt, closes the environment.
        """
        arrays = self._arrays
        if actions.shape != arrays.actions.shape:
            raise ValueError(f"actions have shape {actions.shape}, expected {arrays.actions.shape}")
        if active is None:
            arrays.selected[:] = True
        elif active.shape != (self.num_envs,):
            raise ValueError(f"active has shape {active.shape}, expected {(self.num_envs,)}")
        else:
            arrays.selected[:] = active
        arrays.actions[:] = actions
        if not np.isfinite(arrays.actions).all():
            bad = np.flatnonzero(~np.isfinite(arrays.actions).all(axis=1) & arrays.selected)
            if bad.size:
                raise ValueError(f"the action of slot {bad[0]} ({self.tasks[bad[0]]}) is not finite")
        self._run(worker.STEP)

    @abc.abstractmethod
    def _run(self, order: bytes) -> None:
        """Execute `worker.STEP` or `worker.RESET` for the selected slots."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the environments and end their processes; further calls do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _SerialVectorEnv(VectorEnv):
    """All slots in this process."""

    def __init__(self, suite: Suite, tasks: Sequence[str]) -> None:
        size = SlotArrays.size(len(tasks), suite.spaces)
        arrays = SlotArrays(len(tasks), suite.spaces, bytearray(size))
        super().__init__(suite, tasks, arrays)
        self._group: SlotGroup | None = SlotGroup(suite, self.tasks, range(self.num_envs), arrays)

    def _run(self, order: bytes) -> None:
        if self._group is None:
            raise ValueError("this vector environment is closed")
        if order == worker.STEP:
            self._group.step()
        else:
            self._group.reset()

    def close(self) -> None:
        """Close the environments."""
        if self._group is not None:
            self._group.close()
            self._group = None


class _ProcessVectorEnv(VectorEnv):
    """Slots divided over worker processes, which share the arrays and get one byte per order through a pipe."""

    def __init__(self, suite: Suite, tasks: Sequence[str], num_workers: int) -> None:
        size = SlotArrays.size(len(tasks), suite.spaces)
        # An unlinked file rather than a named segment: nothing is left behind, however this process ends.
        with tempfile.TemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
            file.truncate(size)
            super().__init__(suite, tasks, SlotArrays(len(tasks), suite.spaces, mmap.mmap(file.fileno(), size)))
            # Interleaved: callers that need fewer slots use the first ones, which should lie on different workers.
            self._slots = [range(i, len(tasks), num_workers) for i in range(num_workers)]
            self._workers = [_start_worker(suite.name, self.tasks, s, file.fileno()) for s in self._slots]
        self._end = weakref.finalize(self, _end_workers, self._workers)
        self._await(range(num_workers))

    def _run(self, order: bytes) -> None:
        if not self._end.alive:
            raise ValueError("this vector environment is closed")
        selected = self._arrays.selected
        busy = [i for i, slots in enumerate(self._slots) if selected[slots.start :: slots.step].any()]
        try:
            for i in busy:
                stream = self._workers[i].stdin
                assert stream is not None
                try:
                    os.write(stream.fileno(), order)
                except BrokenPipeError:
                    self._fail(i)
            self._await(busy)
        except BaseException:
            # After an interrupt, an unread answer would be mistaken for the answer to a later order.
            self.close()
            raise

    def _await(self, workers: Sequence[int]) -> None:
        """Wait for one answer from each worker."""
        for i in workers:
            answers = self._workers[i].stdout
            assert answers is not None
            answer = answers.read(1)
            if answer == worker.FAILED:
                (size,) = worker.LENGTH.unpack(answers.read(worker.LENGTH.size))
                self._fail(i, answers.read(size).decode())
            if answer != worker.DONE:
                self._fail(i)

    def _fail(self, index: int, message: str = "") -> None:
        """Close everything and raise the error of worker `index`, which has died unless it sent a message."""
        self.close()
        which = f"slots {', '.join(map(str, self._slots[index]))}"
        if message:
            raise SlotError(f"worker {index} ({which}): {message}")
        names = ", ".join(sorted({self.tasks[slot] for slot in self._slots[index]}))
        raise SlotError(
            f"worker {index} ({which}: {names}) died with exit status "
            f"{self._workers[index].returncode}; a negative status is the signal that killed it"
        )

    def close(self) -> None:
        """End the worker processes."""
        self._end()


def _start_worker(suite: str, tasks: Sequence[str], slots: range, memory: int) -> subprocess.Popen[bytes]:
    """Start a new interpreter that serves `slots`. Never a fork: MPI may be initialised in this process."""
    settings = {"suite": suite, "tasks": list(tasks), "slots": list(slots), "memory": memory}
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from cpd.envs import worker; "
    code += "worker.main(sys.argv[2])"
    # One thread per worker: workers already run in parallel, and BLAS threads would compete for their cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(sys.path), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(memory,),
        env=environment,
        process_group=0,  # Ctrl-C at the terminal is not for it
    )


def _end_workers(workers: list[subprocess.Popen[bytes]]) -> None:
    """Close the pipes, at which workers end; kill those that do not."""
    for process in workers:
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()
    for process in workers:
        try:
            process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
