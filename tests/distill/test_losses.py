"""The losses against torch.distributions, and the router's losses against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from cpd.distill.losses import (
    LOSSES,
    floored_log_std,
    forward_kl,
    load_balance_loss,
    reverse_kl,
    router_z_loss,
    squared_error,
)


@pytest.fixture
def gaussians():
    rng = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(5, 3, 4, generator=rng, dtype=torch.float64)  # noqa: E731
    return draw(), draw(), draw(), draw()


def distribution(mean, log_std):
    return Independent(Normal(mean, log_std.exp()), 1)


def test_forward_kl(gaussians):
    mean, log_std, teacher_mean, teacher_log_std = gaussians
    wanted = kl_divergence(distribution(teacher_mean, teacher_log_std), distribution(mean, log_std))
    torch.testing.assert_close(forward_kl(*gaussians), wanted)


def test_reverse_kl(gaussians):
    mean, log_std, teacher_mean, teacher_log_std = gaussians
    wanted = kl_divergence(distribution(mean, log_std), distribution(teacher_mean, teacher_log_std))
    torch.testing.assert_close(reverse_kl(*gaussians), wanted)


def test_squared_error_ignores_deviations(gaussians):
    mean, log_std, teacher_mean, teacher_log_std = gaussians
    wanted = torch.cdist(mean.reshape(-1, 1, 4), teacher_mean.reshape(-1, 1, 4)).reshape(5, 3) ** 2
    torch.testing.assert_close(squared_error(*gaussians), wanted)
    torch.testing.assert_close(squared_error(mean, 9 + log_std, teacher_mean, teacher_log_std), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_least_at_the_teacher_and_has_right_gradients(name, gaussians):
    _, _, teacher_mean, teacher_log_std = gaussians
    loss = LOSSES[name]
    at_teacher = loss(teacher_mean, teacher_log_std, teacher_mean, teacher_log_std)
    torch.testing.assert_close(at_teacher, torch.zeros_like(at_teacher))
    assert (loss(*gaussians) > 0).all()
    inputs = [value.clone().requires_grad_() for value in gaussians]
    assert torch.autograd.gradcheck(loss, inputs)


def test_the_floor_holds_a_deviation_up_and_leaves_wider_ones():
    log_std = torch.tensor([-9.0, math.log(0.05), math.log(0.1), math.log(0.4)])
    wanted = torch.tensor([math.log(0.1)] * 3 + [math.log(0.4)])
    torch.testing.assert_close(floored_log_std(log_std, 0.1), wanted)


def test_load_balance_is_one_if_even_and_the_number_of_experts_if_not():
    even, one = torch.full((2, 4), 0.25), torch.tensor([[1.0, 0, 0, 0]] * 2)
    group = torch.zeros(4, dtype=torch.int64)
    assert load_balance_loss(10 * even, even, 10, group).item() == pytest.approx(1)
    assert load_balance_loss(10 * one, one, 10, group).item() == pytest.approx(4)


def test_load_balance_of_groups_is_the_mean_of_each_ones_weighted_by_tokens():
    """A quarter of 8 tokens has the even group 0, the others the one-sided group 1."""
    sums = torch.tensor([[1.0, 1.0, 6.0, 0.0]])
    shares, group = sums / 8, torch.tensor([0, 0, 1, 1])
    assert load_balance_loss(sums, shares, 8, group).item() == pytest.approx(0.25 * 1 + 0.75 * 2)


def test_router_losses_of_parts_add_up_to_the_whole():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 5, generator=rng, dtype=torch.float64)
    shares = torch.rand(1, 5, generator=rng, dtype=torch.float64)
    sums = lambda rows: logits[rows].softmax(-1).sum(0, keepdim=True)  # noqa: E731
    shares = shares / shares.sum()
    group = torch.zeros(5, dtype=torch.int64)
    whole = load_balance_loss(sums(slice(None)), shares, 20, group)
    parts = [load_balance_loss(sums(slice(start, None, 2)), shares, 20, group) for start in (0, 1)]
    torch.testing.assert_close(whole, sum(parts))
    torch.testing.assert_close(whole, 5 * (shares[0] * logits.softmax(-1).mean(0)).sum())
    squares = logits.logsumexp(-1).square()
    torch.testing.assert_close(router_z_loss(squares.sum().view(1), 20), squares.mean())
