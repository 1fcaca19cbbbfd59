"""A stage's step as a recording that a GPU replays, instead of some thousand operations that the host starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Final, cast

import torch
from torch import Tensor

from cpd.distill.batches import Batch
from cpd.distill.flat import FlatParameters
from cpd.distill.learner import LossTerms

Update = Callable[[Batch, Tensor | None, Tensor], tuple[LossTerms, Tensor]]
Outputs = tuple[LossTerms, Tensor]
#: Steps before the recording, in which libraries set themselves up.
WARM_UP: Final = 3


def record_on_cuda(step: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record the operations of `step` without running them; returns what runs them, and what they write."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph.replay, outputs


class RecordedUpdate:
    """An update that is recorded once per stage and replayed on copies of its arguments.

    A recording holds the addresses of all tensors, so the update must not use any that is new in every step, other
    than its arguments. It is recorded anew when the frozen parameters or the shapes of the arguments change. If it
    cannot be recorded, every step runs operation by operation, and a warning names the reason.
    """

    def __init__(
        self,
        update: Update,
        flat: FlatParameters,
        record: Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]] = record_on_cuda,
    ) -> None:
        self._update, self._flat, self._record = update, flat, record
        self._trainable: list[slice] | None = None
        self._shapes: list[object] = []
        self._num_steps = 0
        self._inputs: list[Tensor] = []
        self._recording: tuple[Callable[[], None], Outputs] | None = None
        self.is_possible = True

    def __call__(self, batch: Batch, contrast: Tensor | None, lr: Tensor) -> Outputs:
        """One update; its results are overwritten by the next one."""
        # The number of tokens differs between steps, so it is a tensor, too.
        arguments = [*batch._replace(num_tokens=cast(int, lr.new_full((), batch.num_tokens))), contrast, lr]
        shapes: list[object] = [
            argument.shape if isinstance(argument, Tensor) else argument for argument in arguments
        ]
        if self._trainable is not self._flat.trainable or shapes != self._shapes:
            self._trainable, self._shapes = self._flat.trainable, shapes
            self._num_steps, self._recording = 0, None
        self._num_steps += 1
        if not self.is_possible or self._num_steps <= WARM_UP:
            return self._update(batch, contrast, lr)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if self._recording is None:
            self._inputs = [tensor.clone() for tensor in tensors]
            copies = iter(self._inputs)
            fields = [next(copies) if isinstance(argument, Tensor) else argument for argument in arguments]
            static = Batch(*fields[:-2])  # type: ignore[arg-type]
            try:
                self._recording = self._record(lambda: self._update(static, *fields[-2:]))  # type: ignore[arg-type]
            except RuntimeError as error:
                self.is_possible = False
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"a step runs operation by operation, since CUDA cannot record it: {reason}",
                    stacklevel=2,
                )
                return self._update(batch, contrast, lr)
        for copy, tensor in zip(self._inputs, tensors, strict=True):
            copy.copy_(tensor)
        replay, outputs = self._recording
        replay()
        return outputs
