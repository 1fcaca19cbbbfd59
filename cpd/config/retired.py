"""Settings of earlier versions that were replaced by constants or renamed.

Run directories, published folders and recipes that contain them still load: `upgrade` drops a retired setting that
equals the constant, and moves a renamed one. `load` refuses a retired setting with any other value.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

#: Retired settings by dotted path, with the constant that replaced them.
RETIRED: Final[dict[str, Any]] = {
    "torch_threads": 1,
    "teacher.learner": "ppo",
    "stream.reward_version": "v2",
    "rollouts.noise_hold": 8,
    "rollouts.assumed_std": 0.1,
    "student.embedding_size": 32,
    "student.embedding_width": 128,
    "student.embedding_temperature": 0.1,
    "student.belief_decay": 0.9,
    "student.min_log_std": -3.0,
    "student.max_log_std": 0.5,
    "memory.dpp_candidates": 2_000,
    "protection.fisher_windows": 256,
    "distill.contrast_batch_size": 256,
    "distill.contrast_noise": 0.1,
    "distill.final_lr_share": 0.1,
    "teacher.ppo.max_log_std": 0.5,
    "teacher.ppo.mean_penalty": 0.01,
    "teacher.validate_from": 0.5,
    "teacher.warm_start.batch_size": 256,
    "teacher.warm_start.burst_every": 25,
    "teacher.warm_start.burst_scale": 0.6,
    "teacher.warm_start.burst_steps": 8,
    "teacher.warm_start.critic_iterations": 2,
    "teacher.warm_start.learning_rate": 1e-3,
    "teacher.warm_start.light_scale": 0.1,
    "teacher.warm_start.light_share": 0.25,
    "teacher.warm_start.num_cloning_steps": 1_000,
    "teacher.warm_start.num_dagger_episodes": 20,
    "teacher.warm_start.steps_after_success": 30,
    "teacher.warm_start.steps_per_check": 200,
}
#: Dropped with any value: a table without effect for the values in `RETIRED`, and a setting that never affected
#: results.
IGNORED: Final[tuple[str, ...]] = ("teacher.sac", "logging.agree_every")
#: Renamed settings: old path -> new path.
RENAMED: Final[dict[str, str]] = {
    "protection.ewc_strength": "protection.strength",
    "teacher.exploring_rate": "teacher.exploration.step_rate",
    "teacher.exploring_share": "teacher.exploration.start_share",
    "teacher.exploring_steps": "teacher.exploration.max_steps",
    "teacher.exploring_until": "teacher.exploration.stop_at_success",
    "teacher.ppo.exploring_min_log_std": "teacher.exploration.min_log_std",
}
#: Like `RENAMED`, for settings that had an effect with `teacher.recipe = "demo_rl"` only. There they overrule the
#: new path, which had none; with other recipes they are dropped.
RENAMED_FOR_DEMO_RL: Final[dict[str, str]] = {
    f"teacher.warm_start.rl_{name}": f"teacher.ppo.{name}"
    for name in ("hidden_sizes", "init_log_std", "learning_rate", "target_kl")
}

_MISSING: Final = object()


def upgrade(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the tables of a configuration of any version, complete or partial, to the settings of this version.

    Values that are not tables stay unchanged; `load` refuses them.
    """
    upgraded = _upgrade_settings(tables)
    if isinstance(variants := _get(upgraded, "variants"), dict):
        upgraded["variants"] = {label: _upgrade_settings(changed) for label, changed in variants.items()}
    return upgraded


def explain(path: str) -> str:
    """Explain why the setting at `path` no longer exists; empty if it never did."""
    parts = path.split(".")
    name = ".".join(parts[2:] if parts[0] == "variants" else parts)
    if name in RETIRED:
        reason = "SAC was removed" if name == "teacher.learner" else "retired"
        return f"{reason}: its value is now always {RETIRED[name]!r}; remove it"
    new = RENAMED.get(name) or RENAMED_FOR_DEMO_RL.get(name)
    return f"renamed to {new}; set that one only" if new else ""


def _upgrade_settings(tables: Any) -> dict[str, Any]:
    upgraded: dict[str, Any] = deepcopy(tables)
    for path, value in RETIRED.items():
        if _get(upgraded, path) == value:
            _remove(upgraded, path)
    for path in IGNORED:
        _remove(upgraded, path)
    for old, new in RENAMED.items():
        # With two different values it is unclear which one is meant: `load` refuses the old name.
        if (value := _get(upgraded, old)) is not _MISSING and _get(upgraded, new) in (_MISSING, value):
            _remove(upgraded, old)
            _set(upgraded, new, value)
    recipe = _get(upgraded, "teacher.recipe")
    for old, new in RENAMED_FOR_DEMO_RL.items():
        # Partial tables without a recipe are upgraded again after they were merged into complete ones.
        if recipe is not _MISSING and (value := _get(upgraded, old)) is not _MISSING:
            _remove(upgraded, old)
            if recipe == "demo_rl":
                _set(upgraded, new, value)
    return upgraded


def holds(tables: Any, path: str) -> bool:
    """Whether nested tables have an entry at a dotted path."""
    return _get(tables, path) is not _MISSING


def _get(tables: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(tables, dict) or key not in tables:
            return _MISSING
        tables = tables[key]
    return tables


def _remove(tables: dict[str, Any], path: str) -> None:
    """Remove the entry at `path`, if it exists, and the tables that become empty."""
    if not holds(tables, path):
        return
    key, _, rest = path.partition(".")
    if rest:
        _remove(tables[key], rest)
    if not rest or not tables[key]:
        del tables[key]


def _set(tables: dict[str, Any], path: str, value: Any) -> None:
    """Set the entry at `path`, unless the path leads through a value that is not a table."""
    *sections, key = path.split(".")
    table: Any = tables
    for section in sections:
        table = table.setdefault(section, {}) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table[key] = value
