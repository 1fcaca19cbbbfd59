"""Publishing of students beside the results that measure them.

students/<method>-seed-<n>/
  policy.safetensors   the weights after the last stage
  policy.json          describes them, and how they act
  README.md            the model card
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpd.evaluation.results_folder import TEACHER, Tables
from cpd.evaluation.student_measures import Rate
from cpd.programs import ROOT
from cpd.reading import read_json
from cpd.run.claim import check_none_lost
from cpd.run.descriptions import StudentSize, Weights, check_identity
from cpd.run.directory import Run, RunError, StudentElement, identity, matches, published_student
from cpd.run.files import write_text
from cpd.run.model_card import example, suite_title, tags_of
from cpd.run.tables import EvaluationRow
from cpd.run.weights import copy_policy, described_weights

CARD = """\
---
license: mit
tags: [{tags}, continual-learning, policy-distillation]
---

# {method}, seed {seed}: one policy for {num_tasks} tasks of {suite}

A mixture-of-experts student of the experiment {name}, distilled from one RL teacher for each task. {telling}

| task | {measure} | 95 % interval | teacher |
|---|---:|---|---:|
{success}

Episodes on {goals} goals of {horizon} steps; success counts at any of them.{returns} Actions are deterministic.

| | |
|---|---|
{facts}

## Use

With this project and its extra `train` installed:

```python
{example}```

`policy.reset([task])` begins the next episode. `policy.json` says step by step how the student acts, for those
who load `policy.safetensors` without this code; loading checks the weights by the hash that it holds.

## Limits

The student was trained and measured in simulation only. It knows these tasks and no others: on another task it
acts for the most similar one.

## License

MIT.
"""
#: Of tasks without a success measure.
RETURNS = (
    " Tasks without a success measure have the mean normalised return: "
    "0 is that of a random policy, 1 a reference."
)
#: What a student knows of the task when it acts, by its label.
TELLING = {
    "inferred": "It is told nothing: it infers the task from the first observation of an episode.",
    "none": "It is told nothing, and acts on the present observations alone.",
}


def publish_students(run: Run | None, tables: Tables, folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Copy finished and evaluated students of a run, after their last stage, to `folder`, with a model card each.

    Args:
        run: where they are; None publishes none.
        tables: the results of the run.
        folder: published results; students that it holds from before must be among these.
        names: students, or folders of students, such as `students/ewc`; default: the first method's first seed.

    Returns:
        The files of weights.

    Raises:
        RunError: if a student that is published would be lost, or if no such student is finished and evaluated.
        DamagedFileError: if a file of a student is not what its description says.
    """
    chosen = [] if run is None else _chosen(run, names)
    students = {student: rows for student in chosen if (rows := final_rows(student.method, student.seed, tables))}
    if names and not students:
        raise RunError(f"{run.root if run else folder} has no finished and evaluated student {', '.join(names)}")
    targets = {student: published_student(folder, student.method, student.seed) for student in students}
    check_none_lost(
        folder,
        [f"students/{path.name}" for path in folder.glob("students/*")],
        [f"students/{target.parent.name}" for target in targets.values()],
        "name the run that has them, or choose another folder",
    )
    weights = {student: _checked_weights(student) for student in students}
    for student, target in targets.items():
        copy_policy(weights[student], target)
        write_text(target.with_name("README.md"), _card(student, target, tables, students[student]))
    return list(targets.values())


def _chosen(run: Run, names: Sequence[str]) -> list[StudentElement]:
    first = (run.config.methods[0], run.config.seeds[0])
    return [
        student
        for student in run.students()
        if student.finished
        and student.final_policy is not None
        and (any(matches(student, name) for name in names) if names else (student.method, student.seed) == first)
    ]


def final_rows(method: str, seed: int, tables: Tables) -> dict[str, EvaluationRow]:
    """Return the rows of a student after its last stage, by task; empty if it is not evaluated."""
    own = [row for row in tables.evaluations if (row.method, row.seed) == (method, seed)]
    last = max((row.stage for row in own if row.stage is not None), default=None)
    return {row.task: row for row in own if row.stage == last and row.goal_set == tables.goal_set}


def _checked_weights(student: StudentElement) -> Path:
    """Return the final weights, after checking that they are this student's and what their description says."""
    weights = student.final_policy
    assert weights is not None
    check_identity(weights.with_suffix(".json"), **identity(student.config, student))
    described_weights(weights)
    return weights


def _card(student: StudentElement, target: Path, tables: Tables, rows: dict[str, EvaluationRow]) -> str:
    """Return the model card."""
    description = read_json(target.with_suffix(".json"), StudentSize)
    labels, parent = description["labels"].as_dict(), target.parent.resolve()
    teacher_seed = tables.teacher_seed(student.seed)
    teachers = {
        row.task: Rate.of(row.total, row.episodes)
        for row in tables.evaluations
        if (row.method, row.seed, row.goal_set) == (TEACHER, teacher_seed, tables.goal_set)
    }
    success = []
    for task in dict.fromkeys(tables.stream):
        if row := rows.get(task):
            rate, teacher = Rate.of(row.total, row.episodes), teachers.get(task)
            of_teacher = f"{100 * teacher.rate:.0f} %" if teacher else "–"
            count = f"{rate.successes} of" if row.normalised_return is None else "normalised return,"
            counts = f"{100 * rate.rate:.0f} % ({count} {rate.episodes})"
            # The interval is of counts.
            interval = f"{100 * rate.low:.0f} to {100 * rate.high:.0f}" if row.normalised_return is None else "–"
            success.append(f"| {task} | {counts} | {interval} | {of_teacher} |")
    mean = sum(row.total / row.episodes for row in rows.values()) / len(rows)
    success.append(f"| **mean** | **{100 * mean:.1f} %** | | |")
    facts: dict[str, Any] = {
        "method": f"{student.method} (`distill.protocol` {student.config.distill.protocol})",
        "student seed": student.seed,
        "teachers": f"recipe {labels.pop('teacher_recipe')}, seed {teacher_seed}",
        "stages": len(tables.stream),
        "parameters": f"{description['num_parameters']:,}",
        "experts per layer": description["num_experts"],
        "stored time steps": f"{description['memory_steps']:,}",
        "size": f"{target.stat().st_size / 1e6:.1f} MB",
        **{name.replace("_", " "): value for name, value in labels.items()},
        "SHA-256": read_json(target.with_suffix(".json"), Weights)["sha256"],
    }
    has_returns = any(row.normalised_return is not None for row in rows.values())
    suite = student.config.stream.suite
    place = (parent.relative_to(ROOT) if parent.is_relative_to(ROOT) else Path(parent.name)).as_posix()
    code = example(
        suite,
        next(iter(rows)),
        labels["horizon"],
        imports="from cpd.student.actor import load_actor",
        policy=f'load_actor("{place}")',
    )
    return CARD.format(
        tags=", ".join(tags_of(suite)),
        suite=suite_title(suite),
        method=student.method,
        seed=student.seed,
        name=student.config.name,
        num_tasks=len(rows),
        telling=TELLING.get(labels["task_identity"], "It is told the task of each episode."),
        success="\n".join(success),
        measure="success or normalised return" if has_returns else "success",
        returns=RETURNS if has_returns else "",
        goals=tables.goal_set.replace("_", "-"),
        horizon=labels["horizon"],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        example=code,
    )
