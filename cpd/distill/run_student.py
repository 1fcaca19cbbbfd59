"""Train one student: distil the teachers of a run into it, one task after another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NoReturn

import safetensors.torch
import torch

from cpd.comm import TORCH_THREADS, Comm, choose_device
from cpd.distill.doubt import confused_pairs, measure_plans
from cpd.distill.growth import GrowthDecision
from cpd.distill.stage_data import StageData, admitted_teachers, read_stage
from cpd.distill.trainer import StepReport, StudentTrainer
from cpd.envs.cells import Cell, EnvPool, evaluate_cells
from cpd.envs.episodes import mean_normalised_return, mean_of_scores
from cpd.evaluation.measures import curve_steps
from cpd.reading import read_bytes
from cpd.run.attempt import Attempt, begin_attempt
from cpd.run.checkpoint import latest, save
from cpd.run.directory import Run, StudentElement, TeacherElement, identity
from cpd.run.files import remove
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.provenance import labels
from cpd.run.tables import CurveRow, write_rows
from cpd.student.actor import make_actor
from cpd.student.network import save_student

#: Episodes per forward pass when a learning curve is evaluated: few, so that several ranks can share them.
CURVE_CHUNK: Final = 5
#: Experts a layer up to which also those without tokens are logged: of a long stream's, few have any.
MAX_LOGGED_EXPERTS: Final = 128
#: Distillation steps after which ranks agree on whether to stop: seldom, since agreeing costs a collective.
AGREE_EVERY: Final = 10


def run_student(
    run: Run,
    element: StudentElement,
    comm: Comm,
    *,
    interrupt: Interrupt,
    log: Callable[[str], None],
    partial: bool = False,
) -> None:
    """Distil the whole stream into one student, starting from its newest checkpoint; a collective.

    With `partial`, stop before the first stage whose teacher is not finished: students can train while later
    teachers still do.

    Raises:
        LeaseHeldError: if another process is training this student.
        InterruptedBySignal: if a signal asked to stop; everything is saved.
        ValueError: if a teacher is not finished, was rejected although the recipe forbids it, or has damaged
            rollouts.
    """
    torch.set_num_threads(TORCH_THREADS)
    with begin_attempt(element, comm, log) as attempt:
        # Rank 0 looks for all: a shared file system may show different files to different nodes.
        if comm.broadcast(element.complete.exists()):
            attempt.finish("done")
            return
        admitted, pending = admitted_teachers(run, element, comm, partial=partial)
        distillation = Distillation(run, element, comm, interrupt, attempt, admitted, pending)
        try:
            missing_task = distillation.run_stages()
        finally:
            distillation.close()
        if missing_task is not None:
            attempt.finish("waiting", f"the next stage waits for the teacher of {missing_task}")
            return
        if attempt.is_writer:
            attempt.check()
            element.complete.touch()
        attempt.finish("done", distillation.summary())


class Distillation:
    """Runs a trainer: checkpoints, policies after stages, learning curves, metrics, requests to stop."""

    def __init__(
        self,
        run: Run,
        element: StudentElement,
        comm: Comm,
        interrupt: Interrupt,
        attempt: Attempt,
        admitted: dict[str, TeacherElement],
        pending: frozenset[str],
    ) -> None:
        """Continue from the newest checkpoint, if there is one."""
        self.run, self.element, self.comm, self.interrupt, self.attempt = run, element, comm, interrupt, attempt
        self.config = element.config
        self.admitted, self.pending = admitted, pending
        self.label = labels(element.config)
        # A teacher that is not finished may still be admitted.
        is_expected = (task in admitted or task in pending for task in self.config.stream.tasks)
        self._stages_before = list(accumulate(is_expected, initial=0))
        self.trainer = StudentTrainer(element.config, element.seed, comm, choose_device(comm))
        self.curves: list[CurveRow] = []
        self._stages_data: dict[str, StageData] = {}
        self.pool = EnvPool(suite=element.config.stream.suite_object)
        self._loss: float | None = None
        self._saved = ""
        self.log = attempt.open_metrics(self._resume())

    def _resume(self) -> int:
        """Restore the newest checkpoint; returns the size of metrics.jsonl that belongs to it."""
        checkpoint = self.comm.broadcast(latest(self.element.checkpoints) if self.attempt.is_writer else None)
        if checkpoint is None:
            if self.attempt.is_writer:
                # An attempt that ended before its first checkpoint may have left a curve.
                remove(self.element.curves)
                self._save_policy(-1)
            return 0
        self._saved = checkpoint.path.name
        state = checkpoint.load(**identity(self.config, self.element))
        self.trainer.restore(state["trainer"])
        self.curves = [CurveRow(**row) for row in state["curves"]]
        return int(state["metrics_size"])

    def close(self) -> None:
        """Close environments and files."""
        self.pool.close()
        if self.log:
            self.log.close()

    def run_stages(self) -> str | None:
        """Run the remaining stages, up to one whose teacher is not finished; returns that task, or None."""
        progress, tasks = self.trainer.learner.progress, self.config.stream.tasks
        self.attempt.begin("distill", self._steps_before(len(tasks)), self._steps_done())
        # Every stage of joint training uses the data of all teachers.
        if self.config.distill.protocol == "joint" and self.pending:
            return next(task for task in tasks if task in self.pending)
        for stage in range(progress.stage, len(tasks)):
            self.attempt.check()
            if tasks[stage] in self.pending:
                return tasks[stage]
            if tasks[stage] in self.admitted:
                self._run_stage(stage, self._stage_data(tasks[stage]))
            else:
                self._log(event="skipped", stage=stage, task=tasks[stage])
                self.trainer.skip_stage()
        return None

    def _stage_data(self, task: str) -> StageData:
        """The data of a stage of `task`; in joint training the data of all teachers, read once."""
        config = self.config.distill
        if config.protocol != "joint":
            return read_stage(self.run, self.admitted[task], self.comm, config.episodes)
        if not self._stages_data:
            self._stages_data = {
                name: read_stage(self.run, teacher, self.comm, config.episodes)
                for name, teacher in self.admitted.items()
            }
        others = tuple(data for name, data in self._stages_data.items() if name != task)
        return replace(self._stages_data[task], others=others)

    def _steps_before(self, stage: int) -> int:
        """Optimisation steps in the stages before `stage`, skipped ones left out."""
        return self._num_steps * self._stages_before[stage]

    @property
    def _num_steps(self) -> int:
        """Optimisation steps in a stage."""
        return 0 if self.config.distill.protocol == "teachers" else self.config.distill.steps_per_stage

    def _steps_done(self) -> int:
        progress = self.trainer.learner.progress
        return self._steps_before(progress.stage) + progress.step

    def _run_stage(self, stage: int, data: StageData) -> None:
        """Run the remaining steps of one stage."""
        trainer, progress = self.trainer, self.trainer.learner.progress
        for decision in trainer.begin_stage(data):
            self._log(event="growth", **{**self._growth_entry(decision), "sources": str(decision.sources)})
        if not self._num_steps:
            self._log(event="kept", stage=stage, task=self.config.stream.tasks[stage])
        for step in range(progress.step, self._num_steps):
            self._evaluate_if_due()
            is_logged = (step + 1) % self.config.logging.metrics_every == 0 or step == 0
            if report := trainer.train_step(is_logged):
                self._log_step(report)
            self.attempt.advance(self._steps_done(), loss=self._loss)
            self._save_if_due()
        self._evaluate_if_due()  # the point at the end, with the batches of the stage still open
        if self._may_hedge:
            self._save_checkpoint()  # a stop while plans are measured goes back to here
        trainer.end_stage(data)
        if self._may_hedge:
            self._measure_plans(stage)
        if summary := trainer.protection.report():
            self._log(event="protection", stage=stage, **summary)
        if self.attempt.is_writer:
            self.attempt.check()
            self._save_policy(stage)
        # After the policy: a kill between the two repeats the end of the stage and writes the same policy again.
        self._save_checkpoint()

    @property
    def _may_hedge(self) -> bool:
        """Whether the student's actions under doubt depend on the measured success of plans."""
        student, protocol = self.config.student, self.config.distill.protocol
        return student.task_identity == "inferred" and student.act != "most_likely" and protocol == "continual"

    def _measure_plans(self, stage: int) -> None:
        """Measure plans for the tasks that the belief confuses since this stage."""
        student, tasks = self.trainer.learner.student, self.config.stream.distinct_tasks
        pairs = self.comm.broadcast(confused_pairs(student, self.trainer.memory.segments))
        measured = measure_plans(
            student,
            tasks,
            pairs,
            self.config.stream.horizon,
            self.pool,
            self.comm,
            should_stop=lambda: self.interrupt.requested,
        )
        if measured is None:
            raise InterruptedBySignal(
                f"stopped on request while plans were measured after stage {stage}; saved before: launch again to "
                "continue"
            )
        for plan, by_task in measured.items():
            for task, outcomes in by_task.items():
                successes = sum(outcome.success for outcome in outcomes)
                returned = mean_normalised_return(outcomes)
                student.plans.record(plan, task, mean_of_scores(outcomes))
                self._log(
                    event="plan",
                    stage=stage,
                    task=tasks[task],
                    plan_first=tasks[plan.first],
                    plan_second=tasks[plan.second],
                    episodes=len(outcomes),
                    successes=successes,
                    env_steps=sum(outcome.length for outcome in outcomes),
                    **({} if returned is None else {"normalised_return": returned}),
                )

    def _log_step(self, report: StepReport) -> None:
        progress, tasks = self.trainer.learner.progress, self.config.stream.distinct_tasks
        values = asdict(report)
        by_task, shares_LE = values.pop("by_task"), values.pop("expert_shares")
        values["memory_steps"] = self.trainer.memory.num_steps
        values |= {f"imitation.{tasks[task]}": value for task, value in by_task.items()}
        for layer, shares in enumerate(shares_LE):
            values |= {
                f"expert_share.{layer}.{expert}": share
                for expert, share in enumerate(shares)
                if share or len(shares) <= MAX_LOGGED_EXPERTS
            }
        task = self.config.stream.tasks[progress.stage]
        self._log(stage=progress.stage, step=progress.step, task=task, **values)
        self._loss = report.loss

    def _log(self, **values: float | int | str | None) -> None:
        if self.log:
            progress = self.trainer.learner.progress
            step = progress.stage * self._num_steps + progress.step
            self.log.append(**values, global_step=step)

    def _save_if_due(self) -> None:
        """Save a checkpoint at regular steps; save and stop if any rank was asked to stop."""
        step, logging = self.trainer.learner.progress.step, self.config.logging
        # At a stage's end in any case, since a stage may have fewer than AGREE_EVERY steps.
        is_due = step % AGREE_EVERY == 0 or step == self.config.distill.steps_per_stage
        if is_due and self.comm.any(self.interrupt.requested):
            self._stop()
        elif step % logging.checkpoint_every == 0:
            self._save_checkpoint()

    def _stop(self) -> NoReturn:
        self._save_checkpoint()
        progress = self.trainer.learner.progress
        raise InterruptedBySignal(
            f"stopped on request; saved at stage {progress.stage}, step {progress.step}: launch again to continue"
        )

    def _save_checkpoint(self) -> None:
        """Save on rank 0, after checking that all ranks hold the same student."""
        self.trainer.check_finite()
        # Otherwise a resumed run would continue on all ranks from the student of one of them.
        digest = hashlib.sha256(self.trainer.learner.flat.values.cpu().numpy().tobytes()).hexdigest()
        if len(set(self.comm.gather(digest))) > 1:
            raise RuntimeError(
                "the ranks hold different students, since their processors or libraries compute differently; use "
                "the same type of node and the same libraries for all ranks"
            )
        progress = self.trainer.learner.progress
        name = f"stage-{progress.stage:02d}-step-{progress.step:06d}"
        # A checkpoint of this name holds the same state, and a kill while overwriting it would damage it.
        if self.log is None or name == self._saved:
            return
        self.attempt.check()
        state: dict[str, Any] = {
            "trainer": self.trainer.state(),
            "curves": [asdict(row) for row in self.curves],
            "metrics_size": self.log.size,
        }
        position = {"stage": progress.stage, "step": progress.step}
        save(self.element.checkpoints, name, state, **position, **identity(self.config, self.element))
        self._saved = name

    def _save_policy(self, stage: int) -> None:
        """Publish the student as it is after `stage`; -1: before the first stage."""
        trainer, config = self.trainer, self.config
        description = {
            **identity(config, self.element, stage),
            "protocol": config.distill.protocol,
            "distinct_tasks": list(config.stream.distinct_tasks),
            "labels": self.label.as_dict(),
            "memory_steps": trainer.memory.num_steps,
            "memory_bytes": trainer.memory.num_bytes,
            "memory_budget": trainer.memory.budget,
            "growth": [self._growth_entry(decision) for decision in trainer.learner.progress.growth],
            "skipped_stages": list(trainer.learner.progress.skipped),
        }
        if config.distill.protocol == "isolated":
            num_trained = int(trainer.learner.student.known_K.sum())
            description["num_parameters"] = trainer.learner.student.num_parameters * num_trained
        if config.distill.protocol == "teachers":
            seen = [config.stream.distinct_tasks[task] for task in trainer.learner.progress.seen]
            description["num_parameters"] = sum(_num_parameters(self.admitted[task].policy) for task in seen)
        path, earlier = self.element.stage_policy(stage), self.element.policy_before(stage)
        save_student(path, trainer.learner.student, description, earlier)

    def _growth_entry(self, decision: GrowthDecision) -> dict[str, Any]:
        """A growth decision as a log entry, with the names of tasks."""
        tasks = self.config.stream.distinct_tasks
        names = {"task": tasks[decision.task], "nearest_task": tasks[decision.nearest_task]}
        return {**asdict(decision), **names}

    def _evaluate_if_due(self) -> None:
        """Add a point to the learning curve of the current task, if one is due. Training does not depend on it."""
        progress, evaluation = self.trainer.learner.progress, self.config.evaluation
        stage, step = progress.stage, progress.step
        if step not in curve_steps(evaluation.curve_points, self.config.distill.steps_per_stage):
            return
        if any((row.stage, row.step) == (stage, step) for row in self.curves):
            return
        task = self.config.stream.tasks[stage]
        self.trainer.check_finite()
        self.trainer.learner.refresh_prototypes()
        outcomes = evaluate_cells(
            make_actor(self.trainer.learner.student, self.config.stream.distinct_tasks),
            [Cell(task, evaluation.goal_set, evaluation.num_episodes_brief)],
            self.config.stream.horizon,
            self.pool,
            self.comm,
            chunk=CURVE_CHUNK,
            should_stop=lambda: self.interrupt.requested,
        )
        if outcomes is None:
            self._stop()
        row = CurveRow(
            method=self.element.method,
            seed=self.element.seed,
            stage=stage,
            step=step,
            task=task,
            goal_set=evaluation.goal_set,
            episodes=len(outcomes[0]),
            successes=sum(outcome.success for outcome in outcomes[0]),
            normalised_return=mean_normalised_return(outcomes[0]),
            **asdict(self.label),
        )
        self.curves.append(row)
        success = row.total / row.episodes
        self._log(event="evaluation", stage=stage, task=task, success=success)
        self.attempt.advance(self._steps_done(), success=success)
        if self.attempt.is_writer:
            self.attempt.check()
            write_rows(self.element.curves, self.curves)

    def summary(self) -> str:
        """The result in one line."""
        trainer = self.trainer
        skipped = [self.config.stream.tasks[stage] for stage in trainer.learner.progress.skipped]
        parts = [
            f"{len(self.config.stream.tasks) - len(skipped)} stages",
            f"{trainer.learner.student.num_experts} experts a layer",
            f"memory {trainer.memory.num_steps} steps, {trainer.memory.num_bytes / 1024:.0f} KiB",
        ]
        return ", ".join(parts) + (f"; skipped: {', '.join(skipped)}" if skipped else "")


def _num_parameters(policy: Path) -> int:
    """The number of elements of a teacher's policy, statistics of observations included."""
    return sum(tensor.numel() for tensor in safetensors.torch.load(read_bytes(policy)).values())
