"""Finish one teacher: train it, evaluate it, collect its rollouts. A phase whose files exist is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cpd.comm import TORCH_THREADS, Comm, SerialComm
from cpd.config import Config
from cpd.envs.cells import Cell, EnvPool, evaluate_cells
from cpd.envs.suite import Sizes, Suite
from cpd.evaluation.run_evaluation import evaluation_rows
from cpd.reading import read_json
from cpd.run import checkpoint
from cpd.run.attempt import Attempt, begin_attempt
from cpd.run.descriptions import Policy, RlPolicy, check_identity
from cpd.run.directory import Run, TeacherElement, identity
from cpd.run.files import remove, sha256, write_text
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.provenance import labels
from cpd.run.shards.schema import INDEX_NAME, Episode, ShardAttributes, ShardError, read_index
from cpd.run.shards.writer import clear_shards, write_shards
from cpd.run.tables import write_rows
from cpd.teachers.collect import collect
from cpd.teachers.demonstrations import ScriptedPolicy, load_scripted, save_scripted
from cpd.teachers.policy import (
    GaussianPolicy,
    Teacher,
    TeacherActor,
    TeacherOfSuite,
    load_policy,
    save_policy,
)
from cpd.teachers.ranks import on_first_rank
from cpd.teachers.stay import StayTrainer
from cpd.teachers.trainer import TeacherTrainer
from cpd.teachers.validation import validate


def run_teacher(
    run: Run,
    element: TeacherElement,
    pool: EnvPool,
    *,
    interrupt: Interrupt,
    log: Callable[[str], None],
    comm: Comm | None = None,
) -> None:
    """Finish one teacher: COMPLETE with shards, or REJECTED if it missed the gate; a collective.

    A finished teacher is left unchanged; an interrupted one continues where it stopped.

    Args:
        run: the run directory.
        element: one of `run.teachers()`.
        pool: this rank's environments, from `env_pool`; results do not depend on its number of workers.
        interrupt: the stop flag, checked after every environment step.
        log: receives plain lines of progress.
        comm: the ranks that train together; None: this process alone.

    Raises:
        LeaseHeldError: if another process is working on this teacher.
        LeaseLostError: if another process has taken this teacher over.
        InterruptedBySignal: if asked to stop; everything needed to continue has been saved.
        ValueError: if there are more ranks than environments.
    """
    comm = comm or SerialComm()
    if comm.broadcast(element.finished):
        log(f"{element.name} is finished")
        return
    torch.set_num_threads(TORCH_THREADS)
    gate = run.config.teacher.gate
    description_path = element.policy.with_suffix(".json")
    has_success = pool.suite.returns(element.task) is None
    measure = "success" if has_success else "normalised return"
    with begin_attempt(element, comm, log, measure) as attempt:
        phases = _Phases(run.config, element, pool, interrupt, attempt, comm)
        # One rank looks which files exist: a shared file system may show different ones to different nodes. The
        # description is written after the weights, so it marks the end of training.
        if not on_first_rank(comm, description_path.exists):
            phases.train()
        on_first_rank(comm, lambda: check_identity(description_path, **identity(run.config, element)))
        description = on_first_rank(comm, lambda: read_json(description_path, Policy))
        success: float = description["training"]["validation_success"]
        # Evaluated before the gate: a rejected teacher is reported with its success rate, too.
        if not on_first_rank(comm, element.evaluation.exists):
            phases.evaluate(on_first_rank(comm, phases.load))
        result = f"validation {measure}{'' if has_success else ' (the task has no success measure)'} {success:.2f}"
        if success < gate:
            reason = f"{result} is below the gate of {gate:.2f}"
            if attempt.is_writer:
                attempt.check()
                write_text(element.rejected, reason + "\n")
            attempt.finish("rejected", reason, success=success)
            return
        # On one rank, since it takes seconds only.
        on_first_rank(comm, phases.collect)
        if attempt.is_writer:
            attempt.check()
            element.complete.touch()
        attempt.finish("done", "" if has_success else f"{result} passes the gate of {gate:.2f}", success=success)


def env_pool(config: Config, num_workers: int, num_ranks: int = 1) -> EnvPool:
    """Environments for one of `num_ranks` ranks, in `num_workers` processes; the pool makes them on first use.

    The caller closes the pool. Under MPI with several workers, get the environments before MPI starts: no process
    may fork after that.
    """
    # Rounded up: some ranks step one environment more than others.
    num_envs = -(-config.teacher.ppo.num_envs // num_ranks)
    return EnvPool(num_workers, num_envs, config.stream.suite_object)


def load_teacher(config: Config, element: TeacherElement) -> Teacher:
    """Load a finished teacher from its files."""
    if config.teacher.recipe == "scripted":
        return load_scripted(element.policy, config.stream.suite_object)
    suite, policy = config.stream.suite_object, load_policy(element.policy)
    if policy.sizes == suite.spaces.sizes:
        return policy
    return TeacherOfSuite(policy, suite.columns(element.task), suite.spaces.action_size)


def _padding(suite: Suite, task: str) -> dict[str, int]:
    """Return the sizes of a task that are smaller than those of its suite, for shards and descriptions."""
    sizes = zip(Sizes._fields, suite.sizes(task), suite.spaces.sizes, strict=True)
    return {f"task_{name}_size": own for name, own, largest in sizes if own < largest}


@dataclass(frozen=True)
class _Phases:
    """The phases of finishing one teacher, and what all of them need."""

    config: Config
    element: TeacherElement
    pool: EnvPool
    interrupt: Interrupt
    attempt: Attempt
    comm: Comm

    def load(self) -> Teacher:
        """Load the teacher from its files."""
        return load_teacher(self.config, self.element)

    def train(self) -> None:
        """Make the policy and write it; every rank trains, rank 0 writes."""
        config, element = self.config, self.element
        description: dict[str, Any] = {
            **identity(config, element),
            "labels": labels(config).as_dict(),
            **_padding(self.pool.suite, element.task),
        }
        if config.teacher.recipe == "scripted":
            self.attempt.begin("train", 1, unit="experts")
            expert = ScriptedPolicy(element.task, suite=self.pool.suite)
            success = validate(expert, config, element.task, self.pool, self.interrupt, self.comm)
            if self.attempt.is_writer:
                self.withdraw()
                training = {"validation_success": success}
                save_scripted(expert, element.policy, {**description, "training": training})
            self.attempt.advance(1, success=success)
            return
        path = element.trained_policy if config.teacher.stays else element.policy
        if not on_first_rank(self.comm, path.with_suffix(".json").exists):
            trainer = TeacherTrainer(config, element, self.pool, self.interrupt, self.attempt, self.comm)
            policy, summary = trainer.run()
            self._save(policy, path, {**description, "training": asdict(summary)}, element.checkpoints)
        if config.teacher.stays:
            self._stay(path, description)

    def _stay(self, trained: Path, description: dict[str, Any]) -> None:
        """Write the final policy: after the stay phase, if `trained` passed the gate and success is measured."""
        config, element, file = self.config, self.element, trained.with_suffix(".json")
        policy = on_first_rank(self.comm, lambda: load_policy(trained))
        training = on_first_rank(self.comm, lambda: read_json(file, RlPolicy)["training"])
        entries = on_first_rank(self.comm, lambda: read_json(file, dict[str, Any])["training"])
        if training["validation_success"] >= config.teacher.gate and not self.pool.suite.returns(element.task):
            trainer = StayTrainer(config, element, self.pool, self.interrupt, self.attempt, self.comm)
            policy, stay = trainer.run_from(policy, training)
            entries = {**entries, "validation_success": stay.validation_success, "stay": asdict(stay)}
        self._save(policy, element.policy, {**description, "training": entries}, element.stay_checkpoints)

    def _save(self, policy: GaussianPolicy, path: Path, description: dict[str, Any], checkpoints: Path) -> None:
        if self.attempt.is_writer:
            self.withdraw()
            save_policy(policy, path, description)
            # Only now: until the policy is written, the checkpoint is what a restart continues from.
            checkpoint.prune(checkpoints, keep=0)

    def withdraw(self) -> None:
        """Remove results of an earlier policy before a new one is written, so that none outlive their policy."""
        self.attempt.check()
        remove(self.element.evaluation)
        clear_shards(self.element.shards)

    def evaluate(self, teacher: Teacher) -> None:
        """Measure success as for students: with episodes that continue after success, and on training goals."""
        config, element = self.config, self.element
        # Goals beyond those of training would be unseen ones.
        num_training = min(config.evaluation.num_episodes, config.teacher.num_training_goals)
        cells = [
            Cell(element.task, config.evaluation.goal_set, config.evaluation.num_episodes, to_the_end=True),
            Cell(element.task, "training", num_training),
        ]
        done = 0
        total = sum(cell.num_episodes for cell in cells)
        self.attempt.begin("evaluate", total, unit="episodes")

        def advance(num_episodes: int) -> None:
            """Report `num_episodes` finished by this rank."""
            nonlocal done
            # An estimate without a collective: the other ranks have done about as many.
            done += num_episodes * self.comm.size
            self.attempt.advance(min(done, total))

        outcomes = evaluate_cells(
            TeacherActor(teacher),
            cells,
            config.stream.horizon,
            self.pool,
            self.comm,
            should_stop=lambda: self.interrupt.requested,
            advance=advance,
        )
        if outcomes is None:
            raise InterruptedBySignal("asked to stop while evaluating; launch again to continue")
        if not self.attempt.is_writer:
            return
        rows, episodes = evaluation_rows(
            cells, outcomes, method="teacher", seed=element.seed, stage=None, label=labels(config)
        )
        self.attempt.check()
        write_rows(element.episodes, episodes)
        write_rows(element.evaluation, rows)  # last, since this file marks the phase as finished

    def has_shards(self) -> bool:
        """Whether the shards hold the rollouts of this policy."""
        # The index is written last. Its hash tells whether the shards are of this policy or of an earlier one.
        if not (self.element.shards / INDEX_NAME).exists():
            return False
        try:
            return read_index(self.element.shards).attributes.policy_sha256 == sha256(self.element.policy)
        except ShardError:
            return False

    def collect(self) -> None:
        """Write the rollouts unless they exist; after an interrupt, start again, since this takes seconds only."""
        if self.has_shards():
            return
        teacher = self.load()
        config, element, label = self.config, self.element, labels(self.config)
        attributes = ShardAttributes(
            task=element.task,
            teacher_recipe=label.teacher_recipe,
            policy_sha256=sha256(element.policy),
            std_source=teacher.std_source,
            metaworld=label.metaworld,
            mujoco=label.mujoco,
            reward_version=label.reward_version,
            horizon=label.horizon,
            steps_after_success=config.rollouts.steps_after_success,
            suite=label.suite,
            suite_versions=label.suite_versions,
            **_padding(self.pool.suite, element.task),
        )
        episodes = collect(
            teacher,
            self.pool.get(element.task),
            self.pool.suite.goal_set(element.task, "training", config.teacher.num_training_goals),
            config.rollouts,
            label.horizon,
            element.seed,
            self.interrupt,
        )
        self.attempt.begin("rollouts", config.rollouts.num_steps)

        def counted() -> Iterator[Episode]:
            """Yield the episodes, and report each once it is written."""
            done = 0
            for episode in episodes:
                yield episode
                done += len(episode)
                self.attempt.advance(done)

        shard_steps = config.rollouts.shard_steps
        write_shards(element.shards, attributes, counted(), shard_steps, self.attempt.check)
