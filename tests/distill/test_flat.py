"""The flat vector and AdamW on it, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cpd.comm import SerialComm
from cpd.distill.flat import AdamW, FlatParameters


class Growing(nn.Module):
    """Layers before and after a list that grows, so that growth inserts into the middle of the order."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first = nn.Linear(3, 5, dtype=torch.float64)
        self.experts = nn.ModuleList([nn.Linear(5, 5, dtype=torch.float64)])
        self.last = nn.Linear(5, 2, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=rng)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        return self.last(sum(expert(x).tanh() for expert in self.experts))

    def grow(self) -> None:
        copy = nn.Linear(5, 5, dtype=torch.float64)
        copy.load_state_dict(self.experts[0].state_dict())
        self.experts.append(copy)


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


def test_adamw_after_growth_treats_new_parameters_like_a_fresh_optimiser():
    module, other = Growing(), Growing()
    flat = FlatParameters(module)
    optimizer = AdamW(flat)
    oracle = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(40):
        if step in (15, 30):
            module.grow()
            flat = FlatParameters(module, flat.names)
            optimizer.grow(flat)
            other.grow()
            oracle.add_param_group({"params": list(other.experts[-1].parameters())})
        flat.grads.zero_()
        oracle.zero_grad()
        backward(module, step)
        backward(other, step)
        optimizer.step(0.01)
        oracle.step()
        for (name, mine), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13, msg=name)
    assert [age for _, _, age in optimizer.cohorts] == [40, 25, 10]


def test_mask_scales_the_update_and_not_the_gradient():
    module, other = Growing(), Growing()
    masked, plain = AdamW(FlatParameters(module), 0.1), AdamW(FlatParameters(other), 0.1)
    mask = torch.linspace(0, 1, masked.flat.size, dtype=torch.float64)
    for step in range(3):
        masked.flat.values.copy_(plain.flat.values)
        start = plain.flat.values.clone()
        for module_, optimizer in ((module, masked), (other, plain)):
            optimizer.flat.grads.zero_()
            backward(module_, step)
        masked.step(0.01, mask)
        plain.step(0.01)
        torch.testing.assert_close(masked.flat.values - start, mask * (plain.flat.values - start))
    assert masked.flat.values[0] == start[0]


def test_state_comes_back():
    module = Growing()
    optimizer = AdamW(FlatParameters(module))
    module.grow()
    flat = FlatParameters(module, optimizer.flat.names)
    optimizer.grow(flat)
    for step in range(4):
        flat.grads.zero_()
        backward(module, step)
        optimizer.step(0.01)
    twin = Growing()
    twin.grow()
    twin_flat = FlatParameters(twin, flat.names)
    twin_flat.values.copy_(flat.values)
    restored = AdamW(twin_flat)
    restored.restore(optimizer.state())
    for module_, optimizer_ in ((module, optimizer), (twin, restored)):
        optimizer_.flat.grads.zero_()
        backward(module_, 9)
        optimizer_.step(0.01)
    assert torch.equal(flat.values, twin_flat.values)


def test_reducing_on_one_rank_changes_nothing():
    flat = FlatParameters(Growing())
    flat.grads.normal_()
    summed = flat.grads.clone()
    flat.reduce_grads(SerialComm())
    assert torch.equal(flat.grads, summed)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_frozen_parameters_stay_and_others_learn_as_under_a_mask(weight_decay):
    """Freezing is the same as a mask of zeros, but faster; unfreezing leaves no trace of it."""
    trainings = {}
    for freezes in (False, True):
        module = Growing()
        flat = FlatParameters(module)
        optimizer = AdamW(flat, weight_decay)
        mask = torch.ones_like(flat.values)
        for name in ("first.weight", "last.bias"):
            mask[flat.slots[name]] = 0.0
        old_values = flat.values.clone()
        if freezes:
            flat.freeze(mask)
        for step in range(5):
            flat.grads.zero_()
            backward(module, step)
            if freezes:
                assert len(flat.grads) == int(mask.sum())
            else:
                assert flat.grads[mask == 0].any()
            optimizer.step(1e-2, mask)
        assert torch.equal(flat.values[mask == 0], old_values[mask == 0])
        assert (flat.values[mask == 1] != old_values[mask == 1]).all()
        trainings[freezes] = flat.values
        flat.freeze(None)
        assert flat.trainable == [slice(0, flat.size)]
        backward(module, 9)
        assert flat.grads[mask == 0].any()
    assert torch.equal(trainings[False], trainings[True])
