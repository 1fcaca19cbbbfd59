"""Weights that depend on the task: shared parameters, changed by parameters of the task's own (LoRA, HAT).

Dimensions: K tasks, E experts of a layer, F hidden width of an expert, D width, r rank, O x I a matrix.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Mapping
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from cpd.config import Config
from cpd.student.stack import Stack

Module = TypeVar("Module", bound=nn.Module)

#: The scale with which gates act, s_max of the paper.
GATE_SCALE: Final = 400.0
#: Names of tensors in a file of weights that tell which of the two it holds.
_GATES, _UP = "packing.embedding.stack", "packing.up.0.stack"


class TaskWeights(nn.Module, abc.ABC):
    """Parameters of single tasks; as `Student.packing`, they belong to the student's parameters."""

    @abc.abstractmethod
    def effective(self, shared: Mapping[str, Tensor], task: int, *, is_training: bool) -> dict[str, Tensor]:
        """The weights of `task` where they differ from the student's parameters `shared`, by name."""

    @abc.abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the initial values."""

    def view(self, student: Module, task: int) -> Module:
        """A copy of `student` with the weights of `task`."""
        result = copy.deepcopy(student)
        result.packing = None  # type: ignore[assignment]
        with torch.no_grad():
            weights = self.effective(dict(student.named_parameters()), task, is_training=False)
            for name, weight in weights.items():
                result.get_parameter(name).copy_(weight)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """Further entries for a file of weights: none."""
        return {}


class LowRank(TaskWeights):
    """Adds to every weight matrix but the router's a product of two matrices of rank r: W + up_k down_k."""

    def __init__(self, student: nn.Module, num_tasks: int, rank: int) -> None:
        """Zero matrices for `student`; the experts of a layer count as one matrix, [E F, D]."""
        super().__init__()
        endings = (".weight", ".up.stack", ".down.stack")
        matrices = {n: p for n, p in student.named_parameters() if n.endswith(endings) and p.ndim > 1}
        self.names = list(matrices)
        sizes = [(p.numel() // p.shape[-1], p.shape[-1], p.dtype) for p in matrices.values()]
        self.up = nn.ModuleList(Stack(num_tasks, rows, rank, dtype=dtype) for rows, _, dtype in sizes)
        self.down = nn.ModuleList(Stack(num_tasks, rank, columns, dtype=dtype) for _, columns, dtype in sizes)

    def effective(self, shared: Mapping[str, Tensor], task: int, *, is_training: bool) -> dict[str, Tensor]:
        """All matrices."""
        row = slice(task, task + 1)
        products = [up.of(row)[0] @ down.of(row)[0] for up, down in zip(self.up, self.down, strict=True)]  # type: ignore[operator]
        return {
            name: shared[name] + product.view(shared[name].shape)
            for name, product in zip(self.names, products, strict=True)
        }

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the first factor by fan-in; the second is 0, so that a task begins with the shared weights."""
        for down in self.down.parameters():
            down.normal_(0.0, 1.0 / math.sqrt(down.shape[-1]), generator=generator)

    @property
    def parameters_per_task(self) -> int:
        """Numbers that every task adds."""
        return sum(parameter[0].numel() for parameter in self.parameters())


class Gates(TaskWeights):
    """Multiplies the hidden units of all experts by gates in [0, 1], a sigmoid of an embedding of the task.

    Attributes:
        scale: the factor on the embedding while the student learns.
    """

    scale: Tensor

    def __init__(self, student: nn.Module, num_tasks: int) -> None:
        """Embeddings of 0 for `student`."""
        super().__init__()
        downs = {n: p for n, p in student.named_parameters() if n.endswith(".moe.down.stack")}
        self.names = list(downs)
        first = next(iter(downs.values()))
        units = first.shape[0] * first.shape[1]
        self.embedding = Stack(num_tasks, len(downs), units, dtype=first.dtype)
        self.register_buffer("scale", torch.tensor(GATE_SCALE, dtype=first.dtype), persistent=False)

    def gates(self, task: int, scale: Tensor | float) -> Tensor:
        """The gates of `task`, [layers, E F].

        Their values are sigmoid(scale e), their gradient is that of sigmoid(e): the paper's compensation of the
        embedding's gradient (eq. 6) up to the factor s_max, which Adam cancels, and without its overflow.
        """
        embedding = self.embedding.of(slice(task, task + 1))[0]
        soft = embedding.sigmoid()
        return soft + ((scale * embedding).sigmoid() - soft).detach()

    def effective(self, shared: Mapping[str, Tensor], task: int, *, is_training: bool) -> dict[str, Tensor]:
        """The experts' second matrices, whose rows are multiplied by the gates."""
        gates = self.gates(task, self.scale if is_training else GATE_SCALE)
        return {
            name: shared[name] * gate.view(*shared[name].shape[:2], 1)
            for name, gate in zip(self.names, gates, strict=True)
        }

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the embeddings from N(0, 1)."""
        self.embedding.stack.normal_(0.0, 1.0, generator=generator)


def make_task_weights(config: Config, student: nn.Module) -> TaskWeights | None:
    """The task weights that `config.protection.kind` needs, if any."""
    num_tasks = len(config.stream.distinct_tasks)
    if config.distill.protocol != "continual":
        return None
    if config.protection.kind == "lora":
        return LowRank(student, num_tasks, config.protection.lora_rank)
    return Gates(student, num_tasks) if config.protection.kind == "hat" else None


def task_weights_of_file(tensors: Mapping[str, Tensor], student: nn.Module) -> TaskWeights | None:
    """The task weights of a student that a file of weights needs, if any."""
    if _UP in tensors:
        return LowRank(student, *tensors[_UP].shape[::2])
    return Gates(student, len(tensors[_GATES])) if _GATES in tensors else None
