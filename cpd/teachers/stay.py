"""The stay phase: PPO in episodes that continue after success, so that a policy learns to stay at the goal.

It begins with a policy file alone, which this run has trained or reused from another: value network and optimiser
are new. Iterations, environment steps and metrics continue those of the training before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpd.config import ExplorationConfig
from cpd.config.teacher import STAY_CRITIC_ITERATIONS
from cpd.envs.episodes import mean_of_scores
from cpd.run.descriptions import RlTraining
from cpd.teachers.policy import GaussianPolicy
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.trainer import TeacherTrainer
from cpd.teachers.validation import validation_episodes


@dataclass(frozen=True)
class StaySummary:
    """How a stay phase went, for the description of the policy; rates are of validation goals."""

    ranks: tuple[int, ...]
    """As in `TrainingSummary`."""
    iterations: int
    env_steps: int
    stopped_by: str
    """`validation`: successive validations reached `teacher.stop_success` at the last step; `budget`."""
    selected_iteration: int
    """Iteration of the final policy; 0: no policy was better than the one that the phase began with."""
    success_before: float
    success_last_before: float
    validation_success: float
    """Success at any step, never lower than before."""
    validation_success_last: float
    """Success at the last step."""


class StayTrainer(TeacherTrainer):
    """The stay phase of one teacher, which continues from its newest checkpoint if there is one.

    It selects the policy with the most success at the last step among those whose success at any step is no lower
    than that of the first policy.
    """

    phase = "stay"

    def run_from(self, start: GaussianPolicy, training: RlTraining) -> tuple[GaussianPolicy, StaySummary]:
        """Train from the policy `start` until the stopping rule or the budget ends the phase.

        Args:
            start: the trained policy.
            training: how it was trained.

        Returns:
            The selected policy, perhaps `start`, and how the phase went.

        Raises:
            InterruptedBySignal, DivergedError: as `run`.
        """
        stay, teacher = self._config.teacher.stay, self._config.teacher
        first_iteration, first_steps = training["iterations"], training["env_steps"]
        ppo = replace(
            teacher.ppo,
            hidden_sizes=start.hidden_sizes,
            learning_rate=stay.learning_rate,
            target_kl=stay.target_kl,
        )
        teacher = replace(
            teacher,
            ppo=ppo,
            terminate_on_success=False,
            exploration=ExplorationConfig(),
            max_env_steps=first_steps + stay.max_env_steps,
        )
        self._config = replace(self._config, teacher=teacher)
        self._has_warm_start = False
        self._num_critic_iterations = first_iteration + STAY_CRITIC_ITERATIONS
        self._learner = PPOLearner(
            ppo,
            self._element.seed,
            keep_normalizer=True,
            comm=self._comm,
            suite=self._pool.suite,
            task=self._element.task,
        )
        self._learner.policy.load_state_dict(start.state_dict())
        progress = self._progress
        progress.iteration, progress.env_steps = first_iteration, first_steps
        metrics = self._element.metrics
        self._checkpoints = self._element.stay_checkpoints
        self._metrics = self._resume(metrics.stat().st_size if metrics.exists() else 0)
        self._train()
        progress = self._progress
        return self._best(), StaySummary(
            ranks=tuple(progress.ranks),
            iterations=progress.iteration - first_iteration,
            env_steps=progress.env_steps - first_steps,
            stopped_by=self._stopped_by,
            selected_iteration=progress.best_iteration - first_iteration,
            success_before=progress.first_success,
            success_last_before=progress.first_success_last,
            validation_success=progress.best_success,
            validation_success_last=progress.best_success_last,
        )

    def _begin(self) -> None:
        """Validate the first policy; a later one must succeed as often."""
        progress = self._progress
        if progress.first_success >= 0:
            return
        self._attempt.begin("validate", self._config.teacher.num_validation_goals, unit="episodes")
        progress.first_success, progress.first_success_last = self._rates()
        progress.best_success, progress.best_success_last = progress.first_success, progress.first_success_last
        self._keep_policy()
        if progress.first_success_last >= self._config.teacher.stop_success:
            progress.passes = self._config.teacher.stop_passes
        # From here on the checkpoint knows where the metrics of the phase begin.
        self._save()

    def _rates(self) -> tuple[float, float]:
        """Return success at any step and at the last step, on validation goals."""
        outcomes = validation_episodes(
            self._learner.policy,
            self._config,
            self._element.task,
            self._pool,
            self._interrupt,
            self._comm,
            to_the_end=True,
        )
        return mean_of_scores(outcomes), sum(bool(outcome.success_last) for outcome in outcomes) / len(outcomes)

    def _validate(self) -> dict[str, float | None]:
        """Validate the policy, and keep it if none was better; returns what is recorded."""
        progress = self._progress
        success, success_last = self._rates()
        keeps = success >= progress.first_success
        progress.passes = progress.passes + 1 if keeps and success_last >= self._config.teacher.stop_success else 0
        if keeps and success_last >= progress.best_success_last:
            progress.best_success, progress.best_success_last = success, success_last
            self._keep_policy()
        return {"validation_success": success, "validation_success_last": success_last}
