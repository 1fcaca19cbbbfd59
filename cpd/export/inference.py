"""Policies as single modules with static shapes, for `torch.export` and ONNX.

Dimensions: B episodes, O = 39 observation, A = 4 action.
"""

from __future__ import annotations

from torch import Tensor, nn

from cpd.envs.metaworld.tasks import ACTION_CLIP
from cpd.teachers.policy import OBSERVATION_CLIP, GaussianPolicy


class InferenceTeacher(nn.Module):
    """A teacher that acts with its clipped mean: observations `[B, O]` to actions `[B, A]`, float32."""

    mean_O: Tensor
    std_O: Tensor

    def __init__(self, policy: GaussianPolicy) -> None:
        super().__init__()
        self.register_buffer("mean_O", policy.normalizer.mean.float())
        self.register_buffer("std_O", policy.normalizer.std.float())
        self.net = policy.net

    def forward(self, obs_BO: Tensor) -> Tensor:
        """The actions, in [-1, 1]."""
        scaled_BO = ((obs_BO - self.mean_O) / self.std_O).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        actions_BA: Tensor = self.net(scaled_BO).clamp(-ACTION_CLIP, ACTION_CLIP)
        return actions_BA
