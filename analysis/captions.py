"""The sentences of captions that hold for all figures: the conditions of the results."""

from __future__ import annotations

import numpy as np

from analysis.dataset import Dataset, short

RECIPES = {
    "rl": "reinforcement learning from scratch",
    "demo_rl": "reinforcement learning from a capped warm start on demonstrations",
    "scripted": "scripted experts as stand-ins",
}


def conditions(data: Dataset, method: str | None = None) -> str:
    """Describe the conditions of all results, or of one method's, for captions and the notes of tables."""
    labels = data.labels
    recipe = "/".join(RECIPES.get(name, name) for name in labels["teacher_recipe"].split("/"))
    seeds = ", ".join(map(str, dict.fromkeys(s.seed for s in data.students))) or "none"
    teacher_seeds = ", ".join(map(str, sorted({seed for _, seed in data.teacher_rates}))) or "none"
    return (
        f"Teachers: {recipe} (recipe {labels['teacher_recipe']}), seeds {teacher_seeds}. Student seeds {seeds}; "
        f"task identity: {task_identity(data, method)}. Horizon {labels['horizon']} steps; "
        f"{versions(labels)}. "
        f"Deterministic policies on {data.goals} goals; success is the flag at any step. "
        f"{returns(data)}{episodes_per_cell(data)}"
    )


def returns(data: Dataset) -> str:
    """Say which tasks have no success measure, and what is shown for them; empty if all have one."""
    if not data.returned:
        return ""
    return (
        f"Without a success measure, hence by normalised return (0: a random policy, 1: the reference return of "
        f"evaluations.csv): {', '.join(map(short, data.returned))}. "
    )


def versions(labels: dict[str, str]) -> str:
    """Return the versions of the simulator and of the reward, or the suite with its versions."""
    if suite := labels.get("suite"):
        return f"Suite {suite}" + (f" ({labels['suite_versions']})" if "suite_versions" in labels else "")
    return f"Meta-World {labels['metaworld']}, MuJoCo {labels['mujoco']}, reward {labels['reward_version']}"


def look_alikes(data: Dataset) -> str:
    """List the tasks that look like others at the start of an episode, with the shares of episodes."""
    return ", ".join(
        f"{short(task)} ({', '.join(f'{100 * share:.0f} % {short(other)}' for other, share in others.items())})"
        for task, others in data.look_alikes.items()
    )


def short_conditions(data: Dataset, method: str | None = None) -> str:
    """Return the most important conditions, of one method or of all, for the margin of a figure."""
    recipe, horizon = data.labels["teacher_recipe"], data.labels["horizon"]
    return f"teachers: {recipe}   T = {horizon}   task identity: {task_identity(data, method)}"


def task_identity(data: Dataset, method: str | None) -> str:
    """Return how the students of one method, or of all methods, know the task."""
    methods = [method] if method else data.task_identities
    return "/".join(dict.fromkeys(data.task_identities[name] for name in methods)) or "no students"


def episodes_per_cell(data: Dataset) -> str:
    """Describe how many episodes each cell of the success matrix has."""
    full_counts: set[int] = set()
    brief_counts: set[int] = set()
    for student in data.students:
        episodes = student.matrix.episodes
        full = np.zeros_like(episodes, bool)
        for stage, task in enumerate(student.matrix.stream):
            full[stage + 1, student.matrix.tasks.index(task)] = True
        if student.measures.final_stage is not None:
            full[student.measures.final_stage + 1] = True
        full_counts |= set(episodes[full & (episodes > 0)].tolist())
        brief_counts |= set(episodes[~full & (episodes > 0)].tolist())
    teachers = {rate.episodes for rate in data.teacher_rates.values()}

    def span(counts: set[int]) -> str:
        return "–".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "no"

    return (
        f"Episodes per cell: {span(full_counts)} on the diagonal and in the final row, "
        f"{span(brief_counts)} elsewhere, {span(teachers)} for teachers."
    )
