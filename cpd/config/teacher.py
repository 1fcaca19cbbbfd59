"""Settings of the single-task teachers: PPO, warm start, gates, rollouts."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT
from cpd.config.types import Count, NonNegativeFloat, Positive, PositiveFloat, Seeds, Share, is_given
from cpd.envs.tasks import MAX_EPISODE_STEPS, MAX_GOALS

#: Settings of the PPO learner for which `demo_rl` has its own, named `rl_...`.
DEMO_RL_SETTINGS = ("hidden_sizes", "init_log_std", "learning_rate", "target_kl")

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
    min_log_std: float = -3.0
    exploring_min_log_std: float = -3.0
    """Takes the place of `min_log_std` until exploring is over (`teacher.exploring_until`), where it is larger."""
    max_log_std: float = 0.5
    mean_penalty: NonNegativeFloat = 0.01
    """Weight of the penalty on action means beyond +-1.2."""

    def __post_init__(self) -> None:
        if self.num_envs * self.steps_per_env < 2:
            raise ValueError(
                "num_envs x steps_per_env must be 2 or more: a single sample's advantage has no scale"
            )
        if self.minibatch_size > self.num_envs * self.steps_per_env:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) exceeds the samples of an iteration, "
                f"num_envs x steps_per_env = {self.num_envs * self.steps_per_env}"
            )
        _check_log_std("init_log_std", self.init_log_std, self)

    def least_log_std(self, *, exploring: bool) -> float:
        """The least of the policy's log standard deviation, until exploring is over or thereafter."""
        return max(self.min_log_std, self.exploring_min_log_std) if exploring else self.min_log_std


def _check_log_std(name: str, initial: float, settings: PPOConfig) -> None:
    """Raise ValueError unless an initial log standard deviation, set by `name`, keeps to its bounds."""
    bounds = {"min_log_std": settings.min_log_std, "exploring_min_log_std": settings.exploring_min_log_std}
    low = max(bounds, key=bounds.__getitem__)
    if not bounds[low] <= initial <= settings.max_log_std:
        raise ValueError(
            f"{name} ({initial:g}) must lie between {low} ({bounds[low]:g}) and max_log_std "
            f"({settings.max_log_std:g})"
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmStartConfig:
    """The warm start of `demo_rl`: cloning of the scripted expert, which must stop while much is left to RL."""

    success_target: Share = 0.5
    """Cloning ends as soon as the success rate on validation goals has reached this."""
    success_cap: Annotated[float, Field(ge=0.0, le=0.7)] = 0.7
    """RL never starts from a clone that succeeds more often: cloning goes back and takes smaller steps."""
    num_demonstrations: Positive = 40
    """Episodes of the expert, on training goals at the training horizon."""
    light_share: Share = 0.25
    """Share of demonstrations with white noise of `light_scale`; the others get bursts."""
    light_scale: NonNegativeFloat = 0.1
    burst_scale: NonNegativeFloat = 0.6
    """Standard deviation of the vector that a burst adds to every executed action."""
    burst_steps: Positive = 8
    """Longest burst."""
    burst_every: Positive = 25
    """Mean number of steps from the start of one burst to the next."""
    steps_after_success: Count = 30
    num_dagger_rounds: Count = 5
    """Rounds in which the clone acts and the expert labels (Ross et al. 2011), until the target is reached."""
    num_dagger_episodes: Positive = 20
    num_cloning_steps: Positive = 1_000
    """Gradient steps on the demonstrations, and again after each DAgger round."""
    steps_per_check: Positive = 200
    """Gradient steps between validations; halved whenever the cap was overshot."""
    batch_size: Positive = 256
    learning_rate: PositiveFloat = 1e-3
    critic_iterations: Count = 2
    """Iterations in which the value network alone learns, before the first policy gradient."""
    rl_hidden_sizes: tuple[Positive, ...] = (256, 256)
    rl_init_log_std: float = -2.0
    """Standard deviation 0.135: enough to explore around a policy that half succeeds, little enough to keep it."""
    rl_learning_rate: PositiveFloat = 2e-4
    rl_target_kl: PositiveFloat = 0.02

    def __post_init__(self) -> None:
        if self.success_target > self.success_cap:
            raise ValueError(f"success_target ({self.success_target}) exceeds success_cap ({self.success_cap})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """Single-task teachers."""

    recipe: Literal["rl", "demo_rl", "scripted"] = "rl"
    """rl: RL from scratch; demo_rl: RL from a capped warm start on demonstrations; scripted: Meta-World's expert
    as a labelled stand-in."""
    seeds: Seeds = (1,)
    """One teacher per distinct task and seed."""
    max_env_steps: Positive = 1_000_000
    """Budget of training steps in the environment; those that the last iteration explores may exceed it."""
    horizon: Annotated[int, Field(ge=1, le=MAX_EPISODE_STEPS)] = 200
    """Episode length while training; teachers are judged at the stream's horizon."""
    terminate_on_success: bool = True
    """Whether success ends a training episode, valued as the largest reward for ever after; if not, the episode
    goes on to the horizon, and what the policy does after success is trained, too."""
    grasp_bonus: NonNegativeFloat = 0.0
    """What rewards have added to them in training, times how near a step comes to holding the object (0 to 1):
    some tasks reward nothing at all until it is held."""
    reward_convexity: NonNegativeFloat = 0.0
    """c in r + c r^2, which takes the place of Meta-World's reward r (0 to 10) in training: what is still to be
    had weighs more against what might be lost; a policy whose noise may drop an object dares to move it."""
    exploring_share: Share = 0.0
    """Share of training episodes that begin with a random action, held for a while: from other states than the
    environment's own, where a deceptive reward would lead astray (exploring starts; Sutton and Barto 2018)."""
    exploring_rate: Share = 0.0
    """Chance per step that the hand is led astray amidst an episode, by a random action that is held for a while;
    the fingers hold what they hold. These steps count towards the horizon."""
    exploring_steps: Positive = 40
    """Longest time for which such actions are held; an action of 1 moves the hand by a centimetre. These steps
    count as environment steps and are not learned from; those of starts do not count towards the horizon."""
    exploring_until: Share = 1.0
    """Once more than this share of an iteration's first episodes succeeds, exploring is over for good: no episode
    is led astray any more, nor is the deviation kept up (`ppo.exploring_min_log_std`). What has been found
    is mastered faster without; 1 explores to the end."""
    num_training_goals: NumGoals = 50
    num_validation_goals: NumGoals = 50
    validate_every: Positive = 3
    """Iterations between evaluations on validation goals."""
    validate_from: Share = 0.5
    """Share of successful training episodes from which on validations are worth their time."""
    stop_success: Share = 1.0
    """Training ends once the success rate on validation goals has reached this ..."""
    stop_passes: Positive = 2
    """... in this many successive validations: one alone may be luck."""
    gate: Share = 0.9
    """Least validation success with which a teacher is admitted to distillation."""
    on_rejected: Literal["skip", "stop"] = "skip"
    """What a rejected teacher does to its stage: skip it (recorded) or stop the chain."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        if self.stop_success < self.gate:
            raise ValueError(f"stop_success ({self.stop_success}) lies below the gate ({self.gate})")
        if self.recipe == "scripted":
            return
        if self.recipe == "demo_rl":
            _check_log_std("warm_start.rl_init_log_std", self.warm_start.rl_init_log_std, self.ppo)
        learner = self.learner_settings
        if self.exploring_share and self.horizon + self.exploring_steps > MAX_EPISODE_STEPS:
            raise ValueError(
                f"horizon ({self.horizon}) and exploring_steps ({self.exploring_steps}) together exceed the "
                f"{MAX_EPISODE_STEPS} steps after which Meta-World's episodes end"
            )
        if learner.steps_per_env < self.horizon:
            raise ValueError(
                f"ppo.steps_per_env ({learner.steps_per_env}) is below the training horizon "
                f"({self.horizon}): every iteration starts from fresh resets, so that no episode would ever last "
                "that long"
            )
        per_iteration = learner.num_envs * learner.steps_per_env
        first = (self.warm_start.critic_iterations + 1) * per_iteration
        if self.recipe == "demo_rl" and self.max_env_steps < first:
            raise ValueError(
                f"max_env_steps ({self.max_env_steps}) ends before the first policy gradient ({first})"
            )

    @property
    def learner_settings(self) -> PPOConfig:
        """The learner's settings, some of which `demo_rl` replaces by its own."""
        if self.recipe != "demo_rl":
            return self.ppo
        return replace(self.ppo, **{name: getattr(self.warm_start, f"rl_{name}") for name in DEMO_RL_SETTINGS})

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError if that many MPI ranks cannot train a teacher together."""
        if self.recipe == "scripted":
            return
        if self.ppo.num_envs < ranks:
            raise ValueError(
                f"{ranks} ranks cannot share teacher.ppo.num_envs = {self.ppo.num_envs} environments: set fewer "
                "ranks for teachers in the profile, or raise num_envs"
            )

    def warnings(self) -> list[str]:
        """Settings that are given but have no effect; each begins with a setting's path."""
        found = []
        if self.recipe == "scripted" and self.ppo != PPOConfig():
            found.append("ppo has no effect: teacher.recipe is 'scripted'")
        if self.recipe == "demo_rl":
            found += [
                f"ppo.{name} has no effect: demo_rl takes teacher.warm_start.rl_{name}"
                for name in DEMO_RL_SETTINGS
                if is_given(self.ppo, name)
            ]
        elif self.warm_start != WarmStartConfig():
            found.append("warm_start has no effect: teacher.recipe is not 'demo_rl'")
        return found + self._idle_exploring()

    def _idle_exploring(self) -> list[str]:
        """Settings of exploring that are given where nothing explores."""
        strays = bool(self.exploring_share or self.exploring_rate)
        deviates = self.ppo.exploring_min_log_std > self.ppo.min_log_std
        found = []
        if not strays and is_given(self, "exploring_steps"):
            found.append("exploring_steps has no effect: exploring_share and exploring_rate are 0")
        if not strays and not deviates and is_given(self, "exploring_until"):
            found.append(
                "exploring_until has no effect: nothing explores without exploring_share or exploring_rate"
            )
        if not deviates and is_given(self.ppo, "exploring_min_log_std"):
            found.append(
                f"ppo.exploring_min_log_std has no effect: ppo.min_log_std ({self.ppo.min_log_std:g}) is no less"
            )
        return found


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """What every teacher writes to its shards."""

    num_steps: Positive = 8_000
    """Time steps per teacher; the last episode is cut to meet it exactly."""
    noisy_share: Share = 0.5
    """Share of episodes in which noise is added to the executed action."""
    noise_scales: tuple[NonNegativeFloat, ...] = (0.1, 0.3, 0.6)
    """Standard deviations of that noise, in turn."""
    steps_after_success: Count = 20
    """Steps kept after an episode's first success, at which it ends."""
    shard_steps: Positive = 50_000
    """A shard is rolled once it holds this many steps."""
