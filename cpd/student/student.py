"""The generalist student: a window of observations in, a Gaussian over actions out, at every step of the window.

Dimensions: B windows or episodes, L time steps, O observation size, A action size, D width, N = B L tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from cpd.config import StudentConfig
from cpd.files import publish, read_json, write_json
from cpd.shards.schema import ACTION_SIZE, OBSERVATION_SIZE
from cpd.strict_load import load, to_dict
from cpd.student.moe import MoE, RouterStats
from cpd.student.observations import observation_scaling
from cpd.student.packing import Packing
from cpd.student.transformer import Block


class StudentOutput(NamedTuple):
    """What the student says of every step of every window; step i has seen steps 0..i only."""

    mean_BLA: Tensor
    """Not clipped."""
    log_std_BLA: Tensor
    stats: tuple[RouterStats, ...]
    """One per layer; empty unless `valid_BL` was given."""


class Student(nn.Module):
    """The policy network; see `StudentConfig` for its sizes."""

    obs_centre: Tensor
    obs_scale: Tensor

    def __init__(
        self,
        config: StudentConfig,
        num_tasks: int,
        *,
        num_experts: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build with zero or default values; `initialise` draws the first weights.

        Args:
            config: sizes.
            num_tasks: distinct tasks of the whole stream, for `onehot`.
            num_experts: experts per layer now; default: as at the first stage.
            dtype: of parameters and arithmetic.
        """
        super().__init__()
        self.config, self.num_tasks = config, num_tasks
        #: Who owns which weight, where a protection gives weights to tasks.
        self.packing: Packing | None = None
        experts = config.num_experts if num_experts is None else num_experts
        centre, scale = observation_scaling()
        self.register_buffer("obs_centre", torch.tensor(centre, dtype=dtype), persistent=False)
        self.register_buffer("obs_scale", torch.tensor(scale, dtype=dtype), persistent=False)
        self.embed = nn.Linear(OBSERVATION_SIZE, config.width, dtype=dtype)
        self.position = nn.Parameter(torch.zeros(config.context, config.width, dtype=dtype))
        self.task = (
            nn.Parameter(torch.zeros(num_tasks, config.width, dtype=dtype))
            if config.task_identity == "onehot"
            else None
        )
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.expert_width, experts, config.top_k, dtype)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width, dtype=dtype)
        self.head = nn.Linear(config.width, 2 * ACTION_SIZE, dtype=dtype)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the first weights: matrices by fan-in, what feeds the residual stream scaled down by depth."""
        residual_scale = 1.0 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(".weight"):
                gain = residual_scale if name.endswith(("out.weight", "down.weight")) else 1.0
                gain = 0.1 if name == "head.weight" else gain
                parameter.normal_(0.0, gain / math.sqrt(parameter.shape[1]), generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)

    @property
    def moes(self) -> list[MoE]:
        """The mixture-of-experts block of every layer."""
        found = [block.moe for block in self.blocks if isinstance(block, Block)]
        assert len(found) == self.config.num_layers
        return found

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self.moes[0].num_experts

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and arithmetic."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.weight.device

    def set_logit_offset(self, num_new: int, offset: float) -> None:
        """Set the router's offset of the last `num_new` experts of every layer."""
        for moe in self.moes:
            moe.logit_offset[moe.num_experts - num_new :] = offset

    def forward(
        self, obs_BLO: Tensor, *, task_B: Tensor | None = None, valid_BL: Tensor | None = None
    ) -> StudentOutput:
        """The Gaussian at every step.

        Args:
            obs_BLO: windows of raw observations, left-aligned, at most `context` steps.
            task_B: positions of the tasks among the stream's distinct ones; used by `onehot` only.
            valid_BL: 1 for steps, 0 for padding at a window's end; makes router statistics.
        """
        config = self.config
        length = obs_BLO.shape[1]
        x_BLD = self.embed((obs_BLO - self.obs_centre) / self.obs_scale) + self.position[:length]
        if self.task is not None:
            if task_B is None:
                raise ValueError("this student is told the task (task_identity 'onehot'), but no task was given")
            x_BLD = x_BLD + self.task[task_B].unsqueeze(1)
        valid_N = None if valid_BL is None else valid_BL.reshape(-1)
        stats: list[RouterStats] = []
        for block in self.blocks:
            x_BLD, layer_stats = block(x_BLD, valid_N)
            if layer_stats is not None:
                stats.append(layer_stats)
        mean_BLA, spread_BLA = self.head(self.norm(x_BLD)).split(ACTION_SIZE, -1)
        # A smooth clamp: at a hard one's borders the gradient would vanish for good.
        middle = (config.max_log_std + config.min_log_std) / 2
        half = (config.max_log_std - config.min_log_std) / 2
        return StudentOutput(mean_BLA, middle + half * spread_BLA.tanh(), tuple(stats))


class StudentActor:
    """The student as a policy that acts in episodes: its mean, clipped, given each episode's last `context` steps.

    Satisfies `cpd.envs.episodes.Actor`. Rows do not see each other.
    """

    def __init__(self, student: Student, tasks: Sequence[str]) -> None:
        """`tasks` are the stream's distinct tasks, in order."""
        self._student = student
        self._tasks = list(tasks)
        self._history: deque[npt.NDArray[np.float32]] = deque(maxlen=student.config.context)
        self._task_B: Tensor | None = None

    def reset(self, task: str, num_envs: int) -> None:
        """Begin `num_envs` fresh episodes of `task`, which is looked at by `onehot` only.

        Raises:
            ValueError: if the student is told the task but does not know `task`.
        """
        self._history.clear()
        if self._student.config.task_identity == "onehot":
            if task not in self._tasks:
                raise ValueError(f"this student knows {', '.join(self._tasks)}, but not {task}")
            index = self._tasks.index(task)
            self._task_B = torch.full((num_envs,), index, device=self._student.device)

    @torch.no_grad()
    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic actions `[B, A]` in [-1, 1] for the observations `[B, O]` that come next."""
        student = self._student
        self._history.append(obs_BO.astype(np.float32, copy=True))
        window = torch.from_numpy(np.stack(self._history, axis=1))
        out = student(window.to(student.device, student.dtype), task_B=self._task_B)
        actions: npt.NDArray[np.float32] = out.mean_BLA[:, -1].clamp(-1.0, 1.0).float().cpu().numpy()
        return actions


def save_student(path: Path, student: Student, description: Mapping[str, Any]) -> None:
    """Publish the weights at `path`, and beside it, before them, a JSON file that describes them.

    Args:
        path: ends in `.safetensors`.
        student: the policy.
        description: what else to say, such as stage, labels, growth.
    """
    every = student.state_dict() | (student.packing.tensors() if student.packing else {})
    tensors = {name: value.detach().cpu().contiguous() for name, value in every.items()}
    data = safetensors.torch.save(tensors)
    centre, scale = observation_scaling()
    write_json(
        path.with_suffix(".json"),
        {
            **description,
            "student": to_dict(student.config),
            "num_tasks": student.num_tasks,
            "num_experts": student.num_experts,
            "num_parameters": sum(parameter.numel() for parameter in student.parameters()),
            "dtype": str(student.dtype).removeprefix("torch."),
            "obs_centre": centre.tolist(),
            "obs_scale": scale.tolist(),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    )
    with publish(path) as temporary:
        temporary.write_bytes(data)


def load_student(path: Path) -> Student:
    """The student that `save_student` published at `path`, on the CPU.

    Raises:
        ValueError: if weights and description do not belong together, or observations were scaled differently.
    """
    description_path = path.with_suffix(".json")
    description = read_json(description_path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise ValueError(f"{path} is not what {description_path.name} describes; remove both and distil again")
    centre, scale = observation_scaling()
    if [centre.tolist(), scale.tolist()] != [description["obs_centre"], description["obs_scale"]]:
        raise ValueError(f"{path} was trained with another scaling of observations than this code's; distil again")
    student = Student(
        load(StudentConfig, description["student"], str(description_path)),
        description["num_tasks"],
        num_experts=description["num_experts"],
        dtype=getattr(torch, description["dtype"]),
    )
    tensors = safetensors.torch.load(data)
    student.packing = Packing.pop_from(tensors)
    student.load_state_dict(tensors)
    return student
