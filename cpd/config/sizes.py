"""Sizes of students against each other, so that methods can be compared at equal numbers of parameters."""

from __future__ import annotations

from cpd.config.student import StudentConfig


def final_num_experts(student: StudentConfig, num_tasks: int) -> int:
    """Experts per layer after `num_tasks` distinct tasks: exactly, or at most where growth depends on demand."""
    grown = 0 if student.expansion == "none" else student.experts_per_task * (num_tasks - 1)
    return student.num_experts + grown


def dense_expert_width(student: StudentConfig, num_tasks: int) -> int:
    """The `expert_width` of a dense student with as many parameters as `student` has in the end.

    A dense student is one of a single expert: `num_experts = 1`, `top_k = 1`, `expansion = "none"`, and all else
    as in `student`. Per layer, E experts of width F on tokens of width D have E (2 D F + D) parameters, router
    rows included, and the one of width F' has 2 D F' + D.
    """
    num_experts = final_num_experts(student, num_tasks)
    return round((num_experts * (2 * student.expert_width + 1) - 1) / 2)
