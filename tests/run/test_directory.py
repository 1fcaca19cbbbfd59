"""The elements of a run: which there are, where they lie, and what each needs."""

from __future__ import annotations

from collections.abc import Callable

from cpd.run.directory import Run

VARIANTS = {"no-replay": {"memory": {"selection": "none"}}, "wide": {"student": {"width": 64}}}


def test_every_method_has_students_of_all_seeds_from_the_same_teachers(make_run: Callable[..., Run]) -> None:
    run = make_run(seeds=[1, 2], variants=VARIANTS)
    assert [element.name for element in run.students()] == [
        f"students/{method}/seed-{seed}" for method in ("moe", "no-replay", "wide") for seed in (1, 2)
    ]
    assert [element.index for element in run.students()] == list(range(6))
    assert len(run.teachers()) == 2
    for student, evaluation in zip(run.students(), run.evaluations(), strict=True):
        assert run.dependencies(student) == [run.teacher_of(t.task, student.seed) for t in run.teachers()]
        assert run.dependencies(evaluation) == [student]
        assert evaluation.name == f"{student.name}/evaluation"
        assert evaluation.path == student.path / "evaluation"
        assert (evaluation.role, evaluation.index) == ("evaluation", student.index)
        assert evaluation.config is student.config
    assert run.dependencies(run.report()) == run.evaluations()


def test_a_student_has_the_configuration_of_its_method(make_run: Callable[..., Run]) -> None:
    run = make_run(variants=VARIANTS)
    base, no_replay, wide = run.students()
    assert base.config == make_run("alone").config
    assert (no_replay.config.method, no_replay.config.memory.selection) == ("no-replay", "none")
    assert (wide.config.student.width, wide.config.memory) == (64, base.config.memory)


def test_elements_are_equal_by_folder(make_run: Callable[..., Run]) -> None:
    run = make_run(variants=VARIANTS)
    assert len({*run.elements(), *Run(run.root).elements()}) == len(run.elements())
