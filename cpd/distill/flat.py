"""All parameters as views of one flat vector, and AdamW on that vector.

With one vector, ranks sum one buffer, and clipping, masks and penalties are vector operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from cpd.student.stack import Stack

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class FlatParameters:
    """The parameters of a module, moved into `values` [P], with their gradients in `grads` [G].

    The parameters of the module become views of `values`, their gradients views of `grads`. Autograd accumulates
    into `grads`: zero it before every backward pass.

    Frozen parameters (see `freeze`) take no part in training. They have no place in `grads`, so that everything
    that is reduced and clipped is contiguous. G equals P if none is frozen.

    `grads` takes memory from its first use after `freeze` on, since growth needs none.

    Attributes:
        names: names of parameters in the order of the vector.
        slots: by name, the slice of the vector that holds a parameter.
        shapes: by name, the shape of a parameter.
        trainable: the slices of `values` that are not frozen, in order; adjacent slices are merged. `grads` holds
            their gradients in this order.
        leaves: the tensors whose gradients are views of `grads`, in order.
        mask: the argument of `freeze`.
    """

    def __init__(self, module: nn.Module) -> None:
        """Move the parameters of `module`."""
        parameters = dict(module.named_parameters())
        self.names = list(parameters)
        sizes = [parameter.numel() for parameter in parameters.values()]
        first = parameters[self.names[0]]
        self.values = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self.slots: dict[str, slice] = {}
        self.shapes = {name: parameters[name].shape for name in self.names}
        start = 0
        for name, size in zip(self.names, sizes, strict=True):
            parameter, slot = parameters[name], slice(start, start + size)
            self.values[slot] = parameter.detach().reshape(-1)
            parameter.data = self.values[slot].view(parameter.shape)
            self.slots[name] = slot
            start += size
        self._parameters = parameters
        self.leaves: list[Tensor] = []
        self._stacks = {f"{name}.stack": of for name, of in module.named_modules() if isinstance(of, Stack)}
        self._grads: Tensor | None = None
        self.freeze(None)

    @property
    def size(self) -> int:
        """P."""
        return len(self.values)

    def matrix_slots(self) -> Iterator[slice]:
        """The slice of every weight matrix; a stack of matrices has one for each expert."""
        for name, slot in self.slots.items():
            if self.is_matrix(name):
                size = self.shapes[name][-2:].numel()
                yield from (slice(start, start + size) for start in range(slot.start, slot.stop, size))

    def is_matrix(self, name: str) -> bool:
        """Whether a parameter is a weight matrix or a stack of them: weight decay applies to these."""
        num_axes = len(self.shapes[name])
        return num_axes == 3 or (num_axes == 2 and name.endswith(".weight"))

    def carried(self, vector: Tensor, old: FlatParameters) -> Tensor:
        """Copy a vector [P] from the layout `old`, before growth; slices that growth has appended get 0."""
        result = torch.zeros_like(self.values, dtype=vector.dtype)
        for name, slot in old.slots.items():
            start = self.slots[name].start
            result[start : start + slot.stop - slot.start] = vector[slot]
        return result

    def freeze(self, mask: Tensor | None) -> None:
        """Freeze parameters and experts that `mask` [P] zeroes entirely; unfreeze all others. None unfreezes all.

        This replaces `grads` by a new tensor.
        """
        self.mask = mask
        trained = {name: self._trained_part(name) for name in self.names}
        self._release_grads()
        self.trainable: list[slice] = []
        for name, part in trained.items():
            # Autograd skips frozen parameters, and the backward passes that only they need.
            parameter, slot, size = self._parameters[name], self.slots[name], part.stop - part.start
            is_whole = part == slot
            parameter.requires_grad_(is_whole)
            leaf = parameter
            if name in self._stacks and size and not is_whole:
                leaf = nn.Parameter(self.values[part].view(-1, *parameter.shape[1:]))
                self._stacks[name].trained = (part.start - slot.start) // parameter[0].numel(), leaf
            if not size:
                continue
            self.leaves.append(leaf)
            if self.trainable and self.trainable[-1].stop == part.start:  # fewer, longer slices for the optimiser
                part = slice(self.trainable.pop().start, part.stop)
            self.trainable.append(part)

    @property
    def grads(self) -> Tensor:
        """[G]."""
        if self._grads is None:
            sizes = [leaf.numel() for leaf in self.leaves]
            self._grads = self.values.new_zeros(sum(sizes))
            for leaf, grad in zip(self.leaves, torch.split(self._grads, sizes), strict=True):
                if leaf.grad is not None:  # of a backward pass before the first use
                    grad.copy_(leaf.grad.flatten())
                leaf.grad = grad.view(leaf.shape)
        return self._grads

    def _trained_part(self, name: str) -> slice:
        """The part of `values` in which a parameter is trained; for a stack, a range of experts."""
        slot = self.slots[name]
        if self.mask is None:
            return slot
        num_rows = len(self._parameters[name]) if name in self._stacks else 1
        rows = self.mask[slot].view(num_rows, -1).any(1).nonzero()
        if not len(rows):
            return slice(slot.start, slot.start)
        size = (slot.stop - slot.start) // num_rows
        return slice(slot.start + int(rows[0]) * size, slot.start + (int(rows[-1]) + 1) * size)

    def release(self) -> None:
        """Release the vectors, before another `FlatParameters` takes the parameters; `slots` stay."""
        self._release_grads()
        self.values = self.values.new_empty(0)
        self.mask, self._parameters, self._stacks = None, {}, {}

    def _release_grads(self) -> None:
        self._grads, self.leaves = None, []
        for parameter in self._parameters.values():
            parameter.grad = None
        for stack in self._stacks.values():
            stack.trained = None

    def clip_grads(self, max_norm: float) -> Tensor:
        """Scale `grads` down to Euclidean norm `max_norm` if its norm is greater; returns the original norm."""
        # After the all-reduce, so this is the norm of the global gradient, the same on every rank.
        norm: Tensor = torch.linalg.vector_norm(self.grads)
        self.grads.mul_((max_norm / norm).clamp(max=1.0))
        return norm


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on flat parameters that may grow.

    Bias correction (Kingma and Ba 2015, algorithm 1) counts the updates since a parameter was added, so parameters
    added by growth start as with a new optimiser. As in torch, updates with a zero gradient count too. Parameters
    that get their first gradient later, such as the task encoder and the tasks' vectors, start with larger steps.

    Attributes:
        cohorts: slices of parameters of equal age, in order.
        ages: [cohorts] the number of updates since each was added.
    """

    def __init__(self, flat: FlatParameters, weight_decay: float = 0.0) -> None:
        self.flat = flat
        self.weight_decay = weight_decay
        self.first_moment = torch.zeros_like(flat.values)
        self.second_moment = torch.zeros_like(flat.values)
        self._set_cohorts([[0, flat.size, 0]])

    def _set_cohorts(self, cohorts: list[list[int]]) -> None:
        self.cohorts = [slice(start, stop) for start, stop, _ in cohorts]
        # On the device, so that a step is the same operations on the same memory every time.
        self.ages = torch.tensor([age for *_, age in cohorts], device=self.flat.values.device, dtype=torch.float32)
        self._views: tuple[list[Tensor], ...] = ([], [], [])
        self._prepared_for: list[slice] | None = None

    def _cohorts_with_ages(self) -> list[list[int]]:
        ages = self.ages.tolist()
        return [[cohort.start, cohort.stop, int(age)] for cohort, age in zip(self.cohorts, ages, strict=True)]

    def grow(self, flat: FlatParameters) -> None:
        """Switch to the vector after growth; keep the moments of older parameters."""
        old_cohorts, cohorts = self._cohorts_with_ages(), []
        self._views = ([], [], [])  # of what is replaced below
        for name, slot in flat.slots.items():
            old = self.flat.slots[name]
            shift = slot.start - old.start
            for start, stop, age in old_cohorts:
                if start < old.stop and stop > old.start:
                    cohorts.append([max(start, old.start) + shift, min(stop, old.stop) + shift, age])
            if old.stop + shift < slot.stop:
                cohorts.append([old.stop + shift, slot.stop, 0])
        self.first_moment = flat.carried(self.first_moment, self.flat)
        self.second_moment = flat.carried(self.second_moment, self.flat)
        self.flat = flat
        self._set_cohorts(_merged(cohorts))

    def prepare(self) -> None:
        """Find the slices that an update changes; call it after `flat.freeze`."""
        flat = self.flat
        slots, numbers = [], []
        for trainable in flat.trainable:
            for number, cohort in enumerate(self.cohorts):
                if both := _overlap(trainable, cohort):
                    slots.append(both)
                    numbers.append(number)
        self._ages = [self.ages[number] for number in numbers]  # views, one for each slice
        vectors = (flat.values, self.first_moment, self.second_moment)
        self._views = tuple([vector[slot] for slot in slots] for vector in vectors)
        self._sizes = [slot.stop - slot.start for slot in slots]  # in the order of the gradients
        matrices = [flat.slots[name] for name in flat.names if self.weight_decay and flat.is_matrix(name)]
        decayed = (_overlap(trainable, matrix) for trainable in flat.trainable for matrix in matrices)
        self._decayed = [flat.values[both] for both in decayed if both]
        masks = [None if flat.mask is None else flat.mask[slot] for slot in slots]
        self._masks = [None if mask is None or bool((mask == 1.0).all()) else mask for mask in masks]
        self._prepared_for = flat.trainable

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        """One update from `flat.grads`.

        `flat.mask` is a factor on every element's update, weight decay included. Moments are updated as without
        a mask, except those of frozen parameters. A factor on the gradient would be cancelled by Adam's
        normalisation.
        """
        if self._prepared_for is not self.flat.trainable:
            self.prepare()
        values, first, second = self._views
        # The masked update is the step from the old to the new values, scaled; so the old ones are needed.
        old_values = [
            None if mask is None else value.clone() for value, mask in zip(values, self._masks, strict=True)
        ]
        for value in self._decayed:
            value.sub_(value * (lr * self.weight_decay))
        self.ages.add_(1.0)
        # Fused: one pass over the vectors instead of ten, since they do not fit in a core's private cache. Called
        # directly, since a step cannot be traced through torch.optim's function for it.
        torch._fused_adamw_(
            values,
            torch.split(self.flat.grads, self._sizes),
            first,
            second,
            [],
            self._ages,
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,  # applied above, to matrices only
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )
        for old, value, mask in zip(old_values, values, self._masks, strict=True):
            if old is not None and mask is not None:
                torch.lerp(old, value, mask, out=value)

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, apart from the parameters."""
        return {
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "cohorts": self._cohorts_with_ages(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned; `flat` must hold the parameters of that time."""
        self.first_moment.copy_(state["first_moment"])
        self.second_moment.copy_(state["second_moment"])
        self._set_cohorts(state["cohorts"])
        assert self.cohorts[-1].stop == self.flat.size


def _overlap(one: slice, other: slice) -> slice | None:
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return slice(start, stop) if start < stop else None


def _merged(cohorts: list[list[int]]) -> list[list[int]]:
    """Join adjacent cohorts of equal age."""
    merged: list[list[int]] = []
    for start, stop, age in cohorts:
        if merged and merged[-1][1:] == [start, age]:
            merged[-1][1] = stop
        else:
            merged.append([start, stop, age])
    return merged
