"""The student network: maps a window of observations to a Gaussian over actions at every step of the window.

Dimensions: B windows or episodes, L time steps, O observation size, A action size, D width, N = B L tokens,
K distinct tasks of the stream, Z embedding size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.config import StudentConfig
from cpd.config.load import ConfigError, load, to_dict
from cpd.config.retired import upgrade
from cpd.envs.suite import ACTION_CLIP, DEFAULT_SUITE, Spaces, load_suite
from cpd.reading import DamagedFileError, read_json
from cpd.run.descriptions import StudentPolicy, check_identity
from cpd.run.files import atomic_write, write_json
from cpd.run.weights import changes_since, described_weights
from cpd.student.acting import STEPS
from cpd.student.former_names import stack_experts
from cpd.student.moe import MoE, Route, RouterStats
from cpd.student.packing import Packing
from cpd.student.plans import FIRST_STEPS, TIE_BREAK, Plans
from cpd.student.precision import full_precision
from cpd.student.task_density import TaskDensity
from cpd.student.task_embedding import EMBEDDING_SIZE, NEVER, TEMPERATURE, TaskEncoder
from cpd.student.task_weights import TaskWeights, task_weights_of_file
from cpd.student.transformer import Block

#: The log density of a first observation is divided by this, since its entries are not independent. Calibrated on
#: validation goals.
DENSITY_TEMPERATURE: Final = 1.4
#: Bounds of the policy's log standard deviation.
MIN_LOG_STD: Final = -3.0
MAX_LOG_STD: Final = 0.5


class StudentOutput(NamedTuple):
    """The student's output at every step of every window; step i depends on steps 0..i only."""

    mean_BLA: Tensor
    """Not clipped."""
    log_std_BLA: Tensor
    stats: tuple[RouterStats, ...]
    """One per layer; empty unless `valid_BL` was given."""


class Prepared(NamedTuple):
    """What the tasks of windows alone decide (`Student.prepare`)."""

    task_B1D: Tensor
    routes: tuple[Route | Tensor, ...]
    """Of every layer."""


class Student(nn.Module):
    """The policy network with its task prototypes; `StudentConfig` defines its sizes.

    Unless `task_identity` is `none`, the policy is conditioned on a task, given or inferred: a learned vector is
    added to every token, and tokens choose among the experts of the task's group only.

    Attributes:
        encoder: embeds observations to distinguish tasks; None unless `task_identity` is `inferred` or `given`.
        prototypes_KZ: the mean embedding of every known task, of unit length.
        known_K: bool, tasks whose stage has begun.
        group_K: int64, the group of experts of each task; 0, the first, for unknown tasks.
    """

    obs_centre: Tensor
    obs_scale: Tensor
    prototypes_KZ: Tensor
    known_K: Tensor
    group_K: Tensor

    def __init__(
        self,
        config: StudentConfig,
        num_tasks: int,
        *,
        num_experts: int | None = None,
        dtype: torch.dtype = torch.float32,
        spaces: Spaces | None = None,
    ) -> None:
        """Build with zero or default values; `initialise` draws the initial weights.

        Args:
            config: sizes.
            num_tasks: K.
            num_experts: experts per layer now; default: as at the first stage.
            dtype: type of parameters and computation.
            spaces: of the tasks' suite; None: Meta-World's.
        """
        super().__init__()
        self.spaces = spaces or load_suite().spaces
        observation_size, action_size = self.spaces.sizes
        self.config, self.num_tasks = config, num_tasks
        #: What makes weights depend on the task: their owners, or parameters of the tasks' own.
        self.packing: Packing | TaskWeights | None = None
        experts = config.num_experts if num_experts is None else num_experts
        self.register_buffer("obs_centre", torch.tensor(self.spaces.centre, dtype=dtype), persistent=False)
        self.register_buffer("obs_scale", torch.tensor(self.spaces.scale, dtype=dtype), persistent=False)
        for first, end in config.unobserved:
            if not first < end <= observation_size:
                raise ValueError(f"student.unobserved: [{first}, {end}] is no range of {observation_size} entries")
            self.obs_scale[first:end] = math.inf  # the student sees 0
        self.embed = nn.Linear(observation_size, config.width, dtype=dtype)
        self.position = nn.Parameter(torch.zeros(config.context, config.width, dtype=dtype))
        self.task = (
            nn.Parameter(torch.zeros(num_tasks, config.width, dtype=dtype)) if self.is_conditioned else None
        )
        embeds = config.task_identity in ("inferred", "given")
        self.encoder = TaskEncoder(observation_size, dtype) if embeds else None
        self.density = TaskDensity(num_tasks, observation_size)
        self.plans = Plans(num_tasks)
        self.register_buffer("prototypes_KZ", torch.zeros(num_tasks, EMBEDDING_SIZE, dtype=dtype))
        self.register_buffer("known_K", torch.zeros(num_tasks, dtype=torch.bool))
        self.register_buffer("group_K", torch.zeros(num_tasks, dtype=torch.int64))
        self._groups: list[int] = self.group_K.tolist()
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.expert_width, experts, config.top_k, dtype)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width, dtype=dtype)
        self.head = nn.Linear(config.width, 2 * action_size, dtype=dtype)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the initial weights: matrices by fan-in, scaled down by depth if they feed the residual stream."""
        # The head is not scaled down, although smaller initial actions would be usual: it acts on normalised
        # features, so its weights bound the actions. If masks freeze it after the first task, it must be able to
        # express actions that the first task does not need.
        residual_scale = 1.0 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("moe.up.stack"):  # with the other stacks of the layer
                cast(MoE, self.get_submodule(name.removesuffix(".up.stack"))).initialise(residual_scale, generator)
            elif name.endswith(".stack"):
                continue
            elif name.endswith(".weight"):
                gain = residual_scale if name.endswith("out.weight") else 1.0
                parameter.normal_(0.0, gain / math.sqrt(parameter.shape[1]), generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        if isinstance(self.packing, TaskWeights):
            self.packing.initialise(generator)

    @torch.no_grad()
    def initialise_newest(self, num_new: int, task: int, generator: torch.Generator) -> None:
        """Draw the weights of the last `num_new` experts of every layer, and the vector of `task`."""
        for moe in self.moes:
            moe.initialise(1.0 / math.sqrt(2 * self.config.num_layers), generator, first=-num_new)
        if self.task is not None:
            self.task[task].normal_(0.0, 0.02, generator=generator)

    @property
    def is_conditioned(self) -> bool:
        """Whether the policy is conditioned on a task, given or inferred."""
        return self.config.task_identity != "none"

    @property
    def moes(self) -> list[MoE]:
        """The mixture-of-experts block of every layer."""
        return [cast(Block, block).moe for block in self.blocks]

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self.moes[0].num_experts

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The type of parameters and computation."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.head.weight.device

    @property
    def chooses_experts(self) -> bool:
        """Whether tokens can choose among more than `top_k` experts; otherwise there is nothing to balance."""
        sizes = [group.stop - group.start for group in self.moes[0].groups]
        return max(sizes if self.is_conditioned else [self.num_experts]) > self.config.top_k

    def group_of(self, task: int) -> int:
        """The group of experts of `task`, without waiting for the device."""
        return self._groups[task]

    def assign_group(self, task: int, group: int) -> None:
        """Let `task` use the experts of `group`."""
        self.group_K[task] = group
        self._groups = self.group_K.tolist()

    def set_logit_offset(self, num_new: int, offset: float) -> None:
        """Set the router's offset of the last `num_new` experts of every layer."""
        for moe in self.moes:
            moe.logit_offset[moe.num_experts - num_new :] = offset
            moe.num_open = moe.num_experts if offset > -math.inf else moe.num_experts - num_new

    def embedding(self, obs_BO: Tensor) -> Tensor:
        """The task embedding of raw observations, unit vectors `[B, Z]`."""
        assert self.encoder is not None
        z_BZ: Tensor = self.encoder((obs_BO - self.obs_centre) / self.obs_scale)
        return z_BZ

    @torch.no_grad()
    def log_belief(self, obs_BO: Tensor) -> Tensor:
        """The log probability of each task given raw first observations, `[B, K]` float64; uniform prior.

        Only first observations count: later ones depend on the student's own actions, and thereby on the belief.
        """
        log_belief_BK = torch.where(self.known_K, 0.0, NEVER).double().repeat(len(obs_BO), 1)
        if not self.known_K.any():
            return torch.full_like(log_belief_BK, -math.log(self.num_tasks))
        # Students of earlier versions have no densities: only densities of all known tasks can be compared.
        if self.config.belief != "embedding" and self.density.num_K[self.known_K].all():
            log_belief_BK = (
                log_belief_BK + self.density.log_density(obs_BO, self.obs_scale.isfinite()) / DENSITY_TEMPERATURE
            )
        if self.config.belief != "density" and self.encoder is not None:
            similarity_BK = self.embedding(obs_BO.to(self.dtype)) @ self.prototypes_KZ.t()
            log_belief_BK = log_belief_BK + similarity_BK.double() / TEMPERATURE
        return log_belief_BK.log_softmax(1)

    @torch.no_grad()
    def set_prototype(self, task: int, obs_NO: Tensor) -> None:
        """Set the prototype of `task` to the normalised mean embedding of raw observations."""
        self.prototypes_KZ[task] = F.normalize(self.embedding(obs_NO).mean(0), dim=0)

    def load(self, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Load parameters and buffers; students from before densities and plans lack both."""
        tensors = stack_experts(tensors)
        if "plans.tasks_P2" in tensors:
            self.plans.resize(len(tensors["plans.tasks_P2"]))
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.startswith(("density.", "plans."))]
        if strict and (missing or unexpected):
            raise RuntimeError(f"tensors missing: {missing}; unexpected: {unexpected}")
        self._groups = self.group_K.tolist()

    def prepare(self, task_B: Tensor, length: int) -> Prepared:
        """What forward passes over windows of `length` steps of these tasks share; without gradients."""
        assert self.task is not None
        group_N = self.group_K[task_B].repeat_interleave(length)
        routes = tuple(group_N if (route := moe.route(group_N)) is None else route for moe in self.moes)
        return Prepared(F.embedding(task_B, self.task).unsqueeze(1), routes)

    def forward(
        self, obs_BLO: Tensor, *, task_B: Tensor | int | Prepared | None = None, valid_BL: Tensor | None = None
    ) -> StudentOutput:
        """The Gaussian at every step.

        Args:
            obs_BLO: windows of raw observations, left-aligned, at most `context` steps.
            task_B: tasks, given or inferred, by position among the stream's distinct ones, or one for all rows,
                which is faster, or what `prepare` made of them; required unless `task_identity` is `none`.
            valid_BL: 1 for steps, 0 for padding at a window's end; with it, router statistics are computed.
        """
        config = self.config
        length = obs_BLO.shape[1]
        x_BLD = self.embed((obs_BLO - self.obs_centre) / self.obs_scale) + self.position[:length]
        groups: Sequence[int | Tensor | Route | None] = [None] * config.num_layers
        if self.task is not None:
            if task_B is None:
                raise ValueError(f"task_identity is {config.task_identity!r}, but no task was given")
            if isinstance(task_B, Prepared):
                x_BLD, groups = x_BLD + task_B.task_B1D, task_B.routes
            elif isinstance(task_B, int):
                x_BLD, groups = x_BLD + self.task[task_B], [self.group_of(task_B)] * config.num_layers
            else:
                x_BLD = x_BLD + F.embedding(task_B, self.task).unsqueeze(1)
                groups = [self.group_K[task_B].repeat_interleave(length)] * config.num_layers
        valid_N = None if valid_BL is None else valid_BL.reshape(-1)
        stats: list[RouterStats] = []
        for block, group in zip(self.blocks, groups, strict=True):
            x_BLD, layer_stats = block(x_BLD, valid_N, group)
            if layer_stats is not None:
                stats.append(layer_stats)
        with full_precision(x_BLD):
            mean_BLA, spread_BLA = self.head(self.norm(x_BLD)).chunk(2, -1)
        # A smooth clamp, since the gradient of a hard one is zero outside its bounds.
        middle = (MAX_LOG_STD + MIN_LOG_STD) / 2
        half = (MAX_LOG_STD - MIN_LOG_STD) / 2
        return StudentOutput(mean_BLA, middle + half * spread_BLA.tanh(), tuple(stats))


def save_student(
    path: Path, student: Student, description: Mapping[str, Any], earlier: Path | None = None
) -> None:
    """Write the weights to `path`, after a JSON file beside it that describes them; both atomically.

    Args:
        path: ends in `.safetensors`.
        student: the policy.
        description: further entries of the JSON file, such as stage, labels, growth.
        earlier: the weights after an earlier stage, in the same folder; `path` may then hold only what changed.

    Raises:
        DamagedFileError: if `earlier` is damaged or missing.
    """
    tensors = student.state_dict() | (student.packing.tensors() if student.packing else {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(tensors)
    if earlier:
        data = changes_since(earlier, data)
    write_json(
        path.with_suffix(".json"),
        {
            **description,
            "student": to_dict(student.config),
            "num_tasks": student.num_tasks,
            "num_experts": student.num_experts,
            "num_parameters": description.get("num_parameters", student.num_parameters),
            "dtype": str(student.dtype).removeprefix("torch."),
            "obs_centre": student.spaces.centre.tolist(),
            "obs_scale": student.spaces.scale.tolist(),
            "acting": {
                "density_temperature": DENSITY_TEMPERATURE,
                "embedding_temperature": TEMPERATURE,
                "tie_break": TIE_BREAK,
                "first_steps": FIRST_STEPS,
                "norm_eps": student.norm.eps,
                "action_size": student.spaces.action_size,
                "action_clip": ACTION_CLIP,
                "steps": STEPS,
            },
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def load_student(path: Path, **expected: Any) -> Student:
    """Load the student that `save_student` wrote to `path`, on the CPU.

    Args:
        path: ends in `.safetensors`; the files that it builds on lie beside it.
        expected: entries of its description, which those of earlier versions may lack.

    Raises:
        DamagedFileError: if the description is not as expected, if weights and description do not match, or if
            observations were scaled differently.
    """
    description_path = path.with_suffix(".json")
    check_identity(description_path, **expected)
    description = read_json(description_path, StudentPolicy)
    data = described_weights(path)
    spaces = load_suite(description.get("labels", {}).get("suite") or DEFAULT_SUITE).spaces
    if [spaces.centre.tolist(), spaces.scale.tolist()] != [description["obs_centre"], description["obs_scale"]]:
        raise DamagedFileError(
            f"{path} was trained with another scaling of observations; distil the student again"
        )
    settings = upgrade({"student": description["student"]})["student"]
    try:
        config = load(StudentConfig, settings, str(description_path))
    except ConfigError as error:
        raise DamagedFileError(f"{error}\nthe file was changed: restore it, or distil the student again") from None
    dtype = getattr(torch, description["dtype"])
    try:
        num_tasks, num_experts = description["num_tasks"], description["num_experts"]
        student = Student(config, num_tasks, num_experts=num_experts, dtype=dtype, spaces=spaces)
        tensors = stack_experts(safetensors.torch.load(data))
        student.packing = Packing.pop_from(tensors) or task_weights_of_file(tensors, student)
        student.load(tensors)
    except (RuntimeError, TypeError, safetensors.SafetensorError) as error:
        raise DamagedFileError(f"{path} is not what {description_path.name} describes: {error}") from None
    return student
