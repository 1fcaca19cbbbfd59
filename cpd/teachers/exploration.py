"""What leads episodes away from where the policy itself would go: noise, random starts, perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpd.envs.vector_env import VectorEnv
from cpd.teachers.policy import FloatArray


def correlated_noise(
    num_steps: int, num_envs: int, size: int, correlation: float, rng: np.random.Generator
) -> FloatArray:
    """Stationary AR(1) noise `[S, N, A]` of unit variance: `e_t = c e_{t-1} + sqrt(1 - c^2) w_t`, w white."""
    noise_SNA = rng.standard_normal((num_steps, num_envs, size), dtype=np.float32)
    innovation = np.float32(np.sqrt(1.0 - correlation**2))
    for t in range(1, num_steps):
        noise_SNA[t] = np.float32(correlation) * noise_SNA[t - 1] + innovation * noise_SNA[t]
    return noise_SNA


@dataclass(frozen=True)
class Exploration:
    """Leads episodes to states that the policy itself may never visit: a random action is held for a while.

    At the start of an episode (exploring starts; Sutton and Barto 2018, section 5.3), or amidst it (an excursion),
    where the fingers do what the policy wants of them, without noise, so that what they hold is carried along. A
    success on the way ends nothing: it counts if it still holds after the policy's next step.
    """

    share: float = 0.0
    """Of episodes that begin so."""
    rate: float = 0.0
    """Excursions per step."""
    longest: int = 1
    """Most steps for which the action is held; their number is drawn uniformly."""

    def begin(self, envs: VectorEnv, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> int:
        """Step the environments of `slots`, fresh from their reset, where chance so decides.

        Args:
            envs: all environments.
            slots: those that begin an episode.
            rngs: one for every environment that is sampled; none are needed without a share.

        Returns:
            The number of environment steps taken.
        """
        if not self.share:
            return 0
        actions = np.zeros((envs.num_envs, 4), np.float32)
        lengths = np.zeros(envs.num_envs, np.int64)
        for slot in slots:
            actions[slot] = rngs[slot].uniform(-1.0, 1.0, 4)
            is_chosen = rngs[slot].random() < self.share
            lengths[slot] = is_chosen * rngs[slot].integers(1, self.longest, endpoint=True)
        _hold(envs, actions, lengths)
        return int(lengths.sum())

    def perturb(
        self,
        envs: VectorEnv,
        left_N: npt.NDArray[np.int64],
        efforts_N: npt.NDArray[np.float32],
        rngs: Sequence[np.random.Generator],
    ) -> npt.NDArray[np.int64]:
        """Step environments amidst their episodes, where chance so decides.

        Args:
            envs: N environments or more.
            left_N: most steps that each may take; none strays without any.
            efforts_N: of the fingers meanwhile, clipped to [-1, 1].
            rngs: one for every environment.

        Returns:
            [N] the number of steps that each has taken.
        """
        actions = np.zeros((envs.num_envs, 4), np.float32)
        lengths = np.zeros(envs.num_envs, np.int64)
        for slot, rng in enumerate(rngs):
            if rng.random() < self.rate and left_N[slot] > 0:
                actions[slot] = [*rng.uniform(-1.0, 1.0, 3), np.clip(efforts_N[slot], -1.0, 1.0)]
                lengths[slot] = min(left_N[slot], rng.integers(1, self.longest, endpoint=True))
        _hold(envs, actions, lengths)
        return lengths[: len(rngs)]


def _hold(envs: VectorEnv, actions: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64]) -> None:
    """Repeat every environment's action for its number of steps."""
    for t in range(lengths.max()):
        envs.step(actions, lengths > t)
