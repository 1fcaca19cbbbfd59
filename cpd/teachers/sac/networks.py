"""The networks of soft actor-critic, with their gradients written out by hand.

Autograd and one tensor per parameter make an update of networks this small a matter of overhead: hundreds of
small operations. Here parameters and gradients are views of flat vectors (one step of Adam for all of them), both
critics are one batched product, and what an update evaluates at the same point goes through the network together.

Shape letters: E = 2 critics, M rows, B minibatch, I = 43 inputs of a critic, O = 39, A = 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpd.envs.tasks import ACTION_SIZE, OBSERVATION_SIZE
from cpd.teachers.policy import SquashedPolicy

NUM_CRITICS = 2


class Critics:
    """Two rectified MLPs `Q(s, a)` side by side, with their targets.

    Args:
        hidden_sizes: widths of the hidden layers.
        generator: source of the initial weights.
        device: where they live.

    Attributes:
        values: [P] all weights of both, with `values.grad` [P].
        targets: [P] their moving average.
    """

    def __init__(self, hidden_sizes: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        self._sizes = list(pairwise((OBSERVATION_SIZE + ACTION_SIZE, *hidden_sizes, 1)))
        num_values = sum(NUM_CRITICS * (size_in + 1) * size_out for size_in, size_out in self._sizes)
        self.values = torch.zeros(num_values)
        for weight_EIO, _ in self._layers(self.values):
            for weight_IO in weight_EIO:
                gain = 1.0 if weight_IO.shape[1] == 1 else math.sqrt(2)
                nn.init.orthogonal_(weight_IO, gain, generator=generator)
        self.values = self.values.to(device)
        self.values.grad = torch.zeros_like(self.values)
        self.targets = self.values.clone()
        self._online, self._target = self._layers(self.values), self._layers(self.targets)
        self._grads = self._layers(self.values.grad)

    def _layers(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights `[E, in, out]` and biases `[E, 1, out]` as views of a flat vector."""
        layers, start = [], 0
        for size_in, size_out in self._sizes:
            end = start + NUM_CRITICS * size_in * size_out
            weight = vector[start:end].view(NUM_CRITICS, size_in, size_out)
            start, end = end, end + NUM_CRITICS * size_out
            layers.append((weight, vector[start:end].view(NUM_CRITICS, 1, size_out)))
            start = end
        return layers

    def target_values(self, inputs_MI: Tensor) -> Tensor:
        """The targets' values `[E, M]`."""
        return _forward(self._target, inputs_MI)[-1].squeeze(-1)

    def forward(self, inputs_MI: Tensor) -> list[Tensor]:
        """Activations `[E, M, .]` of every layer, the inputs first, the values `[E, M, 1]` last."""
        return _forward(self._online, inputs_MI)

    def backward(self, activations: list[Tensor], grad_EM1: Tensor, num_learned: int) -> Tensor:
        """Write the gradient of the weights from the first `num_learned` rows.

        Args:
            activations: what `forward` gave; used up.
            grad_EM1: gradient of a loss with respect to the values; zero where a row has no say.
            num_learned: B; the rows from there on are the actor's, for which the weights are constants.

        Returns:
            The gradient `[M - B, A]` with respect to the actions of the other rows.
        """
        learned = slice(0, num_learned)
        for layer in range(len(self._online) - 1, -1, -1):
            below_EMI, (weight_EIO, _) = activations[layer], self._online[layer]
            grad_weight, grad_bias = self._grads[layer]
            own_EBO = grad_EM1[:, learned]
            torch.bmm(below_EMI[:, learned].transpose(1, 2), own_EBO, out=grad_weight)
            torch.sum(own_EBO, dim=1, keepdim=True, out=grad_bias)
            if layer:
                grad_EM1 = torch.bmm(grad_EM1, weight_EIO.transpose(1, 2))
                grad_EM1 = torch.ops.aten.threshold_backward(grad_EM1, below_EMI, 0)
        weight_EAO = self._online[0][0][:, OBSERVATION_SIZE:]
        return torch.bmm(grad_EM1[:, num_learned:], weight_EAO.transpose(1, 2)).sum(dim=0)

    def track(self, rate: float) -> None:
        """Move the targets towards the critics by a share of `rate`."""
        self.targets.lerp_(self.values, rate)


def _forward(layers: list[tuple[Tensor, Tensor]], inputs_MI: Tensor) -> list[Tensor]:
    activations = [inputs_MI.expand(NUM_CRITICS, *inputs_MI.shape)]
    for index, (weight_EIO, bias_E1O) in enumerate(layers):
        output = torch.baddbmm(bias_E1O, activations[-1], weight_EIO)
        activations.append(output if index == len(layers) - 1 else output.relu_())
    return activations


class Actions(NamedTuple):
    """Actions drawn from a squashed Gaussian, and what their gradient needs."""

    actions_MA: Tensor
    log_prob_M: Tensor
    slope_MA: Tensor
    """Derivative of tanh."""
    scaled_noise_MA: Tensor
    """Noise times standard deviation, zero where that is clamped."""


class Actor:
    """A squashed policy whose weights, and the temperature's logarithm, are views of one flat vector.

    Args:
        policy: on its device already.
        init_log_alpha: initial logarithm of the temperature.

    Attributes:
        values: [P] weights, then the logarithm of the temperature, with `values.grad` [P].
        log_alpha: [] view of the last one.
    """

    def __init__(self, policy: SquashedPolicy, init_log_alpha: float) -> None:
        self._bounds = tuple(float(bound) for bound in policy.log_std_bounds)
        parameters = list(policy.net.parameters())
        num_values = sum(parameter.numel() for parameter in parameters)
        self.values = torch.empty(num_values + 1, device=parameters[0].device)
        self.values.grad = torch.zeros_like(self.values)
        views, grads, start = [], [], 0
        for parameter in parameters:
            part = slice(start, start + parameter.numel())
            self.values[part] = parameter.detach().flatten()
            # The policy acts with the very numbers that the optimiser moves.
            parameter.data = self.values[part].view(parameter.shape)
            views.append(parameter.data)
            grads.append(self.values.grad[part].view(parameter.shape))
            start = part.stop
        self._layers = list(zip(views[::2], views[1::2], strict=True))
        self._grads = list(zip(grads[::2], grads[1::2], strict=True))
        self.log_alpha = self.values[-1]
        self.log_alpha.fill_(init_log_alpha)
        self._log_alpha_grad = self.values.grad[-1]

    def forward(self, obs_MO: Tensor) -> list[Tensor]:
        """Activations of every layer at normalised observations, which come first."""
        activations = [obs_MO]
        for index, (weight_OI, bias_O) in enumerate(self._layers):
            output = torch.addmm(bias_O, activations[-1], weight_OI.t())
            activations.append(output if index == len(self._layers) - 1 else output.relu_())
        return activations

    def draw(self, output_M2A: Tensor, noise_MA: Tensor) -> Actions:
        """Actions for white noise, with their log-probabilities (Haarnoja et al. 2018, appendix C)."""
        mean_MA, raw_MA = output_M2A.chunk(2, dim=1)
        low, high = self._bounds
        log_std_MA = raw_MA.clamp(low, high)
        scaled_MA = noise_MA * log_std_MA.exp()
        unsquashed_MA = mean_MA + scaled_MA
        actions_MA = unsquashed_MA.tanh()
        # log(1 - tanh(u)^2) without cancellation.
        log_slope_MA = 2.0 * (math.log(2.0) - unsquashed_MA - nn.functional.softplus(-2.0 * unsquashed_MA))
        density_MA = noise_MA.square().mul_(-0.5).sub_(log_std_MA).sub_(log_slope_MA)
        log_prob_M = density_MA.sum(dim=1).sub_(0.5 * ACTION_SIZE * math.log(2.0 * math.pi))
        scaled_MA = scaled_MA.mul_(log_std_MA.eq(raw_MA))
        return Actions(actions_MA, log_prob_M, log_slope_MA.exp_(), scaled_MA)

    def backward(
        self, activations: list[Tensor], drawn: Actions, grad_BA: Tensor, alpha: Tensor, target_entropy: float
    ) -> None:
        """Write the gradient of `mean(alpha log_prob - Q)`, and of the temperature's own loss.

        Args:
            activations: of the B rows at which the actor learns.
            drawn: the actions at these rows.
            grad_BA: gradient of the mean of -Q with respect to them.
            alpha: the temperature.
            target_entropy: nats.
        """
        num_rows = len(grad_BA)
        # d log_prob / d u = 2 tanh(u) per component; the Gaussian's own part depends on the noise alone.
        per_row = alpha / num_rows
        grad_mean_BA = torch.addcmul(grad_BA * drawn.slope_MA, drawn.actions_MA, 2.0 * per_row)
        is_free_BA = drawn.scaled_noise_MA.ne(0)
        grad_log_std_BA = torch.addcmul(-per_row * is_free_BA, grad_mean_BA, drawn.scaled_noise_MA)
        grad = torch.cat((grad_mean_BA, grad_log_std_BA), dim=1)
        for layer in range(len(self._layers) - 1, -1, -1):
            grad_weight, grad_bias = self._grads[layer]
            torch.mm(grad.t(), activations[layer], out=grad_weight)
            torch.sum(grad, dim=0, out=grad_bias)
            if layer:
                grad = torch.mm(grad, self._layers[layer][0])
                grad = torch.ops.aten.threshold_backward(grad, activations[layer], 0)
        self._log_alpha_grad.copy_(-(drawn.log_prob_M.mean() + target_entropy))
