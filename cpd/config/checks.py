"""What settings of a method mean for each other: which cannot stand together, and which have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cpd.config.student import MemoryConfig, ProtectionConfig, StudentConfig

if TYPE_CHECKING:
    from cpd.config.experiment import MethodConfig

#: The kinds of protection that look at each of its settings.
PROTECTION_SETTINGS: Final = {
    "fisher_windows": ("mask", "ewc"),
    "mask_experts": ("mask",),
    "mask_fraction": ("mask",),
    "mask_mode": ("mask",),
    "ewc_strength": ("ewc",),
    "agem_windows": ("agem",),
    "packnet_retrain_share": ("packnet",),
}


def contradictions(config: MethodConfig) -> list[str]:
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
    return found


def without_effect(config: MethodConfig) -> list[str]:
    """Settings that are given but have no effect; each line begins with a setting's dotted path."""
    found, protection = [], config.protection
    if config.distill.protocol != "continual":
        defaults = MemoryConfig(), ProtectionConfig(), StudentConfig()
        given = {
            "memory.selection": config.memory != defaults[0] and config.memory.selection != "none",
            "protection.kind": protection.kind not in (defaults[1].kind, "none"),
            "student.expansion": config.student.expansion not in (defaults[2].expansion, "none"),
        }
        found += [
            f"{key} has no effect: distill.protocol is {config.distill.protocol!r}"
            for key, is_given in given.items()
            if is_given
        ]
    for name, kinds in PROTECTION_SETTINGS.items():
        if protection.kind not in kinds and getattr(protection, name) != getattr(ProtectionConfig(), name):
            found.append(f"protection.{name} has no effect: protection.kind is {protection.kind!r}")
    distill = config.distill
    everything_masked = protection.kind == "mask" and protection.mask_experts and protection.mask_fraction == 1.0
    if distill.replay_share and everything_masked and config.student.task_identity != "none":
        found.append("distill.replay_share has no effect: all that earlier tasks use is masked")
    if distill.rehearsal and not distill.replay_share:
        found.append("distill.rehearsal has no effect: distill.replay_share is 0")
    return found
