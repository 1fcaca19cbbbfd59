"""All parameters as views of one flat vector, and AdamW on that vector.

With one vector, a step takes one all-reduce, and clipping, masks and penalties are vector operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cpd.comm import Comm

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class FlatParameters:
    """The parameters of a module, moved into `values` [P], with their gradients in `grads` [G].

    The parameters of the module become views of `values`, their gradients views of `grads`. Autograd accumulates
    into `grads`: zero it before every backward pass.

    Frozen parameters (see `freeze`) take no part in training. They have no place in `grads`, so that everything
    that is reduced and clipped is contiguous. G equals P if none is frozen.

    Attributes:
        names: names of parameters in the order of the vector; those that growth adds come last.
        slots: by name, the slice of the vector that holds a parameter.
        shapes: by name, the shape of a parameter.
        matrices: [P] 1 for elements of weight matrices, to which weight decay applies, else 0.
        trainable: the slices of `values` that are not frozen, in order; adjacent slices are merged. `grads` holds
            their gradients in this order.
    """

    def __init__(self, module: nn.Module, first_names: Sequence[str] = ()) -> None:
        """Move the parameters of `module`; those in `first_names` come first, in that order."""
        # So growth appends, and parameters of one age stay contiguous, as `AdamW.cohorts` needs.
        parameters = dict(module.named_parameters())
        self.names = [*first_names, *(name for name in parameters if name not in set(first_names))]
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
        """Copy a vector [P] from the layout `old` to this layout; parameters that `old` lacks get 0."""
        result = torch.zeros_like(self.values)
        for name, slot in old.slots.items():
            result[self.slots[name]] = vector[slot]
        return result

    def freeze(self, mask: Tensor | None) -> None:
        """Freeze every parameter that `mask` [P] zeroes entirely and unfreeze all others; None unfreezes all.

        This replaces `grads` by a new tensor.
        """
        self.trainable: list[slice] = []
        trained = [name for name in self.names if mask is None or bool(mask[self.slots[name]].any())]
        self.grads = self.values.new_zeros(sum(self.shapes[name].numel() for name in trained))
        self._staging: Tensor | None = None
        # Autograd skips frozen parameters, and the backward passes that only they need.
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        start = 0
        for name in trained:
            parameter, slot = self._parameters[name], self.slots[name]
            parameter.requires_grad_(True)
            parameter.grad = self.grads[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            if self.trainable and self.trainable[-1].stop == slot.start:  # fewer, longer slices for the optimiser
                slot = slice(self.trainable.pop().start, slot.stop)
            self.trainable.append(slot)

    def reduce_grads(self, comm: Comm) -> None:
        """Sum `grads` over ranks, in place; a collective."""
        if comm.size == 1:
            return
        if self.grads.device.type == "cpu":
            comm.all_reduce_sum(self.grads.numpy())
            return
        if self._staging is None:  # pinned host memory, since MPI cannot read device memory
            self._staging = torch.empty(self.grads.shape, dtype=self.grads.dtype, pin_memory=True)
        self._staging.copy_(self.grads)
        comm.all_reduce_sum(self._staging.numpy())
        self.grads.copy_(self._staging)

    def clip_grads(self, max_norm: float) -> float:
        """Scale `grads` down to Euclidean norm `max_norm` if its norm is greater; returns the original norm."""
        # After the all-reduce, so this is the norm of the global gradient, the same on every rank.
        norm = float(torch.linalg.vector_norm(self.grads))
        if norm > max_norm:
            self.grads.mul_(max_norm / norm)
        return norm


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on flat parameters that may grow.

    Bias correction (Kingma and Ba 2015, algorithm 1) counts the updates since a parameter was added, so parameters
    added by growth start as with a new optimiser. As in torch, updates with a zero gradient count too. Parameters
    that get their first gradient later, such as the task encoder and the tasks' vectors, start with larger steps.
    """

    def __init__(self, flat: FlatParameters, weight_decay: float = 0.0) -> None:
        self.flat = flat
        self.weight_decay = weight_decay
        self.first_moment = torch.zeros_like(flat.values)
        self.second_moment = torch.zeros_like(flat.values)
        #: Groups of parameters by age, as [start, stop, age in updates]; contiguous, since growth appends.
        self.cohorts: list[list[int]] = [[0, flat.size, 0]]

    def grow(self, flat: FlatParameters) -> None:
        """Switch to the vector after growth; keep the moments of older parameters."""
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
            mask: [P] factor on every element's update, weight decay included. Moments are updated as without a
                mask, except those of frozen parameters. A factor on the gradient would be cancelled by Adam's
                normalisation.
        """
        slots, grad_slots, ages = self._advance()
        values = [self.flat.values[slot] for slot in slots]
        # The masked update is the step from the old to the new values, scaled; so the old ones are needed.
        old_values = [value.clone() for value in values] if mask is not None else []
        if self.weight_decay:
            for slot, value in zip(slots, values, strict=True):
                value.addcmul_(value, self.flat.matrices[slot], value=-lr * self.weight_decay)
        # Fused: one pass over the vectors instead of ten, since they do not fit in a core's private cache.
        adamw(
            values,
            [self.flat.grads[slot] for slot in grad_slots],
            [self.first_moment[slot] for slot in slots],
            [self.second_moment[slot] for slot in slots],
            max_exp_avg_sqs=[],
            state_steps=[torch.full((), age - 1.0, device=self.flat.values.device) for age in ages],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=0.0,  # applied above, to matrices only
        )
        if mask is not None:
            for slot, old, new in zip(slots, old_values, values, strict=True):
                torch.lerp(old, new, mask[slot], out=new)

    def _advance(self) -> tuple[list[slice], list[slice], list[int]]:
        """Count one more update; return slices of equal age, in `values` and in `grads`, and their ages."""
        for cohort in self.cohorts:
            cohort[2] += 1
        slots, grad_slots, ages, offset = [], [], [], 0
        for trainable in self.flat.trainable:
            for first, last, age in self.cohorts:
                start, stop = max(trainable.start, first), min(trainable.stop, last)
                if start < stop:
                    slots.append(slice(start, stop))
                    grad_slots.append(slice(offset + start - trainable.start, offset + stop - trainable.start))
                    ages.append(age)
            offset += trainable.stop - trainable.start
        return slots, grad_slots, ages

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, apart from the parameters."""
        return {
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "cohorts": [list(cohort) for cohort in self.cohorts],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned; `flat` must hold the parameters of that time."""
        self.first_moment.copy_(state["first_moment"])
        self.second_moment.copy_(state["second_moment"])
        self.cohorts = [list(cohort) for cohort in state["cohorts"]]
        assert self.cohorts[-1][1] == self.flat.size
