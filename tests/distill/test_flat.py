"""The flat vector and AdamW on it, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cpd.distill.flat import AdamW, FlatParameters
from cpd.student.stack import Stack


class Growing(nn.Module):
    """Layers before and after a stack that grows, so that growth inserts into the middle of the vector."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first = nn.Linear(3, 5, dtype=torch.float64)
        self.experts = Stack(1, 5, 5, dtype=torch.float64)
        self.last = nn.Linear(5, 2, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=rng)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts = self.experts.of(slice(0, len(self.experts.stack)))
        return self.last((self.first(x).tanh() @ experts).tanh().sum(0))

    def grow(self) -> None:
        self.experts.append(self.experts.stack[0].detach())


def backward(module: nn.Module, step: int) -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    module(x).square().sum().backward()


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_parameters_and_gradients_are_views():
    module = Growing()
    old_values = parameters_of(module)
    flat = FlatParameters(module)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, old_values[name])
        assert torch.equal(flat.values[flat.slots[name]].view_as(parameter), parameter)
    for step in range(3):  # autograd must keep adding to the same memory
        flat.grads.zero_()
        backward(module, step)
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0
        assert torch.equal(flat.grads[flat.slots[name]].view_as(parameter), parameter.grad)
        assert parameter.grad.data_ptr() == flat.grads[flat.slots[name]].data_ptr()
    flat.values.zero_()
    assert all(not parameter.any() for parameter in module.parameters())


def test_clipping_is_torchs():
    module, other = Growing(), Growing()
    flat = FlatParameters(module)
    for max_norm in (0.1, 1e9):
        flat.grads.zero_()
        other.zero_grad()
        backward(module, 1)
        backward(other, 1)
        wanted = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        assert flat.clip_grads(max_norm) == pytest.approx(float(wanted), rel=1e-12)
        for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay):
    module, other = Growing(), Growing()
    optimizer = AdamW(FlatParameters(module), weight_decay)
    groups = [
        {"params": [p for p in other.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in other.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=1.0)
    for step in range(40):
        lr = 0.02 / (1 + step)
        optimizer.flat.grads.zero_()
        oracle.zero_grad()
        backward(module, step)
        backward(other, step)
        optimizer.step(lr)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
        for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_adamw_after_growth_treats_new_experts_like_a_fresh_optimiser():
    module, other = Growing(), Growing()
    flat = FlatParameters(module)
    optimizer = AdamW(flat)
    # The oracle has a parameter for each expert, which `added` lists.
    added = [nn.Parameter(other.experts.stack[0].detach().clone())]
    rest = [*other.first.parameters(), *other.last.parameters()]
    oracle = torch.optim.AdamW([*rest, *added], lr=0.01, weight_decay=0.0)
    for step in range(40):
        if step in (15, 30):
            module.grow()
            flat = FlatParameters(module)
            optimizer.grow(flat)
            other.grow()
            added.append(nn.Parameter(added[0].detach().clone()))
            oracle.add_param_group({"params": added[-1:]})
        flat.grads.zero_()
        oracle.zero_grad()
        backward(module, step)
        other.experts.trained = (0, torch.stack(added))
        backward(other, step)
        optimizer.step(0.01)
        oracle.step()
        torch.testing.assert_close(module.experts.stack, torch.stack(added), rtol=1e-11, atol=1e-13)
        for mine, theirs in zip([*module.first.parameters(), *module.last.parameters()], rest, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert optimizer.ages.tolist() == [40, 25, 10, 40]


def test_mask_scales_the_update_and_not_the_gradient():
    module, other = Growing(), Growing()
    masked, plain = AdamW(FlatParameters(module), 0.1), AdamW(FlatParameters(other), 0.1)
    mask = torch.linspace(0, 1, masked.flat.size, dtype=torch.float64)
    masked.flat.freeze(mask)
    for step in range(3):
        masked.flat.values.copy_(plain.flat.values)
        start = plain.flat.values.clone()
        for module_, optimizer in ((module, masked), (other, plain)):
            optimizer.flat.grads.zero_()
            backward(module_, step)
        masked.step(0.01)
        plain.step(0.01)
        torch.testing.assert_close(masked.flat.values - start, mask * (plain.flat.values - start))
    assert masked.flat.values[0] == start[0]


def test_state_comes_back():
    module = Growing()
    optimizer = AdamW(FlatParameters(module))
    module.grow()
    flat = FlatParameters(module)
    optimizer.grow(flat)
    for step in range(4):
        flat.grads.zero_()
        backward(module, step)
        optimizer.step(0.01)
    twin = Growing()
    twin.grow()
    twin_flat = FlatParameters(twin)
    twin_flat.values.copy_(flat.values)
    restored = AdamW(twin_flat)
    restored.restore(optimizer.state())
    for module_, optimizer_ in ((module, optimizer), (twin, restored)):
        optimizer_.flat.grads.zero_()
        backward(module_, 9)
        optimizer_.step(0.01)
    assert torch.equal(flat.values, twin_flat.values)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_frozen_parameters_and_experts_stay_and_others_learn_as_alone(weight_decay):
    """The second of three experts is trained, and not the first layer; unfreezing leaves no trace of it."""
    module, alone = Growing(), Growing()
    for _ in range(2):
        module.grow()
        alone.grow()
    flat = FlatParameters(module)
    optimizer = AdamW(flat, weight_decay)
    mask = torch.ones_like(flat.values)
    mask[flat.slots["first.weight"]] = mask[flat.slots["last.bias"]] = 0.0
    experts = flat.slots["experts.stack"]
    mask[experts.start : experts.start + 25] = mask[experts.start + 50 : experts.stop] = 0.0
    old_values = flat.values.clone()
    flat.freeze(mask)
    assert len(flat.grads) == int(mask.sum()) == 5 + 25 + 10
    parts = [alone.experts.stack[i : i + 1].detach().clone().requires_grad_(i == 1) for i in range(3)]
    groups = [
        {"params": [parts[1], alone.last.weight], "weight_decay": weight_decay},
        {"params": [alone.first.bias], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(5):
        flat.grads.zero_()
        oracle.zero_grad()
        backward(module, step)
        alone.experts.trained = (0, torch.cat(parts))
        backward(alone, step)
        optimizer.step(1e-2)
        oracle.step()
    assert torch.equal(flat.values[mask == 0], old_values[mask == 0])
    torch.testing.assert_close(module.experts.stack, torch.cat(parts), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(module.last.weight, alone.last.weight, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(module.first.bias, alone.first.bias, rtol=1e-11, atol=1e-13)
    flat.freeze(None)
    assert flat.trainable == [slice(0, flat.size)]
    backward(module, 9)
    assert flat.grads[mask == 0].any()


def test_a_mask_of_zeros_within_a_parameter_moves_nothing_there():
    module = Growing()
    optimizer = AdamW(FlatParameters(module), 0.1)
    mask = torch.ones_like(optimizer.flat.values)
    mask[:3] = 0.0
    old_values = optimizer.flat.values.clone()
    optimizer.flat.freeze(mask)
    for step in range(3):
        backward(module, step)
        optimizer.step(0.01)
    assert torch.equal(optimizer.flat.values == old_values, mask == 0)
