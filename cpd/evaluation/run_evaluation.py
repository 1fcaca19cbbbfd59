"""Measures the success matrix of a student: the policy of every stage on every task, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from cpd.comm import TORCH_THREADS, Comm, choose_device
from cpd.config import Config
from cpd.envs.cells import CHUNK, TASKS_PER_PASS, Cell, EnvPool, evaluate_cells
from cpd.envs.episodes import Actor, Outcome, mean_normalised_return
from cpd.envs.suite import DEFAULT_SUITE, load_suite
from cpd.evaluation.expert_usage import ExpertUsage
from cpd.run.attempt import Attempt, begin_attempt
from cpd.run.directory import Run, RunError, StudentElement, TeacherElement, identity
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.provenance import Labels, labels
from cpd.run.tables import EpisodeRow, EvaluationRow, RetrievalRow, write_rows
from cpd.student.actor import TaskwiseActor, make_actor
from cpd.student.network import Student, load_student
from cpd.student.selected_policies import SelectedPolicies


def row_cells(config: Config, stage: int, last_stage: int) -> list[Cell]:
    """Return the cells of row `stage` (-1: before training) of the success matrix.

    `Config.row_episodes` has the numbers of episodes on the goals of `evaluation.goal_set`; the final row is also
    measured to the episodes' end, and on training goals.
    """
    counts = config.evaluation
    row = config.row_episodes(stage, is_last=stage == last_stage)
    if stage == last_stage:
        training = min(counts.num_episodes, config.teacher.num_training_goals)
        # The use of experts is recorded for one task at a time.
        return [Cell(task, counts.goal_set, number, True, tasks_per_pass=1) for task, number in row.items()] + [
            Cell(task, "training", training) for task in row
        ]
    # Few episodes of many tasks share a pass.
    widths = {counts.num_episodes_unmet: CHUNK // max(counts.num_episodes_unmet, 1)}
    return [
        Cell(task, counts.goal_set, number, tasks_per_pass=max(widths.get(number, 0), TASKS_PER_PASS))
        for task, number in row.items()
    ]


def evaluation_rows(
    cells: Sequence[Cell],
    outcomes: Sequence[Sequence[Outcome]],
    *,
    method: str,
    seed: int,
    stage: int | None,
    label: Labels,
) -> tuple[list[EvaluationRow], list[EpisodeRow]]:
    """Return long-form rows of measured cells: one per cell, and one per episode."""
    rows, episodes = [], []
    for cell, results in zip(cells, outcomes, strict=True):
        common: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "stage": stage,
            "task": cell.task,
            "goal_set": cell.goal_set,
        }
        last = [outcome.success_last for outcome in results]
        returns = load_suite(label.suite or DEFAULT_SUITE).returns(cell.task)
        rows.append(
            EvaluationRow(
                **common,
                episodes=len(results),
                successes=sum(outcome.success for outcome in results),
                successes_last=sum(map(bool, last)) if cell.to_the_end else None,
                mean_return=sum(outcome.episode_return for outcome in results) / len(results),
                normalised_return=mean_normalised_return(results),
                random_return=returns.random if returns else None,
                reference_return=returns.reference if returns else None,
                **asdict(label),
            )
        )
        episodes += [EpisodeRow(**common, **outcome._asdict()) for outcome in results]
    return rows, episodes


def retrieval_rows(
    cells: Sequence[Cell], outcomes: Sequence[Sequence[Outcome]], **common: Any
) -> list[RetrievalRow]:
    """Return how often the task was inferred, for the cells to the episodes' end; `common`: the shared columns."""
    return [
        RetrievalRow(
            **common,
            task=cell.task,
            step=1,
            episodes=len(results),
            correct=sum(outcome.believed == cell.task for outcome in results),
        )
        for cell, results in zip(cells, outcomes, strict=True)
        if cell.to_the_end and results[0].believed is not None
    ]


def load_stage(element: StudentElement, stage: int) -> Student:
    """Load the student after `stage` (-1: before training)."""
    return load_student(element.stage_policy(stage), **identity(element.config, element, stage))


def row_actor(
    element: StudentElement, model: Student, stages: Sequence[int], teacher_of: Callable[[str], Actor]
) -> Actor:
    """Return the actor that row `stages[-1]` of the success matrix measures.

    This is the student after that stage, except with three protocols. `teachers`: the teacher of the task that the
    student infers. `single_task`, which trains a student per task: row i measures each task with the student of
    its latest stage up to i, or with the untrained student if there is none; S[i, j] then stays as it was at the
    end of task j's stage, so nothing is forgotten. `isolated`: the same, but the task is inferred.

    Args:
        element: the element of the student.
        model: the student after `stages[-1]`.
        stages: the stages that have a policy, ascending, up to the row's.
        teacher_of: makes the actor of a task's teacher.
    """
    stream, device = element.config.stream, model.device
    if element.config.distill.protocol == "teachers":
        return SelectedPolicies(model, stream.distinct_tasks, teacher_of)
    if not element.config.distill.separates:
        return make_actor(model, stream.distinct_tasks)
    stage_of = dict.fromkeys(stream.distinct_tasks, stages[0])
    stage_of |= {stream.tasks[stage]: stage for stage in stages if stage >= 0}

    def actor_of(task: str) -> Actor:
        stage = stage_of[task]
        student = model if stage == stages[-1] else load_stage(element, stage).to(device)
        return make_actor(student, stream.distinct_tasks)

    if element.config.distill.protocol == "isolated":
        return SelectedPolicies(model, stream.distinct_tasks, actor_of)
    return TaskwiseActor(actor_of)


def run_evaluation(
    run: Run,
    element: StudentElement,
    comm: Comm,
    *,
    interrupt: Interrupt,
    log: Callable[[str], None],
    make_teacher: Callable[[TeacherElement], Actor] | None = None,
) -> None:
    """Evaluate the missing rows of one student's success matrix; a collective.

    While the student is still learning, its newest stage is not evaluated, since it may be the last one, whose row
    takes more episodes. `make_teacher` makes the actors of teachers, which the protocol `teachers` needs.

    Raises:
        LeaseHeldError: if another process is evaluating this student.
        InterruptedBySignal: if a stop is requested; the rows finished so far are kept.
    """
    torch.set_num_threads(TORCH_THREADS)
    with begin_attempt(element, comm, log) as attempt:
        is_whole = comm.broadcast(run.students()[element.index].complete.exists())
        _fill_rows(run, element, comm, interrupt, attempt, is_whole, make_teacher)
        if attempt.is_writer and is_whole:
            attempt.check()
            element.complete.touch()
        attempt.finish(*(("done",) if is_whole else ("waiting", "the student is still learning")))


def _fill_rows(
    run: Run,
    element: StudentElement,
    comm: Comm,
    interrupt: Interrupt,
    attempt: Attempt,
    is_whole: bool,
    make_teacher: Callable[[TeacherElement], Actor] | None,
) -> None:
    config = element.config
    student = run.students()[element.index]
    stages = comm.broadcast([s for s in range(-1, len(config.stream.tasks)) if student.stage_policy(s).exists()])
    if is_whole and not stages:
        raise RunError(f"{student.path} holds no trained stage yet; run `cpd distill` first")
    rejected = {task for task in config.stream.tasks if run.teacher_of(task, element.seed).is_rejected}
    distilled = [-1, *(s for s, task in enumerate(config.stream.tasks) if task not in rejected)]
    lost = comm.broadcast(
        [s for s in distilled if is_whole and s not in stages and not element.row_file(s).exists()]
    )
    if lost:
        raise RunError(
            f"{', '.join(str(student.stage_policy(s)) for s in lost)} missing, although {student.name} is "
            f"finished; restore it, or remove {student.path} and launch again to distil this student anew"
        )
    rows_due = stages if is_whole else stages[:-1]
    todo = comm.broadcast([s for s in rows_due if not element.row_file(s).exists()])
    episodes = {s: sum(cell.num_episodes for cell in row_cells(config, s, stages[-1])) for s in rows_due}
    total = sum(episodes.values())
    done = total - sum(episodes[s] for s in todo)
    attempt.begin("evaluate", total, done, unit="episodes")

    def advance(num_episodes: int) -> None:
        nonlocal done
        # All ranks work at about the same speed, so the total is this rank's progress times their number.
        done += num_episodes * comm.size
        attempt.advance(min(done, total))

    def teacher_of(task: str) -> Actor:
        assert make_teacher is not None, "the protocol `teachers` needs it"
        return make_teacher(run.teacher_of(task, element.seed))

    pool = EnvPool(suite=config.stream.suite_object)
    device = choose_device(comm)
    for stage in todo:
        model = load_stage(student, stage).to(device)
        cells = sorted(row_cells(config, stage, stages[-1]), key=lambda cell: not cell.to_the_end)
        actor = row_actor(student, model, stages[: stages.index(stage) + 1], teacher_of)
        usage = ExpertUsage(model, actor, config.stream.distinct_tasks)
        done_earlier = done
        # Episodes that ended at success stay in the batch, so usage is recorded only where none ends early.
        outcomes: list[list[Outcome]] = []
        for acting, to_the_end in ((usage, True), (actor, False)):
            measured = evaluate_cells(
                acting,
                [cell for cell in cells if cell.to_the_end == to_the_end],
                config.stream.horizon,
                pool,
                comm,
                should_stop=lambda: interrupt.requested,
                advance=advance,
            )
            if measured is None:
                raise InterruptedBySignal(f"asked to stop while evaluating stage {stage}; launch again to go on")
            outcomes += measured
        done = done_earlier + episodes[stage]
        label = labels(config)
        common: dict[str, Any] = {"method": element.method, "seed": element.seed, "stage": stage}
        usage_rows = usage.rows(comm, **common, **asdict(label))
        if attempt.is_writer:
            rows, episode_rows = evaluation_rows(cells, outcomes, **common, label=label)
            attempt.check()
            # Of separate students, only the latest is recorded, which does not describe the method.
            if usage_rows and not config.distill.separates:
                write_rows(element.usage_file(stage), usage_rows)
            if retrieval := retrieval_rows(cells, outcomes, **common, **asdict(label)):
                write_rows(element.retrieval_file(stage), retrieval)
            write_rows(element.row_episodes_file(stage), episode_rows)
            write_rows(element.row_file(stage), rows)  # last: it marks the row as measured
    pool.close()
