"""Policies as single modules with static shapes, for `torch.export` and ONNX.

Dimensions: B episodes, O observation, A action, L steps of a window, K distinct tasks of the stream, P
plans, D width, H heads, G groups of experts, C experts of the largest group, X their hidden widths, S state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.envs.suite import ACTION_CLIP
from cpd.student.moe import MoE
from cpd.student.network import DENSITY_TEMPERATURE, Student
from cpd.student.plans import FIRST_STEPS, TIE_BREAK
from cpd.student.task_embedding import NEVER, TEMPERATURE
from cpd.student.transformer import Block, CausalSelfAttention
from cpd.teachers.policy import OBSERVATION_CLIP, GaussianPolicy

#: The first numbers of a state: steps taken, first and second task of the plan. Past observations follow.
STATE_HEAD = 3


class InferenceTeacher(nn.Module):
    """A teacher that acts with its clipped mean: observations `[B, O]` to actions `[B, A]`, float32."""

    mean_O: Tensor
    std_O: Tensor

    def __init__(self, policy: GaussianPolicy) -> None:
        super().__init__()
        self.register_buffer("mean_O", policy.normalizer.mean.float())
        self.register_buffer("std_O", policy.normalizer.std.float())
        self.net = policy.net
        self.observation_size = policy.sizes.observation

    def forward(self, obs_BO: Tensor) -> Tensor:
        """The actions, in [-1, 1]."""
        scaled_BO = ((obs_BO - self.mean_O) / self.std_O).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        actions_BA: Tensor = self.net(scaled_BO).clamp(-ACTION_CLIP, ACTION_CLIP)
        return actions_BA


class InferenceStudent(nn.Module):
    """A student that acts as `StudentActor` does, with all memory of an episode in a state.

    A state holds, for each episode, the number of steps taken, the two tasks of the plan by their position, and
    the last L - 1 observations, oldest first. A row of zeros begins an episode, at any time and independently of
    other rows. float32 holds all these numbers exactly.

    Attributes:
        state_size: S.
        is_told: whether the student needs the task.
    """

    obs_centre: Tensor
    obs_scale: Tensor
    position_LD: Tensor
    task_KD: Tensor

    def __init__(self, student: Student) -> None:
        """Make the inference form of `student`, which stays as it is.

        Raises:
            ValueError: if the student keeps other weights for every task (PackNet, LoRA, HAT).
        """
        super().__init__()
        if student.packing is not None:
            raise ValueError("a student with other weights for each task (PackNet, LoRA, HAT) has no such form")
        student = copy.deepcopy(student).eval().requires_grad_(False)
        config = student.config
        self._context = config.context
        self.observation_size, self._action_size = student.spaces.sizes
        self.state_size = STATE_HEAD + (config.context - 1) * self.observation_size
        self.is_told = config.task_identity in ("given", "onehot")
        self.register_buffer("obs_centre", student.obs_centre)
        self.register_buffer("obs_scale", student.obs_scale)
        self.planner = _Planner(student) if config.task_identity == "inferred" else None
        self.embed, self.norm, self.head = student.embed, student.norm, student.head
        self.register_buffer("position_LD", student.position)
        self.register_buffer("task_KD", student.task)
        blocks = [cast(Block, block) for block in student.blocks]
        self.attention_norms = nn.ModuleList(block.attention_norm for block in blocks)
        self.attentions = nn.ModuleList(_Attention(block.attention) for block in blocks)
        self.moe_norms = nn.ModuleList(block.moe_norm for block in blocks)
        groups = student.group_K if student.is_conditioned else None
        self.experts = nn.ModuleList(_Experts(block.moe, groups) for block in blocks)

    def forward(self, obs_BO: Tensor, state_BS: Tensor, task_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Act one step in every episode.

        Args:
            obs_BO: raw observations, float32.
            state_BS: the states after the previous step, float32; zeros at the first step.
            task_B: tasks by their position among the stream's distinct ones, int64; only if `is_told`.

        Returns:
            actions `[B, A]` in [-1, 1], float32, and the new states.
        """
        steps_B, plan_B2 = state_BS[:, 0], state_BS[:, 1:STATE_HEAD].long()
        scaled_BO = self._scaled(obs_BO)
        if self.planner is not None:
            plan_B2 = torch.where((steps_B == 0).unsqueeze(1), self.planner(obs_BO, scaled_BO), plan_B2)
            task_B = torch.where(steps_B < FIRST_STEPS, plan_B2[:, 0], plan_B2[:, 1])
        window_BX = torch.cat([state_BS[:, STATE_HEAD:], obs_BO], 1)
        window_BLO = window_BX.view(-1, self._context, self.observation_size)
        # The window is full on the right, and steps of before the episode lie on the left.
        num_absent_B1 = (self._context - 1 - steps_B).clamp(min=0).long().unsqueeze(1)
        index_L = torch.arange(self._context, device=obs_BO.device)
        position_BL = (index_L - num_absent_B1).clamp(min=0)
        x_BLD = self.embed(self._scaled(window_BLO)) + F.embedding(position_BL, self.position_LD)
        if task_B is not None:
            x_BLD = x_BLD + F.embedding(task_B, self.task_KD).unsqueeze(1)
        # A step sees itself, also where it is absent, so that no row of the mask is empty.
        earlier_LL, itself_LL = index_L <= index_L.unsqueeze(1), index_L == index_L.unsqueeze(1)
        visible_BLL = (earlier_LL & (index_L >= num_absent_B1).unsqueeze(1)) | itself_LL
        layers = zip(self.attention_norms, self.attentions, self.moe_norms, self.experts, strict=True)
        for attention_norm, attention, moe_norm, experts in layers:
            x_BLD = x_BLD + attention(attention_norm(x_BLD), visible_BLL)
            x_BLD = x_BLD + experts(moe_norm(x_BLD), task_B)
        mean_BA = self.head(self.norm(x_BLD[:, -1]))[:, : self._action_size]
        history_BX = window_BX[:, self.observation_size :]
        next_state_BS = torch.cat([steps_B.unsqueeze(1) + 1.0, plan_B2.float(), history_BX], 1)
        return mean_BA.clamp(-ACTION_CLIP, ACTION_CLIP).float(), next_state_BS

    def _scaled(self, obs: Tensor) -> Tensor:
        return (obs.to(self.obs_centre.dtype) - self.obs_centre) / self.obs_scale


class _Planner(nn.Module):
    """The belief about the task given a first observation, as `Student.log_belief`, and the plan."""

    never_K: Tensor
    mean_KO: Tensor
    scale_KO: Tensor
    dof_K1: Tensor
    weight_K: Tensor
    bias_K: Tensor
    prototypes_KZ: Tensor
    success_PK: Tensor
    tasks_P2: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        config, known_K, density = student.config, student.known_K, student.density
        # A student that knows no task yet has a uniform belief.
        is_known_K = known_K if (has_evidence := bool(known_K.any())) else torch.ones_like(known_K)
        self.register_buffer("never_K", torch.where(is_known_K, 0.0, NEVER).double())
        self._uses_density = has_evidence and config.belief != "embedding" and bool(density.num_K[known_K].all())
        self._uses_embedding = has_evidence and config.belief != "density"
        num_K1 = density.num_K.unsqueeze(1).double().clamp(min=1.0)
        dof_K1 = (num_K1 - 1.0).clamp(min=1.0)
        scale_KO = density.std_KO * (1.0 + 1.0 / num_K1).sqrt()
        bias_KO = torch.distributions.StudentT(dof_K1, 0.0, scale_KO).log_prob(torch.zeros(()))  # type: ignore[no-untyped-call]
        has_density_K = (density.num_K > 0) / DENSITY_TEMPERATURE
        self.register_buffer("mean_KO", density.mean_KO)
        seen_O = student.obs_scale.isfinite()
        self.register_buffer("scale_KO", scale_KO.where(seen_O, math.inf))
        self.register_buffer("dof_K1", dof_K1)
        self.register_buffer("weight_K", has_density_K * (dof_K1.squeeze(1) + 1.0) / 2)
        self.register_buffer("bias_K", has_density_K * bias_KO.where(seen_O, 0.0).sum(1))
        self.encoder = student.encoder
        self.register_buffer("prototypes_KZ", student.prototypes_KZ)
        plans = student.plans
        self._follows_belief = config.act == "most_likely"
        num_plans = len(plans.tasks_P2) if config.act == "hedged" else student.num_tasks
        self.register_buffer("success_PK", plans.success_PK[:num_plans])
        self.register_buffer("tasks_P2", plans.tasks_P2[:num_plans])

    def forward(self, obs_BO: Tensor, scaled_BO: Tensor) -> Tensor:
        """The plans `[B, 2]` in episodes with these first observations, raw and scaled."""
        evidence_BK = self.never_K.expand(obs_BO.shape[0], -1)
        if self._uses_density:
            t_BKO = (obs_BO.double().unsqueeze(1) - self.mean_KO) / self.scale_KO
            decay_BK = (t_BKO.square() / self.dof_K1).log1p().sum(-1)
            evidence_BK = evidence_BK + self.bias_K - self.weight_K * decay_BK
        if self._uses_embedding:
            assert self.encoder is not None
            hidden = _gelu(self.encoder.hidden(scaled_BO))
            z_BZ = F.normalize(self.encoder.linear(scaled_BO) + self.encoder.out(hidden), dim=-1)
            similarity_BK = z_BZ @ self.prototypes_KZ.t()
            evidence_BK = evidence_BK + similarity_BK.double() / TEMPERATURE
        belief_BK = evidence_BK.softmax(1)
        if self._follows_belief:
            return belief_BK.argmax(1, keepdim=True).expand(-1, 2)
        tie_BP = F.pad(TIE_BREAK * belief_BK, (0, len(self.tasks_P2) - belief_BK.shape[1]))
        return self.tasks_P2.index_select(0, (belief_BK @ self.success_PK.t() + tie_BP).argmax(1))


class _Attention(nn.Module):
    """Multi-head attention among the steps that `visible` names."""

    def __init__(self, attention: CausalSelfAttention) -> None:
        super().__init__()
        self._num_heads = attention.num_heads
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x_BLD: Tensor, visible_BLL: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        _, length, width = x_BLD.shape
        if length == 1:  # a single key gets all the attention
            alone: Tensor = self.out(F.linear(x_BLD, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :]))
            return alone
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self._num_heads, width // self._num_heads))
        q_BHLd, k_BHLd, v_BHLd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores_BHLL = q_BHLd @ k_BHLd.transpose(-1, -2) / math.sqrt(width // self._num_heads)
        weights_BHLL = scores_BHLL.masked_fill(~visible_BLL.unsqueeze(1), -math.inf).softmax(-1)
        out: Tensor = self.out((weights_BHLL @ v_BHLd).transpose(1, 2).flatten(2))
        return out


class _Experts(nn.Module):
    """A mixture of experts, in which the experts of an episode's group take one dense product each way.

    Stacks are padded to C experts per group, so that shapes do not depend on the group.
    """

    up_GXD: Tensor
    down_GXD: Tensor
    router_GCD: Tensor
    offset_GC: Tensor
    group_K: Tensor

    def __init__(self, moe: MoE, group_K: Tensor | None) -> None:
        """`group_K` are the groups of tasks; None if all tasks share all experts."""
        super().__init__()
        groups: Sequence[slice] = [slice(0, moe.num_open)] if group_K is None else moe.groups
        size = max(group.stop - group.start for group in groups)
        self._top_k = moe.top_k

        def padded(stack: Tensor, value: float = 0.0) -> Tensor:
            rows = [stack.detach()[group] for group in groups]
            padding = [row.new_full((size - len(row), *row.shape[1:]), value) for row in rows]
            return torch.stack([torch.cat(pair) for pair in zip(rows, padding, strict=True)])

        self.register_buffer("up_GXD", padded(moe.up.stack).flatten(1, 2))
        self.register_buffer("down_GXD", padded(moe.down.stack).flatten(1, 2))
        self.register_buffer("router_GCD", padded(moe.router.stack))
        self.register_buffer("offset_GC", padded(moe.logit_offset, -math.inf))
        self.register_buffer("group_K", torch.zeros(1, dtype=torch.int64) if group_K is None else group_K)

    def forward(self, x_BLD: Tensor, task_B: Tensor | None) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        # One group for all episodes, or each episode's own.
        group = self.group_K if task_B is None else self.group_K.index_select(0, task_B)
        hidden_BLX = _gelu(x_BLD @ self.up_GXD.index_select(0, group).transpose(1, 2))
        size = self.offset_GC.shape[1]
        if size > 1:
            logits_BLC = x_BLD @ self.router_GCD.index_select(0, group).transpose(1, 2)
            logits_BLC = logits_BLC + self.offset_GC.index_select(0, group).unsqueeze(1)
            if self._top_k < size:
                top_BLk, chosen_BLk = logits_BLC.topk(self._top_k, dim=-1)
                logits_BLC = torch.full_like(logits_BLC, -math.inf).scatter(-1, chosen_BLk, top_BLk)
            gates_BLC1 = logits_BLC.softmax(-1).unsqueeze(-1)
            hidden_BLX = (hidden_BLX.view(*x_BLD.shape[:2], size, -1) * gates_BLC1).flatten(-2)
        return hidden_BLX @ self.down_GXD.index_select(0, group)


def _gelu(x: Tensor) -> Tensor:
    """The exact GELU. onnxruntime computes the error function in float32 only, which is exact to 1e-7."""
    if x.dtype == torch.float32:
        return F.gelu(x)
    return x * (1.0 + (x / math.sqrt(2.0)).float().erf().to(x.dtype)) / 2.0
