"""The mixture-of-experts block: routing against a plain computation, and growth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.student.moe import MoE


def make_moe(num_experts: int = 4, top_k: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> MoE:
    moe = MoE(width=8, expert_width=12, num_experts=num_experts, top_k=top_k, dtype=dtype)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.7, generator=rng)
    return moe


def tokens(num: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expert(moe: MoE, number: int, x_ND: torch.Tensor) -> torch.Tensor:
    """One expert alone."""
    return F.gelu(x_ND @ moe.up.stack[number].t()) @ moe.down.stack[number]


def token_by_token(moe: MoE, x_ND: torch.Tensor) -> torch.Tensor:
    """Compute the expected output of the block one token at a time."""
    rows = []
    for x_D in x_ND:
        logits = [
            (row @ x_D + offset).item() for row, offset in zip(moe.router.stack, moe.logit_offset, strict=True)
        ]
        total = sum(math.exp(logit) for logit in logits)
        probs = {e: math.exp(logit) / total for e, logit in enumerate(logits)}
        chosen = sorted(probs, key=probs.__getitem__, reverse=True)[: moe.top_k]
        selected = sum(probs[e] for e in chosen)
        rows.append(sum(probs[e] / selected * expert(moe, e, x_D.unsqueeze(0))[0] for e in chosen))
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(num_experts=st.integers(1, 6), data=st.data(), num_tokens=st.integers(1, 20), seed=st.integers(0, 100))
def test_is_a_softmax_over_all_experts_renormalised_over_the_chosen(num_experts, data, num_tokens, seed):
    moe = make_moe(num_experts, data.draw(st.integers(1, num_experts)), seed)
    x = tokens(num_tokens, seed + 1)
    y, stats = moe(x)
    assert stats is None
    torch.testing.assert_close(y, token_by_token(moe, x), rtol=1e-10, atol=1e-10)


def test_offsets_enter_the_softmax():
    moe, x = make_moe(), tokens(30)
    output = moe(x)[0]
    moe.logit_offset[3] = -1.5
    torch.testing.assert_close(moe(x)[0], token_by_token(moe, x), rtol=1e-10, atol=1e-10)
    assert not torch.equal(output, moe(x)[0])


def test_all_tokens_to_one_expert_lose_none():
    moe, x = make_moe(top_k=1), tokens(50)
    moe.logit_offset[1] = 100.0
    y, stats = moe(x, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(y, expert(moe, 1, x))
    assert stats.counts_E.tolist() == [0, 50, 0, 0]


def test_statistics_leave_padding_out():
    moe, x = make_moe(), tokens(10)
    valid = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=torch.float64)
    counted, wanted = moe(x, valid)[1], moe(x[:6], valid[:6])[1]
    for left, right in zip(counted, wanted, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("num_experts, top_k", [(1, 1), (3, 1), (4, 2), (5, 3)])
def test_gradients_are_those_of_finite_differences(num_experts, top_k):
    moe = make_moe(num_experts, top_k)
    names, values = zip(*moe.named_parameters(), strict=True)

    def mixed(x, *parameters):
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))[0]

    # Six tokens leave some experts without any.
    assert torch.autograd.gradcheck(mixed, (tokens(6).requires_grad_(), *values))


class TestGrowth:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_changes_no_output_by_a_single_bit(self, dtype):
        for num_tokens in (1, 7, 64, 500):
            moe, x = make_moe(dtype=dtype), tokens(num_tokens, dtype=dtype)
            output = moe(x)[0]
            moe.grow(2, 0.1 * torch.ones(8), group=0, closed=True)
            assert torch.equal(output, moe(x)[0])

    def test_appends_and_touches_nothing_else(self):
        moe = make_moe()
        parameters = {name: value.clone() for name, value in moe.named_parameters()}
        moe.grow(2, torch.full((8,), 0.25), group=0, closed=True)
        after = dict(moe.named_parameters())
        assert set(after) == set(parameters) == {"up.stack", "down.stack", "router.stack"}
        for name, value in parameters.items():
            assert torch.equal(value, after[name][:4])
            copied = value[2] + (0.25 if name == "router.stack" else 0.0)
            assert torch.equal(after[name][4:], copied.unsqueeze(0))
        assert moe.logit_offset.tolist() == [0, 0, 0, 0, -math.inf]

    def test_an_opened_copy_gets_tokens_and_gradient(self):
        moe, x = make_moe(), tokens(200)
        moe.grow(2, torch.zeros(8), group=0, closed=True)
        moe.logit_offset[4] = -0.01
        moe.read_layout()
        y, stats = moe(x, torch.ones(200, dtype=torch.float64))
        assert stats.counts_E[4] > 0.1 * stats.counts_E.sum() / 2
        y.square().sum().backward()
        assert all(parameter.grad[4].abs().max() > 0 for parameter in moe.parameters())


class TestGroups:
    def test_a_group_of_its_own_changes_no_other_output_by_a_single_bit(self):
        moe, x = make_moe(), tokens(64)
        group = torch.zeros(64, dtype=torch.int64)
        output, in_common = moe(x, group=group)[0], moe(x, group=0)[0]
        torch.testing.assert_close(output, moe(x)[0])
        for _ in range(2):
            moe.grow(1, torch.ones(8), group=1, closed=False)
        assert torch.equal(output, moe(x, group=group)[0])
        assert torch.equal(in_common, moe(x, group=0)[0])

    def test_tokens_choose_among_their_groups_experts_alone(self):
        moe, x = make_moe(), tokens(40)
        for source in (0, 3):
            moe.grow(source, torch.zeros(8), group=1, closed=False)
        group = torch.arange(40) % 2
        y, stats = moe(x, torch.ones(40, dtype=torch.float64), group)
        assert stats.counts_E.tolist()[4:] == [20, 20]
        alone = make_moe(2)
        for stack, wanted in zip(alone.parameters(), moe.parameters(), strict=True):
            stack.data = wanted.data[[0, 3]]
        torch.testing.assert_close(y[1::2], alone(x[1::2])[0])
        torch.testing.assert_close(y[1::2], moe(x[1::2], group=1)[0])
        assert torch.isfinite(stats.prob_sums_E).all() and torch.isfinite(stats.z_square_sum)
        (y.square().sum() + stats.z_square_sum + stats.prob_sums_E[0]).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in moe.parameters())
