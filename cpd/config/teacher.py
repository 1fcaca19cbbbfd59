"""Settings of the single-task teachers: PPO, exploration, warm start, gate, rollouts."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT
from cpd.config.types import Count, NonNegativeFloat, Positive, PositiveFloat, Seeds, Share, is_given
from cpd.envs.suite import MAX_GOALS

#: Upper bound of a policy's log standard deviation.
MAX_LOG_STD: Final = 0.5
#: After a warm start, iterations in which only the value network learns: an untrained one would spoil the policy.
CRITIC_ITERATIONS: Final = 2
#: The same in the stay phase, which begins with a new value network.
STAY_CRITIC_ITERATIONS: Final = 4
#: Defaults of `PPOConfig` after a warm start: little noise and small steps, to keep a policy that half succeeds.
WARM_START_PPO: Final = {
    "hidden_sizes": [256, 256],
    "init_log_std": -2.0,
    "learning_rate": 2e-4,
    "target_kl": 0.02,
}

NumGoals = Annotated[int, Field(ge=1, le=MAX_GOALS)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig:
    """The PPO learner (Schulman et al. 2017); `WARM_START_PPO` has the defaults that differ with `demo_rl`."""

    hidden_sizes: tuple[Positive, ...] = (128, 128)
    """Widths of the hidden layers of the policy and of the value network. Default with teacher.recipe demo_rl:
    (256, 256)."""
    num_envs: Positive = 25
    """Environments stepped in lock-step. Unlike the number of worker processes, it affects results."""
    steps_per_env: Positive = 200
    """Environment steps per environment and iteration."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of Adam, which stays constant. Default with teacher.recipe demo_rl: 0.0002."""
    num_epochs: Positive = 12
    """Maximum of passes over an iteration's samples."""
    minibatch_size: Positive = 500
    """Samples per gradient step."""
    clip_ratio: PositiveFloat = 0.2
    """Probability ratios between new and old policy are clipped to [1 - clip_ratio, 1 + clip_ratio]."""
    target_kl: PositiveFloat = 0.05
    """An iteration's epochs stop once the approximate KL from the old policy, in nats, exceeds this. Default with
    teacher.recipe demo_rl: 0.02."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradients of policy and value network are each clipped to this Euclidean norm."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """Discount per environment step."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016)."""
    reward_scale: PositiveFloat = 0.1
    """Factor on rewards before values are learned."""
    noise_correlation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """AR(1) coefficient of the exploration noise over time; 0 is white noise."""
    init_log_std: float = -0.3
    """Initial log standard deviation of actions. Default with teacher.recipe demo_rl: -2.0, enough to explore
    around a policy that half succeeds and little enough to keep it."""
    min_log_std: float = -3.0
    """Minimum of the log standard deviation of actions."""

    def __post_init__(self) -> None:
        # Each check fails here, at launch, instead of hours later in a job.
        num_samples = self.num_envs * self.steps_per_env
        if num_samples < 2:
            raise ValueError(
                "num_envs x steps_per_env must be 2 or more: a single sample's advantage has no scale"
            )
        # PPO drops an incomplete minibatch, so there would be no gradient step.
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
    """Share of training episodes that start with one random action, repeated for up to max_steps steps. The policy
    then starts from states that resets never give (exploring starts; Sutton and Barto 2018). These steps do not
    count towards the horizon."""
    step_rate: Share = 0.0
    """Probability per step of a perturbation: one random action, repeated for up to max_steps steps; the gripper
    keeps its command. These steps count towards the horizon."""
    max_steps: Positive = 40
    """Maximum length of a random start or perturbation; an action of 1 moves the hand by 1 cm per step. These
    steps count as environment steps, and PPO does not learn from them."""
    stop_at_success: Share = 1.0
    """Random starts, perturbations and the raised minimum of the standard deviation stop permanently once more
    than this share of an iteration's first episodes succeeds: a policy that already solves the task improves
    faster without them. With 1 they never stop."""
    min_log_std: float = -3.0
    """Minimum of the log standard deviation until exploration stops; has no effect below ppo.min_log_std."""

    @property
    def perturbs(self) -> bool:
        """Whether there are random starts or perturbations."""
        return bool(self.start_share or self.step_rate)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmStartConfig:
    """The warm start of `demo_rl`: cloning of the scripted expert, up to a modest success rate."""

    success_target: Share = 0.5
    """Cloning ends as soon as the success rate on validation goals reaches this."""
    # Bounded, so that a teacher passes its gate by RL and not by imitation alone.
    success_cap: Annotated[float, Field(ge=0.0, le=0.7)] = 0.7
    """Maximum success rate of the clone that RL starts from. Cloning that exceeds it is undone and repeated in
    smaller increments."""
    num_demonstrations: Positive = 40
    """Episodes in which the expert acts, on training goals, of teacher.horizon steps at most."""
    num_dagger_rounds: Count = 5
    """Maximum of rounds in which the clone acts and the expert labels (Ross et al. 2011)."""

    def __post_init__(self) -> None:
        if self.success_target > self.success_cap:
            raise ValueError(f"success_target ({self.success_target}) exceeds success_cap ({self.success_cap})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StayConfig:
    """The stay phase: RL in which episodes continue after success, from a trained policy that has passed the gate.

    The policy learns to stay at the goal, so that success lasts to the last step. Nothing explores beyond the
    policy's own noise. A task without a success measure has no such phase.
    """

    max_env_steps: Count = 0
    """Budget of environment steps per teacher, in addition to teacher.max_env_steps; 0: no stay phase."""
    learning_rate: PositiveFloat = 3e-4
    """Learning rate of Adam."""
    target_kl: PositiveFloat = 0.02
    """As teacher.ppo.target_kl: small, so that the policy keeps what it can do."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """Single-task teachers."""

    recipe: Literal["rl", "demo_rl", "scripted"] = "rl"
    """rl: PPO from scratch; demo_rl: PPO after a warm start on demonstrations, whose success is capped; scripted:
    the suite's scripted expert as a stand-in, labelled as such in all results."""
    seeds: Seeds = (1,)
    """One teacher per distinct task and seed."""
    max_env_steps: Positive = 1_000_000
    """Budget of environment steps per teacher; the exploration steps of the last iteration may exceed it."""
    horizon: Positive = 200
    """Episode length in training; teachers are evaluated at the stream's horizon."""
    terminate_on_success: bool = True
    """true: success ends a training episode, and its value is that of the largest reward forever after. false:
    episodes continue to the horizon, so the policy also learns what to do after success."""
    grasp_bonus: NonNegativeFloat = 0.0
    """Weight of a bonus on training rewards: how close a step comes to holding the object, 0 to 1. Some tasks give
    no reward until the object is held."""
    reward_convexity: NonNegativeFloat = 0.0
    """c in r + c r^2, which replaces a task's reward r in training. High rewards then weigh more, so that a policy
    whose noise may drop an object still learns to move it."""
    num_training_goals: NumGoals = 50
    """Goals of training, demonstrations and rollouts: the first ones of the training split."""
    num_validation_goals: NumGoals = 50
    """Goals on which policies are validated and selected, and which decide on admission."""
    validate_every: Positive = 3
    """Iterations between evaluations on validation goals."""
    stop_success: Share = 1.0
    """Training ends once stop_passes successive validations reach this success rate on validation goals."""
    stop_passes: Positive = 2
    """Number of successive validations that must reach stop_success; a single one may be luck."""
    gate: Share = 0.9
    """Minimum validation success with which a teacher is admitted to distillation."""
    on_rejected: Literal["skip", "stop"] = "skip"
    """What students do without a teacher that missed the gate. skip: leave out its stage and record that; stop:
    fail with an error."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    stay: StayConfig = field(default_factory=StayConfig)

    def __post_init__(self) -> None:
        # Training would stop at policies that the gate rejects.
        if self.stop_success < self.gate:
            raise ValueError(f"stop_success ({self.stop_success}) lies below the gate ({self.gate})")
        # Nothing below concerns a scripted expert, and a recipe for one may extend any other.
        if self.recipe == "scripted":
            return
        ppo, exploration = self.ppo, self.exploration
        # The first update would raise the standard deviation, and so change a cloned policy before RL has begun.
        if ppo.init_log_std < exploration.min_log_std:
            raise ValueError(
                f"ppo.init_log_std ({ppo.init_log_std:g}) lies below exploration.min_log_std "
                f"({exploration.min_log_std:g})"
            )
        if ppo.steps_per_env < self.horizon:
            raise ValueError(
                f"ppo.steps_per_env ({ppo.steps_per_env}) is below the training horizon ({self.horizon}): every "
                "iteration resets all environments, so no episode would ever last that long"
            )
        # Otherwise no policy would ever be trained by RL, and none could be selected.
        first_update = (CRITIC_ITERATIONS + 1) * ppo.num_envs * ppo.steps_per_env
        if self.recipe == "demo_rl" and self.max_env_steps < first_update:
            raise ValueError(
                f"max_env_steps ({self.max_env_steps}) must be at least {first_update}: training would end before "
                "the first policy gradient"
            )

    @property
    def stays(self) -> bool:
        """Whether teachers have a stay phase."""
        return self.stay.max_env_steps > 0 and self.recipe != "scripted"

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ValueError if `num_ranks` MPI ranks cannot share the environments of a teacher."""
        if self.recipe != "scripted" and self.ppo.num_envs < num_ranks:
            raise ValueError(
                f"{num_ranks} ranks cannot share teacher.ppo.num_envs = {self.ppo.num_envs} environments: set "
                "fewer ranks for teachers in the profile, or raise num_envs"
            )

    def warnings(self) -> list[str]:
        """Return one line, which begins with a path, for each setting without effect."""
        exploration, lines = self.exploration, []
        if self.recipe != "demo_rl" and self.warm_start != WarmStartConfig():
            lines.append("warm_start has no effect: teacher.recipe is not 'demo_rl'")
        if not self.stays and self.stay != StayConfig():
            reason = "max_env_steps is 0" if self.recipe != "scripted" else "teacher.recipe is 'scripted'"
            lines.append(f"stay has no effect: {reason}")
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
    """The rollouts of a finished teacher, which students learn from."""

    num_steps: Positive = 8_000
    """Time steps per teacher, exactly: the last episode is cut."""
    noisy_share: Share = 0.5
    """Share of episodes in which noise is added to the executed action."""
    noise_scales: tuple[NonNegativeFloat, ...] = (0.1, 0.3, 0.6)
    """Standard deviations of that noise; noisy episodes take them in turn."""
    steps_after_success: Count = 20
    """An episode ends this many steps after its first success."""
    shard_steps: Positive = 50_000
    """Steps after which a shard file is full; it ends with a whole episode."""
