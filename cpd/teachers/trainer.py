"""Training one teacher: a warm start if the recipe has one, iterations of its learner, validation, early stopping,
and checkpoints to resume from exactly.

Under MPI all of it is a collective; only rank 0 writes.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from cpd.comm import Comm, DivergedError, SerialComm, float_sum
from cpd.config import Config
from cpd.envs.cells import Cell, EnvPool, evaluate_cells
from cpd.envs.goals import goal_set
from cpd.run import checkpoint
from cpd.run.attempt import Attempt
from cpd.run.directory import TeacherElement
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import MetricsLog
from cpd.teachers.demonstrations import Demonstrator
from cpd.teachers.exploration import Exploration
from cpd.teachers.policy import GaussianPolicy, Teacher, TeacherActor
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.ranks import check_ranks_agree, float_mean, on_first_rank, own_slots
from cpd.teachers.rollout import EpisodeRules, sample
from cpd.teachers.warm_start import WarmStart, warm_start


@dataclass(frozen=True)
class TrainingSummary:
    """How a teacher came to be, for its description."""

    learner: str
    ranks: tuple[int, ...]
    """Numbers of MPI ranks that trained it, ascending: more than one where it was resumed with another number."""
    iterations: int
    env_steps: int
    """Of RL: those of demonstrations and validations come on top."""
    policy_updates: int
    """Gradient steps of RL on the policy, up to the end of training."""
    stopped_by: str
    """`validation`: the stopping rule; `budget`: max_env_steps."""
    selected_iteration: int
    """Iteration after which the final policy was taken: the last of the best on validation goals."""
    validation_success: float
    """Success rate of the final policy on validation goals."""
    warm_start: WarmStart | None
    """Where RL started from, success rate included; None if from scratch."""


@dataclass
class _Progress:
    """Where training stands, beside the learner."""

    iteration: int = 0
    env_steps: int = 0
    passes: int = 0
    """Successive validations, up to now, that reached `stop_success`."""
    best_success: float = -1.0
    best_iteration: int = 0
    policy_updates: int = 0
    is_exploring: bool = True
    """Until `exploring_until` is exceeded."""
    ranks: list[int] = field(default_factory=list)
    """Numbers of ranks that took part, ascending."""
    warm_start: dict[str, Any] | None = None
    """A `WarmStart`, once it is over."""
    unrecorded: dict[str, float] = field(default_factory=dict)
    """Metrics of the present iteration, until it has been validated (if due) and recorded."""


def validate(
    teacher: Teacher, config: Config, task: str, pool: EnvPool, interrupt: Interrupt, comm: Comm | None = None
) -> float:
    """Success rate on validation goals with deterministic actions, at the stream's horizon; shared by the ranks.

    Raises:
        InterruptedBySignal: if asked to stop.
    """
    outcomes = evaluate_cells(
        TeacherActor(teacher),
        [Cell(task, "validation", config.teacher.num_validation_goals)],
        config.stream.horizon,
        pool,
        comm or SerialComm(),
        should_stop=lambda: interrupt.requested,
    )
    if outcomes is None:
        raise InterruptedBySignal("asked to stop while validating; launch again to go on")
    return sum(outcome.success for outcome in outcomes[0]) / len(outcomes[0])


class TeacherTrainer:
    """One teacher's training, from its newest checkpoint on if there is one.

    Args:
        config: the run's.
        element: the teacher, of which this process is the single writer.
        pool: environments, at least this rank's part of the learner's `num_envs` per task.
        interrupt: looked at after every environment step.
        attempt: told of progress.
        comm: the ranks that train together.

    Raises:
        ValueError: if that many ranks cannot.
    """

    def __init__(
        self,
        config: Config,
        element: TeacherElement,
        pool: EnvPool,
        interrupt: Interrupt,
        attempt: Attempt,
        comm: Comm | None = None,
    ) -> None:
        self._comm: Comm = comm or SerialComm()
        config.teacher.check_ranks(self._comm.size)
        self._config = config
        self._element = element
        self._pool = pool
        self._interrupt = interrupt
        self._session = attempt
        self._settings = settings = config.teacher.learner_settings
        self._slots = own_slots(self._comm, settings.num_envs)
        self._has_demonstrations = config.teacher.recipe == "demo_rl"
        # Iterations in which only the value network learns.
        self._num_critic_iterations = (
            config.teacher.warm_start.critic_iterations if self._has_demonstrations else 0
        )
        self._steps_per_iteration = settings.num_envs * settings.steps_per_env
        self._goals = goal_set(element.task, "training", config.teacher.num_training_goals)
        self._learner = PPOLearner(
            settings, element.seed, keep_normalizer=self._has_demonstrations, comm=self._comm
        )
        self._progress = _Progress()
        self._best_policy: dict[str, Tensor] = {}
        self._metrics = self._resume()

    def _resume(self) -> MetricsLog | None:
        """Restore the newest checkpoint; returns the metrics' log on the rank that writes."""
        is_writer, metrics_size = self._session.is_writer, 0
        newest = self._comm.broadcast(checkpoint.latest(self._element.checkpoints) if is_writer else None)
        if newest is not None:
            state = newest.load()
            self._learner.restore(state["learner"])
            self._best_policy = state["best_policy"]
            self._progress = _Progress(**state["progress"])
            metrics_size = state["metrics_size"]
        self._progress.ranks = sorted({*self._progress.ranks, self._comm.size})
        return MetricsLog(self._element.metrics, metrics_size) if is_writer else None

    def _save(self) -> None:
        if self._metrics is None:
            return  # another rank writes
        if self._has_demonstrations and self._progress.warm_start is None:
            return  # a warm start that was cut short starts again
        # Names sort by progress: an iteration is trained first, then recorded.
        name = f"iteration-{self._progress.iteration:06d}-{'1' if self._progress.unrecorded else '2'}"
        newest = checkpoint.latest(self._element.checkpoints)
        if newest and newest.path.name == name:
            return  # the same state; a kill while overwriting it would damage it
        self._session.check()
        state: dict[str, Any] = {
            "learner": self._learner.state(),
            "best_policy": self._best_policy,
            "progress": asdict(self._progress),
            "metrics_size": self._metrics.size,
        }
        checkpoint.save(self._element.checkpoints, name, state, iteration=self._progress.iteration)

    @property
    def _is_spent(self) -> bool:
        """Whether the budget has no room for another iteration; there is always one that moves the policy."""
        progress = self._progress
        no_room = progress.env_steps + self._steps_per_iteration > self._config.teacher.max_env_steps
        return progress.policy_updates > 0 and no_room

    def run(self) -> tuple[GaussianPolicy, TrainingSummary]:
        """Train until the stopping rule or the budget ends it.

        Returns:
            The policy that was best on validation goals (the last one of equals), and how it came to be.

        Raises:
            InterruptedBySignal: if asked to stop; everything up to the last whole iteration has been saved.
            DivergedError: on every rank, if an update leaves numbers that are not finite; it is not saved.
        """
        progress = self._progress
        try:
            if self._has_demonstrations and progress.warm_start is None:
                self._warm_start()
            self._session.begin("train", self._config.teacher.max_env_steps, progress.env_steps)
            while True:
                if progress.unrecorded:
                    self._validate_and_record()
                if self._is_over:
                    break
                self._iterate()
        except InterruptedBySignal:
            self._save()
            raise
        finally:
            if self._metrics:
                self._metrics.close()
        # Only what has been through policy gradients is ever selected: no warm start passes for RL.
        assert progress.policy_updates > 0
        assert progress.best_iteration > self._num_critic_iterations
        policy = self._learner.policy
        policy.load_state_dict(self._best_policy)
        return policy.eval().requires_grad_(False), TrainingSummary(
            learner="ppo",
            ranks=tuple(progress.ranks),
            iterations=progress.iteration,
            env_steps=progress.env_steps,
            policy_updates=progress.policy_updates,
            stopped_by="validation" if self._has_passed else "budget",
            selected_iteration=progress.best_iteration,
            validation_success=progress.best_success,
            warm_start=WarmStart(**progress.warm_start) if progress.warm_start else None,
        )

    def _warm_start(self) -> None:
        """Warm-start the policy on one rank, whose decisions the others take over."""
        teacher, element, policy = self._config.teacher, self._element, self._learner.policy
        self._session.begin("warm start", 1, unit="warm starts")
        demonstrator = Demonstrator(
            element.task,
            self._goals,
            self._pool.get(element.task),
            teacher.warm_start,
            teacher.horizon,
            element.seed,
            self._interrupt,
        )

        def work() -> tuple[WarmStart, dict[str, Tensor]]:
            done = warm_start(
                policy,
                demonstrator,
                validate=lambda: validate(policy, self._config, element.task, self._pool, self._interrupt),
            )
            return done, policy.state_dict()

        done, state = on_first_rank(self._comm, work)
        policy.load_state_dict(state)
        self._progress.warm_start = asdict(done)
        self._session.advance(1, success=done.validation_success)
        self._save()

    def _validate(self) -> float:
        return validate(
            self._learner.policy, self._config, self._element.task, self._pool, self._interrupt, self._comm
        )

    @property
    def _has_passed(self) -> bool:
        return self._progress.passes >= self._config.teacher.stop_passes

    @property
    def _is_over(self) -> bool:
        return self._has_passed or self._is_spent

    @property
    def _rules(self) -> EpisodeRules:
        teacher = self._config.teacher
        exploring = Exploration(teacher.exploring_share, teacher.exploring_rate, teacher.exploring_steps)
        return EpisodeRules(
            teacher.horizon,
            teacher.terminate_on_success,
            exploring if self._progress.is_exploring else Exploration(),
            teacher.grasp_bonus,
            teacher.reward_convexity,
        )

    def _iterate(self) -> None:
        """Sample and learn; nothing changes if the job is asked to stop meanwhile."""
        progress = self._progress
        start = time.monotonic()
        batch = sample(
            self._learner.policy,
            self._pool.get(self._element.task),
            self._goals,
            self._settings,
            self._rules,
            self._element.seed,
            progress.iteration,
            slots=self._slots,
            should_stop=lambda: self._interrupt.requested,
        )
        # A rank that was not asked has sampled in vain; all stop where the last iteration ended.
        if self._comm.any(batch is None) or batch is None:
            raise InterruptedBySignal("asked to stop while training; launch again to go on")
        sampled = time.monotonic()
        critic_only = progress.iteration < self._num_critic_iterations
        learned = self._learner.update(
            batch, progress.iteration, critic_only=critic_only, exploring=progress.is_exploring
        )
        check_ranks_agree([*self._learner.policy.state_dict().values()], self._comm)
        self._check_finite(learned)
        progress.iteration += 1
        exploring_steps = float_sum(self._comm, batch.exploring_steps)
        progress.env_steps += self._steps_per_iteration + round(exploring_steps)
        if not critic_only:
            progress.policy_updates += self._learner.policy_updates(learned)
        progress.unrecorded = {
            "train_success": float_mean(batch.train_success, len(self._slots), self._comm),
            "train_return": float_mean(batch.train_return, len(self._slots), self._comm),
            "exploring_steps": exploring_steps,
            **learned,
            "sample_seconds": sampled - start,
            "update_seconds": time.monotonic() - sampled,
        }
        progress.is_exploring &= progress.unrecorded["train_success"] <= self._config.teacher.exploring_until
        self._session.advance(progress.env_steps)

    def _check_finite(self, learned: dict[str, float]) -> None:
        """Raise DivergedError, before anything is saved, if the update has left the policy with no use."""
        lost = [name for name, value in learned.items() if not math.isfinite(value)]
        if not all(bool(tensor.isfinite().all()) for tensor in self._learner.policy.parameters()):
            lost.append("the policy")
        if lost:
            key = "warm_start.rl_learning_rate" if self._has_demonstrations else "ppo.learning_rate"
            raise DivergedError(
                f"{self._element.name}: not finite after the update of iteration {self._progress.iteration + 1}: "
                f"{', '.join(lost)}; lower teacher.{key}"
            )

    def _validate_and_record(self) -> None:
        """Finish an iteration: validate if it is due, record, and save now and then."""
        teacher, progress = self._config.teacher, self._progress
        start = time.monotonic()
        success: float | None = None
        # While most training episodes fail, validation would fail too, and cost more than the training:
        # failing episodes last longest.
        is_promising = progress.unrecorded["train_success"] >= teacher.validate_from
        is_due = progress.iteration % teacher.validate_every == 0 and is_promising
        is_due &= progress.policy_updates > 0
        if is_due or self._is_spent:
            success = self._validate()
            progress.passes = progress.passes + 1 if success >= teacher.stop_success else 0
            if success >= progress.best_success:
                progress.best_success, progress.best_iteration = success, progress.iteration
                state = self._learner.policy.state_dict()
                self._best_policy = {name: tensor.clone() for name, tensor in state.items()}
        if self._metrics:
            self._metrics.append(
                iteration=progress.iteration,
                env_steps=progress.env_steps,
                **progress.unrecorded,
                validation_success=success,
                validation_seconds=time.monotonic() - start,
            )
        progress.unrecorded = {}
        self._session.advance(progress.env_steps, success=success, loss=None)
        if progress.iteration % self._config.logging.teacher_checkpoint_every == 0 or self._is_over:
            self._save()
