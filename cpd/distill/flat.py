"""All parameters as views of one flat vector, and AdamW on it.

With one vector, a step needs one all-reduce, and clipping, masks and penalties are vector operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cpd.comm import Comm

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class FlatParameters:
    """The parameters of a module, moved into `values` [P], with their gradients in `grads` [G].

    The module's parameters become views: writing to either side writes to both. Gradients are views too, into
    which autograd adds; zero `grads` before every backward pass.

    Parameters that rest (see `freeze`) take no part in training: no gradient is computed, reduced or applied,
    and none has a place in `grads`, so that what is reduced and clipped lies together; G is P while none rests.

    Attributes:
        names: parameters in the order of the vector; those that growth adds come last.
        slots: name to its slice of the vector.
        shapes: name to its shape.
        matrices: [P] 1 for elements of weight matrices, else 0: what weight decay applies to.
        trainable: the slices of `values` that do not rest, in order; neighbours are merged. Their gradients follow
            one another in `grads`.
    """

    def __init__(self, module: nn.Module, known: Sequence[str] = ()) -> None:
        """Move the parameters of `module`; those named in `known` come first, in that order."""
        parameters = dict(module.named_parameters())
        new = [name for name in parameters if name not in set(known)]
        self.names = [*known, *new]
        assert set(self.names) == set(parameters)
        sizes = [parameters[name].numel() for name in self.names]
        first = parameters[self.names[0]]
        self.values = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self.matrices = torch.zeros_like(self.values)
        self.slots: dict[str, slice] = {}
        self.shapes = {name: parameters[name].shape for name in self.names}
        start = 0
        for name, size in zip(self.names, sizes, strict=True):
            parameter, slot = parameters[name], slice(start, start + size)
            self.values[slot] = parameter.detach().reshape(-1)
            self.matrices[slot] = float(name.endswith(".weight") and parameter.ndim > 1)
            parameter.data = self.values[slot].view(parameter.shape)
            self.slots[name] = slot
            start += size
        self._parameters = parameters
        self.freeze(None)

    @property
    def size(self) -> int:
        """P."""
        return len(self.values)

    def carried(self, vector: Tensor, old: FlatParameters) -> Tensor:
        """A vector laid out as `old`, laid out as this; 0 for parameters that `old` did not have."""
        result = torch.zeros_like(self.values)
        for name, slot in old.slots.items():
            result[self.slots[name]] = vector[slot]
        return result

    def freeze(self, mask: Tensor | None) -> None:
        """Let parameters rest of which `mask` [P] lets no element move, and wake all others; None wakes all.

        `grads` is another tensor from then on.
        """
        self.trainable: list[slice] = []
        moving = [name for name in self.names if mask is None or bool(mask[self.slots[name]].any())]
        self.grads = self.values.new_zeros(sum(self.shapes[name].numel() for name in moving))
        self._staging: Tensor | None = None
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        start = 0
        for name in moving:
            parameter, slot = self._parameters[name], self.slots[name]
            parameter.requires_grad_(True)
            parameter.grad = self.grads[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            if self.trainable and self.trainable[-1].stop == slot.start:
                slot = slice(self.trainable.pop().start, slot.stop)
            self.trainable.append(slot)

    def reduce_grads(self, comm: Comm) -> None:
        """Replace `grads` by its sum over ranks."""
        if comm.size == 1:
            return
        if self.grads.device.type == "cpu":
            comm.all_reduce_sum(self.grads.numpy())
            return
        if self._staging is None:
            self._staging = torch.empty(self.grads.shape, dtype=self.grads.dtype, pin_memory=True)
        self._staging.copy_(self.grads)
        comm.all_reduce_sum(self._staging.numpy())
        self.grads.copy_(self._staging)

    def clip_grads(self, max_norm: float) -> float:
        """Scale `grads` down to `max_norm` if its Euclidean norm is greater; returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.grads))
        if norm > max_norm:
            self.grads.mul_(max_norm / norm)
        return norm


class _Part(NamedTuple):
    """Parameters of equal age that are trainable."""

    values: slice
    """Their place among all parameters."""
    grads: slice
    """Their place among those that are trainable."""
    age: int
    """In updates, this one included."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on flat parameters that may grow.

    Bias correction (Kingma and Ba 2015, algorithm 1) goes by the updates since a parameter was added, so that
    those that growth adds start like those of a fresh optimiser. As in torch, updates in which a gradient was 0
    count too: the task encoder, for which the first stage has no use, and a task's vector start with larger steps.
    """

    def __init__(self, flat: FlatParameters, weight_decay: float = 0.0) -> None:
        self.flat = flat
        self.weight_decay = weight_decay
        self.first_moment = torch.zeros_like(flat.values)
        self.second_moment = torch.zeros_like(flat.values)
        #: Parameters of equal age, as [start, stop, age in updates]; they are contiguous, since growth appends.
        self.cohorts: list[list[int]] = [[0, flat.size, 0]]

    def grow(self, flat: FlatParameters) -> None:
        """Take over the vector after growth; moments are carried over by name."""
        assert flat.names[: len(self.flat.names)] == self.flat.names
        self.first_moment = flat.carried(self.first_moment, self.flat)
        self.second_moment = flat.carried(self.second_moment, self.flat)
        if flat.size > self.flat.size:
            self.cohorts.append([self.flat.size, flat.size, 0])
        self.flat = flat

    @torch.no_grad()
    def step(self, lr: float, mask: Tensor | None = None) -> None:
        """One update from `flat.grads`.

        Args:
            lr: learning rate.
            mask: [P] factor on every element's update, weight decay included; moments go on as without, but
                for parameters that rest. A factor on the gradient instead would be cancelled by Adam's
                normalisation.
        """
        parts = self._advance()
        values = [self.flat.values[part.values] for part in parts]
        before = [part.clone() for part in values] if mask is not None else []
        if self.weight_decay:
            for part, own in zip(parts, values, strict=True):
                own.addcmul_(own, self.flat.matrices[part.values], value=-lr * self.weight_decay)
        # One pass over the vectors instead of ten: they do not fit in a core's own cache.
        adamw(
            values,
            [self.flat.grads[part.grads] for part in parts],
            [self.first_moment[part.values] for part in parts],
            [self.second_moment[part.values] for part in parts],
            max_exp_avg_sqs=[],
            state_steps=[torch.full((), part.age - 1.0, device=self.flat.values.device) for part in parts],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=0.0,
        )
        if mask is not None:
            for part, old, new in zip(parts, before, values, strict=True):
                torch.lerp(old, new, mask[part.values], out=new)

    def _advance(self) -> list[_Part]:
        """Let all cohorts grow older by an update; returns what is trainable of each."""
        for cohort in self.cohorts:
            cohort[2] += 1
        parts, offset = [], 0
        for trainable in self.flat.trainable:
            for first, last, age in self.cohorts:
                start, stop = max(trainable.start, first), min(trainable.stop, last)
                if start < stop:
                    grads = slice(offset + start - trainable.start, offset + stop - trainable.start)
                    parts.append(_Part(slice(start, stop), grads, age))
            offset += trainable.stop - trainable.start
        return parts

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "cohorts": [list(cohort) for cohort in self.cohorts],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state()` returned; the flat vector has been restored before."""
        self.first_moment.copy_(state["first_moment"])
        self.second_moment.copy_(state["second_moment"])
        self.cohorts = [list(cohort) for cohort in state["cohorts"]]
        assert self.cohorts[-1][1] == self.flat.size
