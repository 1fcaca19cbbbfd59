"""Teachers' policies: the Gaussian policy that RL trains, its files, and how a teacher acts.

Dimensions: B batch, O observation, A action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from cpd.comm import Comm, SerialComm
from cpd.config.types import Positive
from cpd.envs.suite import ACTION_CLIP, Sizes, load_suite
from cpd.reading import DamagedFileError, check_shape, read_json
from cpd.run.descriptions import Weights
from cpd.run.files import atomic_write, remove, sha256, write_json
from cpd.teachers.ranks import column_moments


class RunningMoments(nn.Module):
    """Mean and variance of all rows so far, in float64 buffers, so that they are saved with their module.

    Args:
        size: D, number of components.
        min_std: lower bound of `std`; without it, dividing by `std` would amplify a component that hardly varies.
    """

    count: Tensor
    mean: Tensor
    sum_of_squares: Tensor

    def __init__(self, size: int, min_std: float) -> None:
        super().__init__()
        self._min_std = min_std
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        # The sum of squared deviations from the mean.
        self.register_buffer("sum_of_squares", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_BD: Tensor, comm: Comm | None = None) -> None:
        """Add the rows of `x_BD`; with a communicator, those of all ranks (a collective)."""
        # Merging moments (Chan et al. 1983) needs no earlier rows, and loses fewer digits than sums of squares.
        num_new, new_mean, new_squares = column_moments(x_BD.double(), comm or SerialComm())
        total = self.count + num_new
        delta = new_mean - self.mean
        self.sum_of_squares += new_squares + delta**2 * (self.count * num_new / total)
        self.mean += delta * (num_new / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, [D] float64, at least `min_std`; ones before the first update."""
        if self.count == 0:
            return torch.ones_like(self.mean)
        return (self.sum_of_squares / self.count).sqrt().clamp_min(self._min_std)


A = TypeVar("A")
FloatArray = npt.NDArray[np.float32]

#: The kind of architecture in policies' descriptions.
KIND: Final = "gaussian_mlp"

#: Normalised observations are clipped to this many standard deviations.
OBSERVATION_CLIP: Final = 8.0
#: How a description says that its policy acts, step by step, in terms of its other entries and of the tensors.
ACTING: Final = (
    "std = max(sqrt(normalizer.sum_of_squares / normalizer.count), observation_min_std), or 1 if the count is 0",
    "cast normalizer.mean and std, which are float64, to dtype; all that follows is in dtype",
    "x = (observation - normalizer.mean) / std, clipped to [-observation_clip, observation_clip]",
    "for net.0, net.2, and so on: x = weight x + bias, followed by the activation except after the last",
    "action = x, clipped to [-action_clip, action_clip]; log_std_A is for exploration only",
)
#: Observations are of the order of 1, such as metres and unit quaternions; a smaller standard deviation is noise.
MIN_OBSERVATION_STD: Final = 1e-3


class Distribution(NamedTuple):
    """A teacher's diagonal Gaussian at a batch of states."""

    raw_mean: FloatArray
    """[B, A], unbounded."""
    log_std: FloatArray
    """[B, A]."""


class Teacher(Protocol):
    """A policy without memory, and the distribution of its actions."""

    std_source: Literal["policy", "assumed"]

    def distribution(self, obs_BO: FloatArray) -> Distribution:
        """The action distribution at each observation."""


class GaussianPolicy(nn.Module):
    """A diagonal Gaussian over actions, with an MLP for the mean and one log standard deviation for all states.

    The mean is unbounded; the environment clips actions. The statistics that normalise observations are part of
    the policy.

    Args:
        hidden_sizes: widths of the hidden layers.
        init_log_std: initial value of every component's log standard deviation.
        generator: source of the initial weights; None: torch's global generator.
        sizes: of observations and actions; None: Meta-World's.
        num_actions: how many components of an action the task has; the means of the others stay 0. None: all.

    Attributes:
        net: maps normalised observations to means.
        normalizer: statistics of observations.
        log_std_A: log standard deviation.
    """

    std_source: Literal["policy", "assumed"] = "policy"

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        init_log_std: float,
        generator: torch.Generator | None = None,
        sizes: Sizes | None = None,
        num_actions: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden_sizes, self.sizes = tuple(hidden_sizes), sizes or load_suite().spaces.sizes
        num_inputs, num_outputs = self.sizes
        self.normalizer = RunningMoments(num_inputs, MIN_OBSERVATION_STD)
        self.net = mlp((num_inputs, *hidden_sizes, num_outputs), last_gain=0.01, generator=generator)
        if num_actions is not None:
            # They get no gradient, since the losses leave them out.
            nn.init.zeros_([*self.net.parameters()][-2].data[num_actions:])
        self.log_std_A = nn.Parameter(torch.full((num_outputs,), init_log_std))

    def normalize(self, obs_BO: Tensor) -> Tensor:
        """Normalise and clip observations `[B, O]` for the network."""
        mean_O, std_O = self.normalizer.mean.float(), self.normalizer.std.float()
        return ((obs_BO - mean_O) / std_O).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)

    def forward(self, obs_BO: Tensor) -> Tensor:
        """Means `[B, A]`, unbounded, at observations `[B, O]`."""
        mean_BA: Tensor = self.net(self.normalize(obs_BO))
        return mean_BA

    @torch.inference_mode()
    def distribution(self, obs_BO: FloatArray) -> Distribution:
        """The action distribution at each observation."""
        raw_mean_BA = self(torch.from_numpy(obs_BO)).numpy()
        return Distribution(raw_mean_BA, np.tile(self.log_std_A.numpy(), (len(obs_BO), 1)))

    def explore(self, obs_BO: FloatArray, noise_BA: FloatArray) -> FloatArray:
        """Actions `[B, A]`, unbounded, at observations `[B, O]`; `noise_BA` has unit variance."""
        mean_BA, log_std_BA = self.distribution(obs_BO)
        std_BA: FloatArray = np.exp(log_std_BA)
        return mean_BA + std_BA * noise_BA


class TeacherOfSuite:
    """A policy of one suite in a mixture of suites: it sees its own part of the observation.

    Args:
        policy: trained in a run on one suite.
        columns: the positions of its observation in that of the mixture.
        action_size: A, of the mixture; means of components that the policy lacks are 0.
    """

    def __init__(self, policy: GaussianPolicy, columns: slice, action_size: int) -> None:
        self.std_source = policy.std_source
        self._policy, self._columns = policy, columns
        self._padding = ((0, 0), (0, action_size - policy.sizes.action))

    def distribution(self, obs_BO: FloatArray) -> Distribution:
        """The action distribution at each observation."""
        own = self._policy.distribution(np.ascontiguousarray(obs_BO[:, self._columns]))
        return Distribution(np.pad(own.raw_mean, self._padding), np.pad(own.log_std, self._padding))


class TeacherActor:
    """Acts with a teacher's clipped mean; satisfies `cpd.envs.episodes.Actor`."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def reset(self, tasks: Sequence[str]) -> None:
        """Do nothing: a teacher has no memory."""

    def act(self, obs_BO: FloatArray) -> FloatArray:
        """The clipped mean, `[B, A]` in [-1, 1]."""
        return np.clip(self._teacher.distribution(obs_BO).raw_mean, -ACTION_CLIP, ACTION_CLIP)


def mlp(sizes: Sequence[int], last_gain: float, generator: torch.Generator | None) -> nn.Sequential:
    """Tanh layers with orthogonal weights of gain sqrt(2), and a linear last one of gain `last_gain`; zero biases.

    Args:
        sizes: number of inputs, widths of the hidden layers, number of outputs.
        last_gain: gain of the last layer.
        generator: source of the weights; None: torch's global generator.
    """
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        is_last = i == len(sizes) - 2
        linear = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(linear.weight, last_gain if is_last else math.sqrt(2), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def gaussian_log_prob(x_BA: Tensor, mean_BA: Tensor, log_std_A: Tensor) -> Tensor:
    """Log density `[B]` of a diagonal Gaussian, in nats."""
    z_BA = (x_BA - mean_BA) * torch.exp(-log_std_A)
    return (-0.5 * z_BA**2 - log_std_A - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def save_policy(policy: GaussianPolicy, path: Path, description: dict[str, Any]) -> None:
    """Write the weights to `path` (safetensors), then `description` and the architecture beside them (JSON)."""
    architecture = {
        "kind": KIND,
        "observation_size": policy.sizes.observation,
        "action_size": policy.sizes.action,
        "hidden_sizes": list(policy.hidden_sizes),
        "activation": "tanh",
        "observation_clip": OBSERVATION_CLIP,
        "observation_min_std": MIN_OBSERVATION_STD,
        "action_clip": ACTION_CLIP,
        "dtype": "float32",
        "acting": ACTING,
    }
    tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    write_tensors(tensors, path, {"architecture": architecture, **description})


def write_tensors(tensors: dict[str, Tensor], path: Path, description: dict[str, Any]) -> None:
    """Write `tensors` to `path`, and then `description`, with their hash, beside it as JSON.

    The description marks the policy as complete. It is removed first, so that it never describes other weights.
    """
    remove(path.with_suffix(".json"))
    with atomic_write(path) as temporary:
        # Not save_file, which sets mode 0600: other members of the group could not read the policy.
        temporary.write_bytes(safetensors.torch.save(tensors))
    write_json(path.with_suffix(".json"), {**description, "sha256": sha256(path)})


class _Description(Weights):
    architecture: dict[str, Any]


class _GaussianArchitecture(TypedDict):
    observation_size: Positive
    action_size: Positive
    hidden_sizes: list[Positive]


def read_tensors(path: Path, kind: str, shape: type[A]) -> tuple[dict[str, Tensor], A]:
    """Read the tensors at `path` and their architecture, of the given shape; check their hash and kind.

    Raises:
        DamagedFileError: if a file is missing, damaged, or describes another kind; the message names it.
    """
    description_path = path.with_suffix(".json")
    for file in (path, description_path):
        if not file.exists():
            raise DamagedFileError(f"{file} is missing; {_remedy(path)}")
    description = read_json(description_path, _Description, _remedy(path))
    architecture = description["architecture"]
    if (described_kind := architecture.get("kind")) != kind:
        raise DamagedFileError(f"{description_path} describes a policy of kind {described_kind!r}, not {kind!r}")
    if sha256(path) != description["sha256"]:
        raise DamagedFileError(
            f"{path} is damaged or is not the file that {description_path.name} describes: the hashes differ; "
            f"{_remedy(path)}"
        )
    place = f"{description_path}, in its part 'architecture'"
    return safetensors.torch.load_file(path), check_shape(architecture, shape, place, _remedy(path))


def _remedy(path: Path) -> str:
    """Tell what to do about a policy at `path` that cannot be used."""
    marker = path.parent / "COMPLETE"
    if not marker.exists():
        return "restore the policy and its description, or publish its run again (`cpd publish`)"
    files = f"{path}, {path.with_suffix('.json').name} and {marker.name}"
    return f"remove {files}, as far as they exist, and launch again to retrain the teacher"


def load_policy(path: str | Path) -> GaussianPolicy:
    """Load the policy saved at `path`, ready to act.

    Raises:
        DamagedFileError: if it is missing, damaged, or of another kind.
    """
    path = Path(path)
    tensors, architecture = read_tensors(path, KIND, _GaussianArchitecture)
    try:
        sizes = Sizes(architecture["observation_size"], architecture["action_size"])
        policy = GaussianPolicy(architecture["hidden_sizes"], init_log_std=0.0, sizes=sizes)
        policy.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        raise DamagedFileError(f"{path} is not what its description describes: {error}; {_remedy(path)}") from None
    return policy.eval().requires_grad_(False)
