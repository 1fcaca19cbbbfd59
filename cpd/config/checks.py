"""What settings of a method mean for each other: which cannot stand together, and which have no effect."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final

from cpd.config.student import MemoryConfig, ProtectionConfig, StudentConfig
from cpd.config.types import is_given

if TYPE_CHECKING:
    from cpd.config.experiment import Config

#: A setting, the setting by which it has an effect, and the values with which it has.
NEEDS: Final = (
    ("protection.fisher_windows", "protection.kind", ("mask", "ewc")),
    ("protection.mask_experts", "protection.kind", ("mask",)),
    ("protection.mask_fraction", "protection.kind", ("mask",)),
    ("protection.mask_mode", "protection.kind", ("mask",)),
    ("protection.ewc_strength", "protection.kind", ("ewc",)),
    ("protection.agem_windows", "protection.kind", ("agem",)),
    ("protection.packnet_retrain_share", "protection.kind", ("packnet",)),
    ("memory.share", "memory.selection", ("reservoir", "uniform", "dpp")),
    ("memory.dpp_candidates", "memory.selection", ("dpp",)),
    ("memory.start_share", "memory.selection", ("uniform", "dpp")),
    ("student.experts_per_task", "student.expansion", ("per_task", "on_demand")),
    ("student.demand_threshold", "student.expansion", ("on_demand",)),
    ("student.embedding_size", "student.task_identity", ("inferred", "given")),
    ("student.embedding_width", "student.task_identity", ("inferred", "given")),
    ("student.embedding_temperature", "student.task_identity", ("inferred", "given")),
    ("student.belief_decay", "student.task_identity", ("inferred",)),
    ("distill.contrast_coef", "student.task_identity", ("inferred", "given")),
    ("distill.contrast_batch_size", "student.task_identity", ("inferred", "given")),
    ("distill.contrast_noise", "student.task_identity", ("inferred", "given")),
)


def contradictions(config: Config) -> list[str]:
    """Settings that cannot stand together, one line each, with what to do."""
    found = []
    if config.protection.kind == "agem":
        if config.memory.selection == "none":
            found.append("protection.kind = 'agem' needs a memory: choose another memory.selection than 'none'")
        if config.distill.replay_share:
            found.append(
                "protection.kind = 'agem' compares the batch's gradient with memory's, so that no row of it may "
                "come from memory: set distill.replay_share = 0"
            )
    if config.protection.kind == "packnet":
        wanted = (
            (
                "memory.selection",
                config.memory.selection,
                "rows of earlier tasks would train weights they never use",
            ),
            ("student.expansion", config.student.expansion, "it divides a network of fixed size"),
            ("student.task_identity", config.student.task_identity, "the task's mask tells the student the task"),
        )
        found += [
            f"protection.kind = 'packnet' needs {key} = 'none': {reason}"
            for key, value, reason in wanted
            if value != "none"
        ]
    student = config.student
    if _masks_everything(config) and student.task_identity == "none" and student.expansion != "per_task":
        found.append(
            f"student.expansion = {student.expansion!r} with student.task_identity = 'none': a task without "
            "experts of its own would have nothing to train, since all is masked that earlier tasks use; set "
            "protection.mask_fraction below 1, protection.mask_experts = false, or student.expansion = 'per_task'"
        )
    return found


def _masks_everything(config: Config) -> bool:
    """Whether a new task may train what is its own alone."""
    protection = config.protection
    return (
        config.distill.protocol == "continual"
        and len(config.stream.distinct_tasks) > 1
        and protection.kind == "mask"
        and protection.mask_experts
        and protection.mask_fraction == 1.0
    )


def _chooses_experts(student: StudentConfig) -> bool:
    """Whether tokens may ever have more experts to choose from than they take."""
    if student.expansion != "none" and student.task_identity == "none":
        return True
    sizes = [student.num_experts, *([] if student.expansion == "none" else [student.experts_per_task])]
    return max(sizes) > student.top_k


def _reads_memory(config: Config) -> bool:
    """Whether anything but its own choice reads what is stored."""
    tells_tasks = config.student.task_identity in ("inferred", "given")
    return config.distill.replay_share > 0 or config.protection.kind == "agem" or tells_tasks


def without_effect(config: Config) -> list[str]:
    """Settings that are given but have no effect; each line begins with a setting's dotted path."""
    found, protection = [], config.protection
    if config.distill.protocol != "continual":
        defaults = MemoryConfig(), ProtectionConfig(), StudentConfig()
        given = {
            "memory.selection": config.memory != defaults[0] and config.memory.selection != "none",
            "protection.kind": protection.kind not in (defaults[1].kind, "none"),
            "student.expansion": config.student.expansion not in (defaults[2].expansion, "none"),
            "distill.replay_share": config.distill.replay_share > 0,
        }
        found += [
            f"{key} has no effect: distill.protocol is {config.distill.protocol!r}"
            for key, is_there in given.items()
            if is_there
        ]
    for key, chooser, values in NEEDS:
        section, name = key.split(".")
        chosen = attrgetter(chooser)(config)
        if chosen not in values and is_given(getattr(config, section), name):
            found.append(f"{key} has no effect: {chooser} is {chosen!r}")
    if protection.kind == "mask" and not protection.needs_importance:
        found += [
            f"protection.{name} has no effect: protection.mask_fraction is {protection.mask_fraction:g}"
            for name in ("mask_mode", "fisher_windows")
            if is_given(protection, name)
        ]
    student = config.student
    if student.task_identity != "none" and is_given(student, "opening_steps"):
        found.append("student.opening_steps has no effect: experts are open to their own tasks alone")
    added_are_alone = student.task_identity != "none" and student.experts_per_task == 1
    if student.context == 1 and is_given(student, "num_heads"):
        found.append("student.num_heads has no effect: student.context is 1: attention sees one observation")
    if student.top_k == 1 and not (student.num_experts == 1 and (student.expansion == "none" or added_are_alone)):
        found.append("student.top_k = 1 leaves one expert a gate of 1: the loss trains no router; 2 or more do")
    if not _chooses_experts(student) and is_given(config.distill, "load_balance_coef"):
        found.append("distill.load_balance_coef has no effect: no group has more than student.top_k experts")
    distill = config.distill
    if distill.replay_share and config.memory.selection == "none":
        found.append("distill.replay_share has no effect: memory.selection is 'none'")
    elif distill.replay_share and _masks_everything(config) and config.student.task_identity != "none":
        found.append(
            "distill.replay_share takes rows from the present task and gives them to none: all that earlier tasks "
            "use is masked"
        )
    if _masks_everything(config) and config.student.expansion == "none":
        found.append(
            "student.expansion = 'none' leaves a new task's policy nothing but its task vector to train: all "
            "is masked that the first task uses; protection.mask_fraction below 1, or protection.mask_experts = "
            "false, lets more of it move"
        )
    if distill.rehearsal and not distill.replay_share:
        found.append("distill.rehearsal has no effect: distill.replay_share is 0")
    if distill.protocol == "continual" and config.memory.selection != "none" and not _reads_memory(config):
        found.append(
            "memory.selection has no effect: nothing reads the memory; set distill.replay_share above 0, or "
            "memory.selection = 'none'"
        )
    return found
