"""Settings of the single-task teachers: PPO, exploration, warm start, gate, rollouts."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT
from cpd.config.types import Count, NonNegativeFloat, Positive, PositiveFloat, Seeds, Share, is_given
from cpd.envs.tasks import MAX_EPISODE_STEPS, MAX_GOALS

#: Upper bound of a policy's log standard deviation.
MAX_LOG_STD: Final = 0.5
#: After a warm start, iterations in which only the value network learns: an untrained one would spoil the policy.
CRITIC_ITERATIONS: Final = 2

NumGoals = Annotated[int, Field(ge=1, le=MAX_GOALS)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig:
    """The PPO learner (Schulman et al. 2017)."""

    hidden_sizes: tuple[Positive, ...] = (128, 128)
    """Widths of the hidden layers, of policy and value network alike."""
    num_envs: Positive = 25
    """Environments stepped in lock-step; independent of the number of worker processes."""
    steps_per_env: Positive = 200
    """Environment steps per environment and iteration."""
    learning_rate: PositiveFloat = 1e-3
    num_epochs: Positive = 12
    """Passes over an iteration's samples."""
    minibatch_size: Positive = 500
    clip_ratio: PositiveFloat = 0.2
    target_kl: PositiveFloat = 0.05
    """An iteration's epochs stop once the approximate KL from the old policy exceeds this."""
    max_grad_norm: PositiveFloat = 1.0
    entropy_coef: NonNegativeFloat = 0.0
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    gae_lambda: Share = 0.95
    reward_scale: PositiveFloat = 0.1
    noise_correlation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """AR(1) coefficient of the exploration noise over time; 0 is white noise."""
    init_log_std: float = -0.3
    """Initial log standard deviation. A warm start needs a small one, about -2: enough to explore around a policy
    that half succeeds, little enough to keep it."""
    min_log_std: float = -3.0

    def __post_init__(self) -> None:
        num_samples = self.num_envs * self.steps_per_env
        if num_samples < 2:
            raise ValueError(
                "num_envs x steps_per_env must be 2 or more: a single sample's advantage has no scale"
            )
        if self.minibatch_size > num_samples:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) exceeds the samples of an iteration, "
                f"num_envs x steps_per_env = {num_samples}"
            )
        if not self.min_log_std <= self.init_log_std <= MAX_LOG_STD:
            raise ValueError(
                f"init_log_std ({self.init_log_std:g}) must lie between min_log_std ({self.min_log_std:g}) and "
                f"{MAX_LOG_STD:g}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExplorationConfig:
    """Exploration beyond the policy's own noise, for tasks whose reward leads into a dead end."""

    start_share: Share = 0.0
    """Share of training episodes that start with one random action, repeated for up to max_steps steps: from
    states that the environment's own resets never give (exploring starts; Sutton and Barto 2018). These steps do
    not count towards the horizon."""
    step_rate: Share = 0.0
    """Probability per step of a perturbation: one random action, repeated for up to max_steps steps; the gripper
    keeps its command. These steps count towards the horizon."""
    max_steps: Positive = 40
    """Longest start or perturbation. An action of 1 moves the hand by a centimetre. These steps count as
    environment steps, and PPO does not learn from them."""
    stop_at_success: Share = 1.0
    """Once more than this share of an iteration's first episodes succeeds, exploration stops permanently (no
    perturbations, no raised minimum of the standard deviation): a task that is already solved is refined faster
    without it. With 1 it never stops."""
    min_log_std: float = -3.0
    """Replaces ppo.min_log_std until exploration stops, if it is larger."""

    @property
    def perturbs(self) -> bool:
        """Whether some steps are not the policy's."""
        return bool(self.start_share or self.step_rate)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmStartConfig:
    """The warm start of `demo_rl`: cloning of the scripted expert, which ends while much is left to RL."""

    success_target: Share = 0.5
    """Cloning ends as soon as the success rate on validation goals reaches this."""
    success_cap: Annotated[float, Field(ge=0.0, le=0.7)] = 0.7
    """RL never starts from a clone that succeeds more often: cloning goes back and takes smaller steps."""
    num_demonstrations: Positive = 40
    """Episodes of the expert, on training goals at the training horizon."""
    num_dagger_rounds: Count = 5
    """Maximum of rounds in which the clone acts and the expert labels (Ross et al. 2011)."""

    def __post_init__(self) -> None:
        if self.success_target > self.success_cap:
            raise ValueError(f"success_target ({self.success_target}) exceeds success_cap ({self.success_cap})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """Single-task teachers."""

    recipe: Literal["rl", "demo_rl", "scripted"] = "rl"
    """rl: PPO from scratch; demo_rl: PPO from a capped warm start on demonstrations; scripted: Meta-World's expert
    as a labelled stand-in."""
    seeds: Seeds = (1,)
    """One teacher per distinct task and seed."""
    max_env_steps: Positive = 1_000_000
    """Budget of training steps in the environment; the exploration steps of the last iteration may exceed it."""
    horizon: Annotated[int, Field(ge=1, le=MAX_EPISODE_STEPS)] = 200
    """Episode length in training; teachers are evaluated at the stream's horizon."""
    terminate_on_success: bool = True
    """Whether success ends a training episode, valued as the largest reward forever after. If not, the episode
    continues to the horizon, and what the policy does after success is trained, too."""
    grasp_bonus: NonNegativeFloat = 0.0
    """Added to rewards in training, times how close a step comes to holding the object (0 to 1): some tasks reward
    nothing at all until it is held."""
    reward_convexity: NonNegativeFloat = 0.0
    """c in r + c r^2, which replaces Meta-World's reward r (0 to 10) in training. Rewards still to be gained then
    weigh more than rewards that might be lost: a policy whose noise may drop an object still learns to move it."""
    num_training_goals: NumGoals = 50
    num_validation_goals: NumGoals = 50
    validate_every: Positive = 3
    """Iterations between evaluations on validation goals."""
    stop_success: Share = 1.0
    """Training ends once the success rate on validation goals reaches this ..."""
    stop_passes: Positive = 2
    """... in this many successive validations: one alone may be luck."""
    gate: Share = 0.9
    """Minimum validation success with which a teacher is admitted to distillation."""
    on_rejected: Literal["skip", "stop"] = "skip"
    """What a rejected teacher does to its stage: skip it (recorded) or stop the chain."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        if self.stop_success < self.gate:
            raise ValueError(f"stop_success ({self.stop_success}) lies below the gate ({self.gate})")
        if self.recipe == "scripted":
            return
        ppo, exploration = self.ppo, self.exploration
        if ppo.init_log_std < exploration.min_log_std:
            raise ValueError(
                f"ppo.init_log_std ({ppo.init_log_std:g}) lies below exploration.min_log_std "
                f"({exploration.min_log_std:g})"
            )
        if exploration.start_share and self.horizon + exploration.max_steps > MAX_EPISODE_STEPS:
            raise ValueError(
                f"horizon ({self.horizon}) and exploration.max_steps ({exploration.max_steps}) together exceed "
                f"the {MAX_EPISODE_STEPS} steps after which Meta-World's episodes end"
            )
        if ppo.steps_per_env < self.horizon:
            raise ValueError(
                f"ppo.steps_per_env ({ppo.steps_per_env}) is below the training horizon ({self.horizon}): every "
                "iteration resets all environments, so no episode would ever last that long"
            )
        first_update = (CRITIC_ITERATIONS + 1) * ppo.num_envs * ppo.steps_per_env
        if self.recipe == "demo_rl" and self.max_env_steps < first_update:
            raise ValueError(
                f"max_env_steps ({self.max_env_steps}) ends before the first policy gradient ({first_update})"
            )

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ValueError if that many MPI ranks cannot train a teacher together."""
        if self.recipe != "scripted" and self.ppo.num_envs < num_ranks:
            raise ValueError(
                f"{num_ranks} ranks cannot share teacher.ppo.num_envs = {self.ppo.num_envs} environments: set "
                "fewer ranks for teachers in the profile, or raise num_envs"
            )

    def warnings(self) -> list[str]:
        """Settings that are given but have no effect; each line begins with a setting's path."""
        exploration, lines = self.exploration, []
        if self.recipe != "demo_rl" and self.warm_start != WarmStartConfig():
            lines.append("warm_start has no effect: teacher.recipe is not 'demo_rl'")
        raises_std = exploration.min_log_std > self.ppo.min_log_std
        if not exploration.perturbs and is_given(exploration, "max_steps"):
            lines.append("exploration.max_steps has no effect: start_share and step_rate are 0")
        if not exploration.perturbs and not raises_std and is_given(exploration, "stop_at_success"):
            lines.append(
                "exploration.stop_at_success has no effect: nothing explores; set start_share or step_rate"
            )
        if not raises_std and is_given(exploration, "min_log_std"):
            lines.append(
                f"exploration.min_log_std has no effect: ppo.min_log_std ({self.ppo.min_log_std:g}) is no smaller"
            )
        return lines


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """The rollouts that every teacher writes to its shards."""

    num_steps: Positive = 8_000
    """Time steps per teacher; the last episode is cut to meet it exactly."""
    noisy_share: Share = 0.5
    """Share of episodes in which noise is added to the executed action."""
    noise_scales: tuple[NonNegativeFloat, ...] = (0.1, 0.3, 0.6)
    """Standard deviations of that noise, in turn."""
    steps_after_success: Count = 20
    """An episode ends this many steps after its first success."""
    shard_steps: Positive = 50_000
    """A new shard begins once the present one holds this many steps."""
