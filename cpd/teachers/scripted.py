"""Meta-World's scripted experts as stand-ins for trained teachers; all they touch is labelled `scripted`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from metaworld.policies import ENV_POLICY_MAP

from cpd.tasks import ACTION_SIZE
from cpd.teachers.policy import Distribution, FloatArray, publish_tensors, read_tensors


class ScriptedPolicy:
    """The scripted expert of one task, a deterministic function of the observation.

    Args:
        task: Meta-World task name.
        assumed_std: the standard deviation declared for it, since it has none of its own.
    """

    std_source: Literal["policy", "assumed"] = "assumed"

    def __init__(self, task: str, assumed_std: float) -> None:
        self.task = task
        self.assumed_std = assumed_std
        expert_class: Any = ENV_POLICY_MAP[task]
        self._expert = expert_class()

    def distribution(self, obs_BO: FloatArray) -> Distribution:
        """The expert's action as the mean, with the declared constant standard deviation."""
        actions = [self._expert.get_action(obs_O.astype(np.float64)) for obs_O in obs_BO]
        raw_mean_BA = np.array(actions, dtype=np.float32)
        return Distribution(raw_mean_BA, np.full_like(raw_mean_BA, math.log(self.assumed_std)))


def save_scripted(policy: ScriptedPolicy, path: Path, description: dict[str, Any]) -> None:
    """Publish the stand-in in the form of a policy: its standard deviation is all the tensors it has."""
    tensors = {"log_std_A": torch.full((ACTION_SIZE,), math.log(policy.assumed_std))}
    architecture = {"kind": "scripted", "task": policy.task, "assumed_std": policy.assumed_std}
    publish_tensors(tensors, path, {"architecture": architecture, **description})


def load_scripted(path: Path) -> ScriptedPolicy:
    """The stand-in saved at `path`.

    Raises:
        ValueError: if it is missing, damaged, or of another kind.
    """
    _, description = read_tensors(path, "scripted")
    architecture = description["architecture"]
    return ScriptedPolicy(architecture["task"], architecture["assumed_std"])
