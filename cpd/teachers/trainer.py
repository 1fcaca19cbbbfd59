"""Train one teacher: a warm start if the recipe has one, then iterations of PPO with validations.

Training resumed from a checkpoint gives the same bits. Under MPI everything is a collective; only rank 0 writes.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torch import Tensor

from cpd.comm import Comm, DivergedError, SerialComm, float_sum
from cpd.config import Config, ExplorationConfig
from cpd.config.teacher import CRITIC_ITERATIONS
from cpd.envs.cells import EnvPool
from cpd.run import checkpoint
from cpd.run.attempt import Attempt
from cpd.run.directory import TeacherElement, identity
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import MetricsLog
from cpd.teachers.demonstrations import Demonstrator
from cpd.teachers.policy import GaussianPolicy
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.ranks import check_ranks_agree, float_mean, on_first_rank, slots_of_rank
from cpd.teachers.rollout import EpisodeRules, sample
from cpd.teachers.validation import validate
from cpd.teachers.warm_start import WarmStart, warm_start

#: Share of successful training episodes from which policies are validated. While most training episodes fail,
#: validation would fail too and take longer than training, since failing episodes last longest.
VALIDATE_FROM: Final = 0.5


@dataclass(frozen=True)
class TrainingSummary:
    """How a teacher was trained, for its description."""

    learner: str
    ranks: tuple[int, ...]
    """Numbers of MPI ranks that trained it, ascending; several if it was resumed with another number."""
    iterations: int
    env_steps: int
    """Environment steps of RL, without demonstrations and validations."""
    policy_updates: int
    """Gradient steps of RL on the policy, up to the end of training."""
    stopped_by: str
    """`validation`: by the stopping rule; `budget`: by max_env_steps."""
    selected_iteration: int
    """Iteration of the final policy: the last of those with the best success on validation goals."""
    validation_success: float
    """Mean score of the final policy on validation goals: success rate, or normalised return."""
    warm_start: WarmStart | None
    """How the policy that RL started from was made; None for RL from scratch."""


@dataclass
class _Progress:
    """The state of training apart from that of the learner; checkpoints hold it under these names."""

    iteration: int = 0
    env_steps: int = 0
    passes: int = 0
    """Number of latest successive validations that reached `stop_success`."""
    best_success: float = -1.0
    best_iteration: int = 0
    policy_updates: int = 0
    is_exploring: bool = True
    """True until `exploration.stop_at_success` is exceeded."""
    ranks: list[int] = field(default_factory=list)
    """Numbers of ranks that took part, ascending."""
    warm_start: dict[str, Any] | None = None
    """The `WarmStart` as a dictionary; None before it has ended."""
    unrecorded: dict[str, float] = field(default_factory=dict)
    """Metrics of the current iteration, until it has been validated (if due) and recorded."""
    best_success_last: float = -1.0
    """In the stay phase: success at the last step of the best policy."""
    first_success: float = -1.0
    """In the stay phase: success of the policy that it began with; negative until that is validated."""
    first_success_last: float = -1.0


class TeacherTrainer:
    """One teacher's training, which continues from its newest checkpoint if there is one.

    Args:
        config: settings of the run.
        element: the teacher, which only this process may write.
        pool: environments, at least as many per task as this rank steps.
        interrupt: checked before every environment step.
        attempt: receives progress.
        comm: the ranks that train together; None: this process alone.

    Raises:
        ValueError: if there are more ranks than environments.
    """

    phase = "train"  # in the status

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
        self._checkpoints = element.checkpoints
        self._pool = pool
        self._interrupt = interrupt
        self._attempt = attempt
        ppo = config.teacher.ppo
        self._slots = slots_of_rank(self._comm, ppo.num_envs)
        self._has_warm_start = config.teacher.recipe == "demo_rl"
        # From scratch there is no policy to spoil.
        self._num_critic_iterations = CRITIC_ITERATIONS if self._has_warm_start else 0
        self._steps_per_iteration = ppo.num_envs * ppo.steps_per_env
        self._goals = pool.suite.goal_set(element.task, "training", config.teacher.num_training_goals)
        self._learner = PPOLearner(
            ppo,
            element.seed,
            keep_normalizer=self._has_warm_start,
            comm=self._comm,
            suite=pool.suite,
            task=element.task,
        )
        self._progress = _Progress()
        self._best_policy: dict[str, Tensor] = {}
        self._metrics: MetricsLog | None = None

    def _resume(self, metrics_size: int = 0) -> MetricsLog | None:
        """Restore the newest checkpoint; returns the log of metrics on the rank that writes."""
        # Without a checkpoint the log keeps its first `metrics_size` bytes.
        is_writer = self._attempt.is_writer
        # Rank 0 chooses for all: a shared file system may show different checkpoints to different nodes.
        newest = self._comm.broadcast(checkpoint.latest(self._checkpoints) if is_writer else None)
        if newest is not None:
            state = newest.load(**identity(self._config, self._element))
            self._learner.restore(state["learner"])
            self._best_policy = state["best_policy"]
            self._progress = _Progress(**state["progress"])
            metrics_size = state["metrics_size"]
        self._progress.ranks = sorted({*self._progress.ranks, self._comm.size})
        # Records after the checkpoint are cut off: their iterations are trained again.
        return self._attempt.open_metrics(metrics_size)

    def _save(self) -> None:
        """Save a checkpoint on rank 0, unless the newest one holds this state."""
        if self._metrics is None:
            return  # another rank writes
        if self._has_warm_start and self._progress.warm_start is None:
            return  # an interrupted warm start is repeated from its beginning
        # Names sort by progress: an iteration is trained first, then recorded.
        name = f"iteration-{self._progress.iteration:06d}-{'1' if self._progress.unrecorded else '2'}"
        newest = checkpoint.latest(self._checkpoints)
        if newest and newest.path.name == name:
            return  # it holds the same state, and a kill while overwriting it would damage it
        self._attempt.check()
        state: dict[str, Any] = {
            "learner": self._learner.state(),
            "best_policy": self._best_policy,
            "progress": asdict(self._progress),
            "metrics_size": self._metrics.size,
        }
        of = identity(self._config, self._element)
        checkpoint.save(self._checkpoints, name, state, iteration=self._progress.iteration, **of)

    @property
    def _is_spent(self) -> bool:
        """Whether the budget leaves no room for another iteration; at least one trains the policy in any case."""
        progress = self._progress
        no_room = progress.env_steps + self._steps_per_iteration > self._config.teacher.max_env_steps
        return progress.policy_updates > 0 and no_room

    def run(self) -> tuple[GaussianPolicy, TrainingSummary]:
        """Train until the stopping rule or the budget ends training.

        Returns:
            The policy with the best success on validation goals (the last of equals), and how it was trained.

        Raises:
            InterruptedBySignal: if asked to stop; the last whole iteration has been saved.
            DivergedError: on every rank, if an update gives numbers that are not finite; it is not saved.
        """
        self._metrics = self._resume()
        self._train()
        progress = self._progress
        # Only policies that RL has trained are selected: a warm start never counts as one.
        assert progress.policy_updates > 0
        assert progress.best_iteration > self._num_critic_iterations
        return self._best(), TrainingSummary(
            learner="ppo",
            ranks=tuple(progress.ranks),
            iterations=progress.iteration,
            env_steps=progress.env_steps,
            policy_updates=progress.policy_updates,
            stopped_by=self._stopped_by,
            selected_iteration=progress.best_iteration,
            validation_success=progress.best_success,
            warm_start=WarmStart(**progress.warm_start) if progress.warm_start else None,
        )

    def _begin(self) -> None:
        """Prepare the first iteration, unless that has been done."""
        if self._has_warm_start and self._progress.warm_start is None:
            self._warm_start()

    def _train(self) -> None:
        """Iterate until training is over; if asked to stop, save and raise."""
        progress = self._progress
        try:
            self._begin()
            self._attempt.begin(self.phase, self._config.teacher.max_env_steps, progress.env_steps)
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

    def _best(self) -> GaussianPolicy:
        policy = self._learner.policy
        policy.load_state_dict(self._best_policy)
        return policy.eval().requires_grad_(False)

    @property
    def _stopped_by(self) -> str:
        return "validation" if self._has_passed else "budget"

    def _warm_start(self) -> None:
        """Warm-start the policy on rank 0 and copy it to the others."""
        # On one rank: it takes a minute, and its result does not depend on the number of ranks.
        teacher, element, policy = self._config.teacher, self._element, self._learner.policy
        self._attempt.begin("warm start", 1, unit="warm starts")
        demonstrator = Demonstrator(
            element.task,
            self._goals,
            self._pool.get(element.task),
            teacher.warm_start.num_demonstrations,
            teacher.horizon,
            element.seed,
            self._interrupt,
        )

        def clone() -> tuple[WarmStart, dict[str, Tensor]]:
            """Clone the scripted expert into `policy`; return the record and the weights, for the other ranks."""
            record = warm_start(
                policy,
                demonstrator,
                teacher.warm_start,
                validate=lambda: validate(policy, self._config, element.task, self._pool, self._interrupt),
            )
            return record, policy.state_dict()

        record, state = on_first_rank(self._comm, clone)
        policy.load_state_dict(state)
        self._progress.warm_start = asdict(record)
        self._attempt.advance(1, success=record.validation_success)
        self._save()

    @property
    def _has_passed(self) -> bool:
        return self._progress.passes >= self._config.teacher.stop_passes

    @property
    def _is_over(self) -> bool:
        return self._has_passed or self._is_spent

    @property
    def _rules(self) -> EpisodeRules:
        """How the episodes of the next iteration begin and end."""
        teacher = self._config.teacher
        return EpisodeRules(
            teacher.horizon,
            teacher.terminate_on_success,
            teacher.exploration if self._progress.is_exploring else ExplorationConfig(),
            teacher.grasp_bonus,
            teacher.reward_convexity,
        )

    def _iterate(self) -> None:
        """Sample and learn; if the job is asked to stop before learning, nothing has changed."""
        progress, teacher = self._progress, self._config.teacher
        start = time.monotonic()
        experience = sample(
            self._learner.policy,
            self._pool.get(self._element.task),
            self._goals,
            teacher.ppo,
            self._rules,
            self._element.seed,
            progress.iteration,
            slots=self._slots,
            should_stop=lambda: self._interrupt.requested,
        )
        # If one rank was asked to stop, all stop and drop what they sampled: an iteration is repeated as a whole,
        # since random numbers are a function of its number.
        if self._comm.any(experience is None) or experience is None:
            raise InterruptedBySignal("asked to stop while training; launch again to continue")
        sampled = time.monotonic()
        critic_only = progress.iteration < self._num_critic_iterations
        min_log_std = teacher.ppo.min_log_std
        if progress.is_exploring:
            min_log_std = max(min_log_std, teacher.exploration.min_log_std)
        learned = self._learner.update(
            experience, progress.iteration, critic_only=critic_only, min_log_std=min_log_std
        )
        # Before the iteration counts: no checkpoint may hold ranks that differ or numbers that are not finite.
        check_ranks_agree([*self._learner.policy.state_dict().values()], self._comm)
        self._check_finite(learned)
        progress.iteration += 1
        exploring_steps = float_sum(self._comm, experience.exploring_steps)
        progress.env_steps += self._steps_per_iteration + round(exploring_steps)
        if not critic_only:
            progress.policy_updates += int(learned["epochs"]) * (
                self._steps_per_iteration // teacher.ppo.minibatch_size
            )
        # Kept in the progress, so that a checkpoint before the validation does not lose them.
        progress.unrecorded = {
            "train_success": float_mean(experience.train_success, len(self._slots), self._comm),
            "train_return": float_mean(experience.train_return, len(self._slots), self._comm),
            "exploring_steps": exploring_steps,
            **learned,
            "sample_seconds": sampled - start,
            "update_seconds": time.monotonic() - sampled,
        }
        progress.is_exploring &= progress.unrecorded["train_success"] <= teacher.exploration.stop_at_success
        self._attempt.advance(progress.env_steps)

    def _check_finite(self, learned: dict[str, float]) -> None:
        """Raise DivergedError if the update has produced numbers that are not finite."""
        # Weights too: one infinite weight need not show in the metrics of the update that made it.
        names = [name for name, value in learned.items() if not math.isfinite(value)]
        if not all(bool(tensor.isfinite().all()) for tensor in self._learner.policy.parameters()):
            names.append("the policy")
        if names:
            raise DivergedError(
                f"{self._element.name}: not finite after the update of iteration {self._progress.iteration + 1}: "
                f"{', '.join(names)}; lower teacher.ppo.learning_rate"
            )

    def _validate_and_record(self) -> None:
        """Finish an iteration: validate if that is due, record its metrics, and save if that is due."""
        teacher, progress = self._config.teacher, self._progress
        start = time.monotonic()
        validation: dict[str, float | None] = {"validation_success": None}
        # Without a success measure all episodes last equally long, and noise may cost much of the return.
        is_promising = (
            progress.unrecorded["train_success"] >= VALIDATE_FROM
            or self._pool.suite.returns(self._element.task) is not None
        )
        is_due = progress.iteration % teacher.validate_every == 0 and is_promising and progress.policy_updates > 0
        # The end of the budget is validated in any case, so that there is a policy to select.
        if is_due or self._is_spent:
            validation = self._validate()
        if self._metrics:
            self._metrics.append(
                iteration=progress.iteration,
                env_steps=progress.env_steps,
                **progress.unrecorded,
                **validation,
                validation_seconds=time.monotonic() - start,
                global_step=progress.env_steps,
            )
        progress.unrecorded = {}
        self._attempt.advance(progress.env_steps, success=validation["validation_success"], loss=None)
        if progress.iteration % self._config.logging.teacher_checkpoint_every == 0 or self._is_over:
            self._save()

    def _validate(self) -> dict[str, float | None]:
        """Validate the policy, and keep it if none was better; returns what is recorded."""
        progress = self._progress
        success = validate(
            self._learner.policy, self._config, self._element.task, self._pool, self._interrupt, self._comm
        )
        progress.passes = progress.passes + 1 if success >= self._config.teacher.stop_success else 0
        # The last of the best: among equals, it has been trained longest.
        if success >= progress.best_success:
            progress.best_success = success
            self._keep_policy()
        return {"validation_success": success}

    def _keep_policy(self) -> None:
        """Keep the policy as the best so far."""
        self._progress.best_iteration = self._progress.iteration
        state = self._learner.policy.state_dict()
        self._best_policy = {name: tensor.clone() for name, tensor in state.items()}
