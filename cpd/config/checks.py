"""Checks between the settings of a method: contradictions, and settings without effect."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from cpd.config.student import MethodConfig
from cpd.config.types import is_given

#: (setting, setting that it depends on, values of the latter with which the former has an effect).
NEEDS: Final = (
    ("protection.mask_experts", "protection.kind", ("mask",)),
    ("protection.mask_fraction", "protection.kind", ("mask",)),
    ("protection.mask_mode", "protection.kind", ("mask",)),
    ("protection.strength", "protection.kind", ("ewc", "mas", "l2", "derpp", "lwf", "hat")),
    ("protection.agem_windows", "protection.kind", ("agem",)),
    ("protection.packnet_retrain_share", "protection.kind", ("packnet",)),
    ("protection.lora_rank", "protection.kind", ("lora",)),
    ("memory.share", "memory.selection", ("reservoir", "uniform", "dpp")),
    ("memory.start_share", "memory.selection", ("uniform", "dpp")),
    ("student.experts_per_task", "student.expansion", ("per_task", "on_demand")),
    ("student.demand_threshold", "student.expansion", ("on_demand",)),
    ("student.new_experts", "student.expansion", ("per_task", "on_demand")),
    ("student.belief", "student.task_identity", ("inferred",)),
    ("student.act", "student.task_identity", ("inferred",)),
    ("distill.contrast_coef", "student.task_identity", ("inferred", "given")),
    ("distill.contrast_coef", "student.belief", ("embedding", "both")),
)


def contradictions(method: MethodConfig, num_tasks: int) -> list[str]:
    """Return one line, which begins with a path, for each contradiction on `num_tasks` tasks."""
    student, kind = method.student, method.protection.kind
    lines = []
    if kind == "agem" and method.memory.selection == "none":
        lines.append("memory.selection: protection.kind = 'agem' needs a memory; choose another value than 'none'")
    if kind == "agem" and method.distill.replay_share:
        lines.append(
            "distill.replay_share: protection.kind = 'agem' compares the gradient of new data with that of the "
            "memory, so a batch must not contain rows of the memory; set it to 0"
        )
    if kind in ("derpp", "bc"):
        is_set = {
            "memory.selection": method.memory.selection != "none",
            "distill.replay_share": method.distill.replay_share > 0.0,
            "distill.rehearsal": not method.distill.rehearsal,
        }
        lines += [
            f"{path}: protection.kind = {kind!r} replays stored steps with stored labels; set memory.selection, a "
            "distill.replay_share above 0, and distill.rehearsal = false"
            for path in is_set
            if method.distill.protocol == "continual" and not is_set[path]
        ]
    if method.protection.needs_task:
        reasons = {
            "memory.selection": "replayed rows would train weights that their tasks never use",
            "student.expansion": "tasks divide or change a network of fixed size",
            "student.task_identity": "the weights of a task already identify the task",
        }
        lines += [
            f"{path}: protection.kind = {kind!r} needs 'none': {reason}"
            for path, reason in reasons.items()
            if attrgetter(path)(method) != "none"
        ]
    if method.distill.protocol == "isolated" and student.task_identity != "none":
        lines.append(
            "student.task_identity: distill.protocol = 'isolated' needs 'none', since each task has its network"
        )
    # Without a task identity, a task that adds no experts has no parameters of its own.
    if _freezes_shared(method, num_tasks) and student.task_identity == "none" and student.expansion != "per_task":
        lines.append(
            f"student.expansion: {student.expansion!r} with student.task_identity = 'none' can leave a task "
            "nothing to train, since all parameters of earlier tasks are frozen; set student.expansion = "
            "'per_task', protection.mask_fraction below 1, or protection.mask_experts = false"
        )
    return lines


def without_effect(method: MethodConfig, num_tasks: int) -> list[str]:
    """Return one line, which begins with a path, for each setting without effect on `num_tasks` tasks."""
    return [
        *_check_protocol(method),
        *_check_needs(method),
        *_check_experts(method),
        *_check_memory(method, num_tasks),
    ]


def _check_protocol(method: MethodConfig) -> list[str]:
    """The joint and single-task bounds have no memory, no protection and no expansion."""
    if method.distill.protocol == "continual":
        return []
    default = MethodConfig()
    # A recipe may leave these at their defaults, or set them to "none" explicitly.
    is_set = {
        "memory.selection": method.memory != default.memory and method.memory.selection != "none",
        "protection.kind": method.protection.kind not in (default.protection.kind, "none"),
        "student.expansion": method.student.expansion not in (default.student.expansion, "none"),
        "distill.replay_share": method.distill.replay_share > 0,
    }
    return [
        f"{path} has no effect: distill.protocol is {method.distill.protocol!r}" for path in is_set if is_set[path]
    ]


def _check_needs(method: MethodConfig) -> list[str]:
    lines = []
    for path, chooser, values in NEEDS:
        section, name = path.split(".")
        chosen = attrgetter(chooser)(method)
        if chosen not in values and is_given(getattr(method, section), name):
            lines.append(f"{path} has no effect: {chooser} is {chosen!r}")
    protection = method.protection
    if protection.kind == "mask" and not protection.needs_importance and is_given(protection, "mask_mode"):
        # Either all shared parameters are frozen or none: their importance is never estimated.
        lines.append(
            f"protection.mask_mode has no effect: protection.mask_fraction is {protection.mask_fraction:g}"
        )
    return lines


def _check_experts(method: MethodConfig) -> list[str]:
    student = method.student
    expands, shares_experts = student.expansion != "none", student.task_identity == "none"
    lines = []
    if not shares_experts and is_given(student, "opening_steps"):
        # The tokens of a new task see its own experts only, which do not compete with older ones.
        lines.append("student.opening_steps has no effect: each task uses only its own experts")
    if student.context == 1 and is_given(student, "num_heads"):
        lines.append("student.num_heads has no effect: student.context is 1, so attention sees one observation")
    # Experts that a token can choose from: one group that grows, or one group per task.
    group_sizes = [student.num_experts, *([student.experts_per_task] if expands else [])]
    grows = expands and shares_experts
    # With one expert per token, the gate is a softmax over one logit: always 1, and without gradient. That does
    # not matter where every group has a single expert, as in a dense student.
    if student.top_k == 1 and (grows or max(group_sizes) > 1):
        lines.append("student.top_k = 1 leaves the router untrained: the gate of a single expert is always 1")
    if not grows and max(group_sizes) <= student.top_k and is_given(method.distill, "load_balance_coef"):
        lines.append("distill.load_balance_coef has no effect: no group has more than student.top_k experts")
    return lines


def _check_memory(method: MethodConfig, num_tasks: int) -> list[str]:
    distill, selection, student = method.distill, method.memory.selection, method.student
    identity = student.task_identity
    freezes_shared = _freezes_shared(method, num_tasks)
    lines = []
    if distill.replay_share and selection == "none":
        lines.append("distill.replay_share has no effect: memory.selection is 'none'")
    elif distill.replay_share and freezes_shared and identity != "none":
        # Replayed rows replace rows of the new task, and their gradient is masked entirely.
        lines.append("distill.replay_share trains nothing: all parameters of earlier tasks are frozen")
    if freezes_shared and method.student.expansion == "none":
        lines.append(
            "student.expansion = 'none' leaves only the task vector of a new task to train: all parameters of the "
            "first task are frozen; set protection.mask_fraction below 1, or protection.mask_experts = false"
        )
    if distill.rehearsal and not distill.replay_share:
        lines.append("distill.rehearsal has no effect: distill.replay_share is 0")
    has_memory = distill.protocol == "continual" and selection != "none"
    # Replay, A-GEM, the task embedding and the search for tasks that the belief confuses read the memory.
    uses_embedding = identity == "given" or (identity == "inferred" and student.belief != "density")
    measures_plans = identity == "inferred" and student.act != "most_likely"
    agem = method.protection.kind == "agem"
    if measures_plans and not has_memory and is_given(student, "act"):
        lines.append("student.act has no effect: no memory tells which tasks the belief confuses")
    if has_memory and not (distill.replay_share or agem or uses_embedding or measures_plans):
        lines.append(
            "memory.selection has no effect: nothing reads the memory; set it to 'none', or distill.replay_share "
            "above 0"
        )
    return lines


def _freezes_shared(method: MethodConfig, num_tasks: int) -> bool:
    """Whether a task after the first trains nothing but its own experts and task vector."""
    protection = method.protection
    masks = method.distill.protocol == "continual" and num_tasks > 1 and protection.kind == "mask"
    return masks and protection.mask_experts and protection.mask_fraction == 1.0
