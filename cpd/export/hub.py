"""Policies as folders for a model hub: weights, their description, and a model card. Nothing is uploaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from cpd.envs.suite import DEFAULT_SUITE
from cpd.export.sources import PolicyFile, policy_files
from cpd.reading import read_json
from cpd.run.directory import Run
from cpd.run.files import atomic_folder, write_text
from cpd.run.folders import kind_of
from cpd.run.model_card import example, tags_of
from cpd.run.table_files import find_table
from cpd.run.tables import EvaluationRow, read_rows
from cpd.run.weights import copy_policy

CARD: Final = """\
---
{front_matter}
---

# {title}

{summary}

`policy.safetensors` holds the weights. `policy.json` describes them and everything that acting takes.

```python
{example}```

It needs `pip install 'continual-policy-distillation[train]'`.

## Success on held-out goals

{results}

## Conditions

The policy was trained and measured in simulation only.

{conditions}
"""
TEACHER: Final = (
    "from cpd.teachers.policy import TeacherActor, load_policy",
    'TeacherActor(load_policy("policy.safetensors"))',
)
STUDENT: Final = ("from cpd.student.actor import load_actor", 'load_actor("policy.safetensors")')


def export_hub(source: Path, output: Path, only: Sequence[str]) -> Iterator[Path]:
    """Write every finished policy of `source` to a folder of its name in `output`, as `Exporter` describes.

    Scripted stand-ins for teachers are left out.

    Raises:
        DamagedFileError: if weights do not have the hash in their description.
    """
    evaluations = _evaluations(source)
    for file in policy_files(source, only):
        description = read_json(file.path.with_suffix(".json"), dict[str, Any])
        if not file.is_student and description["labels"]["teacher_recipe"] == "scripted":
            continue
        with atomic_folder(output / file.name) as folder:
            copy_policy(file.path, folder / "policy.safetensors")
            write_text(folder / "README.md", model_card(file, description, evaluations))
        yield output / file.name


def _evaluations(source: Path) -> list[EvaluationRow]:
    """The rows of all policies of `source` that are evaluated."""
    files = [source / "evaluations.csv"]
    if kind_of(source) == "run":
        run = Run(source)
        stages = range(len(run.config.stream.tasks))
        files = [t.evaluation for t in run.teachers()]
        files += [e.row_file(stage) for e in run.evaluations() for stage in stages]
    return [row for file in files if find_table(file) for row in read_rows(file, EvaluationRow)]


def model_card(file: PolicyFile, description: dict[str, Any], evaluations: Sequence[EvaluationRow]) -> str:
    """Return the text of a policy's README.md, with its results among `evaluations`."""
    seed, labels = description["seed"], description["labels"]
    suite = labels.get("suite") or DEFAULT_SUITE
    method = description["method"] if file.is_student else "teacher"
    tasks = description["distinct_tasks"] if file.is_student else [description["task"]]
    rows = [
        row
        for row in evaluations
        if (row.method, row.seed, row.goal_set) == (method, seed, "held_out") and row.task in tasks
    ]
    last = max((row.stage for row in rows if row.stage is not None), default=None)
    rates = {row.task: row.total / row.episodes for row in rows if row.stage == last}
    title = f"{description['experiment']}: {file.name}" if "experiment" in description else file.name
    if file.is_student:
        summary = f"One student of {len(tasks)} teachers, distilled one after another: {', '.join(tasks)}."
    else:
        summary = f"A teacher of the single task {tasks[0]}, trained by reinforcement learning."
    imports, policy = STUDENT if file.is_student else TEACHER
    lines = [f"| {task} | {100 * rate:.0f} % |" for task, rate in rates.items()]
    table = "\n".join(["| task | success |", "|---|---:|", *lines]) if rates else "It is not evaluated yet."
    conditions = {name: value for name, value in labels.items() if file.is_student or name != "task_identity"}
    return CARD.format(
        front_matter=_front_matter(title, suite, rates),
        title=title,
        summary=summary,
        example=example(suite, tasks[0], labels["horizon"], imports=imports, policy=policy),
        results=table,
        conditions="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in conditions.items()),
    )


def _front_matter(title: str, suite: str, rates: dict[str, float]) -> str:
    """The card's metadata as YAML, whose values are JSON."""
    results = [
        {
            "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
            "dataset": {"name": task, "type": task},
            "metrics": [{"type": "success_rate", "value": rate, "name": "success rate on held-out goals"}],
        }
        for task, rate in rates.items()
    ]
    entries = {
        "license": "mit",
        "library_name": "continual-policy-distillation",
        "pipeline_tag": "reinforcement-learning",
        "tags": tags_of(suite),
        **({"model-index": [{"name": title, "results": results}]} if results else {}),
    }
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in entries.items())
