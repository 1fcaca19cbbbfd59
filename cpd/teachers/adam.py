"""Adam for the teachers' networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1), bit for bit that of `torch.optim.Adam`.

    That class imports torch's compiler when its first optimiser is made, which takes a second of every process.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self._parameters = list(parameters)
        self._lr = lr
        # By position; torch's names, so that checkpoints of either load.
        self._state: dict[int, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        grads = {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}
        for i in grads.keys() - self._state.keys():
            zeros = torch.zeros_like(self._parameters[i])
            self._state[i] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        states = [self._state[i] for i in grads]
        # Fused: one pass over each tensor instead of ten.
        adam(
            [self._parameters[i] for i in grads],
            list(grads.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self._lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, apart from the parameters; not a copy."""
        return {"state": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, here or in `torch.optim.Adam`."""
        self._state = {i: dict(tensors) for i, tensors in state["state"].items()}
