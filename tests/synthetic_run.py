"""Writes a run directory as its jobs would leave it, from success rates that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cpd.config import Config
from cpd.config.load import load, to_dict
from cpd.run.directory import Run, StudentElement
from cpd.run.files import write_json
from cpd.run.progress import MetricsLog, StatusRecord
from cpd.run.provenance import Labels
from cpd.run.tables import CurveRow, EpisodeRow, EvaluationRow, RetrievalRow, UsageRow, write_rows

#: Success of teachers that miss the gate.
REJECTED_RATE = 0.56
LABELS = Labels("rl", 500, "none", "v2", "3.1.1", "3.3.0")


def write_run(
    root: Path,
    *,
    stream: Sequence[str],
    students: Mapping[int, np.ndarray],
    teachers: Mapping[str, float],
    method: str = "moe",
    teacher_seeds: Sequence[int] = (1,),
    labels: Labels = LABELS,
    last_stage: int | None = None,
    variants: Mapping[str, Mapping[int, np.ndarray]] | None = None,
    protocols: Mapping[str, str] | None = None,
    goal_set: str = "held_out",
) -> Run:
    """Write a run of 50 (diagonal, final row, teachers) and 10 episodes per cell.

    Args:
        root: the run directory to make.
        stream: the task of every stage.
        students: (K+1, J) success rates by student seed; rows of NaN are not written.
        teachers: success rate by task; a task that is left out has a rejected teacher.
        method: label of the students.
        teacher_seeds: seeds of the teachers, which all have the same rates.
        labels: conditions of the results.
        last_stage: the stage that was evaluated as the final one, if not K-1.
        variants: further methods, with rates as for `students`, of the same seeds.
        protocols: `distill.protocol` of variants that have another than the usual one.
        goal_set: the goals that success was measured on.
    """
    config = {
        "name": root.name,
        "method": method,
        "seeds": list(students),
        "stream": {"tasks": list(stream), "horizon": labels.horizon},
        "teacher": {"recipe": labels.teacher_recipe, "seeds": list(teacher_seeds)},
        "student": {"task_identity": labels.task_identity},
        "evaluation": {"goal_set": goal_set},
        # Something must differ, be it only the reader's expectation.
        "variants": {
            name: {"distill": {"lr": 1e-3 + 1e-6 * i, "protocol": (protocols or {}).get(name, "continual")}}
            for i, name in enumerate(variants or {})
        },
    }
    write_json(root / "config.json", to_dict(load(Config, config, "test")))
    write_json(root / "provenance.json", {"code": "abc", "packages": {"numpy": "2"}, "command": ["/somewhere/x"]})
    run = Run(root)
    for index, element in enumerate(run.teachers()):
        _write_teacher(run, index, teachers.get(element.task), labels)
    final = len(stream) - 1 if last_stage is None else last_stage
    every = [rates for method in (students, *(variants or {}).values()) for rates in method.values()]
    for position, rates in enumerate(every):
        _write_student(run, position, rates, final, labels)
    return run


def spans(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """The phases one after another from time 0."""
    ends = np.cumsum(list(seconds.values())).tolist()
    return [(phase, end - length, end) for (phase, length), end in zip(seconds.items(), ends, strict=True)]


def _write_teacher(run: Run, index: int, rate: float | None, labels: Labels) -> None:
    element = run.teachers()[index]
    rng = np.random.default_rng(index)
    log = MetricsLog(element.metrics)
    length = int(rng.integers(30, 80)) if rate is not None else 80
    top = 0.55 if rate is None else 1.0
    for iteration in range(length):
        success = top / (1 + np.exp(-(iteration - 0.6 * length) / (0.07 * length))) + rng.normal(0, 0.02)
        success = float(np.clip(success, 0, 1))
        record = {"iteration": iteration + 1, "env_steps": 5_000 * (iteration + 1), "train_success": success}
        if iteration % 3 == 2 or iteration == length - 1:
            record["validation_success"] = round(50 * min(1.0, 1.03 * success)) / 50
        log.append(**record)
    log.close()
    state = "rejected" if rate is None else "done"
    seconds = {"train": 2.0 * length, "evaluate": 7.5, "rollouts": 12.25}
    write_json(element.status, asdict(StatusRecord(state=state, seconds=seconds, spans=spans(seconds))))
    success = REJECTED_RATE if rate is None else rate
    cell = ("teacher", element.seed, None, element.task, run.config.evaluation.goal_set, 50, success)
    _write_cell_files(element.evaluation, element.episodes, [cell], labels)
    (element.rejected if rate is None else element.complete).touch()


def _write_student(run: Run, position: int, rates: np.ndarray, final: int, labels: Labels) -> None:
    student, evaluation = run.students()[position], run.evaluations()[position]
    stream, tasks = run.config.stream.tasks, run.config.stream.distinct_tasks
    curves = []
    for stage, task in enumerate(stream):
        start, end = rates[stage, tasks.index(task)], rates[stage + 1, tasks.index(task)]
        if np.isnan(end):
            continue
        start = 0.0 if np.isnan(start) else start
        for point in range(1, 11):
            successes = round(10 * (start + (end - start) * min(1.0, point / 6)))
            counts = {"episodes": 10, "successes": successes}
            head = {"method": student.method, "seed": student.seed, "stage": stage, "step": 100 * point}
            curves.append(
                CurveRow(**head, task=task, goal_set=run.config.evaluation.goal_set, **counts, **asdict(labels))
            )
    write_rows(student.curves, curves)
    _write_learning(student, rates, labels)
    _write_watched(evaluation, rates, final, labels)
    seconds = {"distill": 200.0 * len(stream)}
    write_json(student.status, asdict(StatusRecord(state="done", seconds=seconds, spans=spans(seconds))))
    seconds = {"evaluate": 95.5 * len(stream)}
    write_json(evaluation.status, asdict(StatusRecord(state="done", seconds=seconds, spans=spans(seconds))))
    for stage in range(-1, len(stream)):
        if np.isnan(rates[stage + 1]).all():
            continue
        cells = []
        for task, rate in zip(tasks, rates[stage + 1], strict=True):
            is_diagonal = stage >= 0 and stream[stage] == task
            head = (student.method, student.seed, stage, task)
            cells.append(
                (*head, run.config.evaluation.goal_set, 50 if is_diagonal or stage == final else 10, rate)
            )
            if stage == final:
                cells.append((*head, "training", 50, rate))
        _write_cell_files(evaluation.row_file(stage), evaluation.row_episodes_file(stage), cells, labels)
    student.complete.touch()
    evaluation.complete.touch()


def _write_learning(student: StudentElement, rates: np.ndarray, labels: Labels) -> None:
    """Losses that fall within every stage and jump between them, and the descriptions of the stages' students."""
    stream = student.config.stream.tasks
    log = MetricsLog(student.metrics)
    for stage in range(-1, len(stream)):
        if np.isnan(rates[stage + 1]).all():
            continue
        task = stream[stage] if stage >= 0 else None
        for step in range(20, 1001, 20) if task else ():
            current = float(3 * np.exp(-step / 200) + 0.05 * stage)
            replay = 0.1 * stage + float(np.exp(-step / 500)) if stage else None
            loss = current if replay is None else (current + replay) / 2
            log.append(stage=stage, step=step, task=task, loss=loss, current=current, replay=replay, lr=1e-3)
        if task:
            log.append(event="protection", stage=stage, masked_share=1 - 0.9 ** (stage + 1))
        description = {"task": task, "num_experts": 4 + stage, "num_parameters": 50_000 + 10_000 * stage}
        memory = {"memory_steps": 80 * (stage + 1), "memory_bytes": 20_000 * (stage + 1)}
        path = student.stage_policy(stage).with_suffix(".json")
        write_json(path, {**description, **memory, "labels": asdict(labels)})
    log.close()


def _write_watched(evaluation: StudentElement, rates: np.ndarray, final: int, labels: Labels) -> None:
    """Two layers of one expert more than tasks, each task mostly on its own; beliefs that improve."""
    if np.isnan(rates[final + 1]).all():
        return
    tasks = evaluation.config.stream.distinct_tasks
    head = {"method": evaluation.method, "seed": evaluation.seed, "stage": final, **asdict(labels)}
    usage, retrieval = [], []
    for column, task in enumerate(tasks):
        for layer in range(2):
            for expert in range(len(tasks) + 1):
                chosen = 20_000 if expert == column else 4_000 if expert == len(tasks) else 100 * layer
                usage.append(UsageRow(**head, task=task, layer=layer, expert=expert, chosen=chosen))
        for step in (1, 2, 3, 5, 10, 20, 50, 100, 200, labels.horizon):
            correct = round(50 * min(1.0, 0.3 + 0.07 * column + 0.25 * np.log10(step)))
            retrieval.append(RetrievalRow(**head, task=task, step=step, episodes=50, correct=correct))
    write_rows(evaluation.usage_file(final), usage)
    write_rows(evaluation.retrieval_file(final), retrieval)


def _write_cell_files(table: Path, details: Path, cells: Sequence[tuple], labels: Labels) -> None:
    rows, episodes = [], []
    for method, seed, stage, task, goal_set, count, rate in cells:
        if np.isnan(rate):
            continue
        successes = round(rate * count)
        last = successes if stage is None or goal_set == "training" else None
        head = {"method": method, "seed": seed, "stage": stage, "task": task, "goal_set": goal_set}
        counts = {"episodes": count, "successes": successes, "successes_last": last, "mean_return": 10.0}
        rows.append(EvaluationRow(**head, **counts, **asdict(labels)))
        flags = [(goal < successes, None if last is None else goal < last) for goal in range(count)]
        episodes += [EpisodeRow(*head.values(), goal, *pair, 120, 10.0) for goal, pair in enumerate(flags)]
    write_rows(table, rows)
    write_rows(details, episodes)
