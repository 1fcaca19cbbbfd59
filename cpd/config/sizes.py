"""Sizes of students against each other, so that methods can be compared at equal numbers of parameters."""

from __future__ import annotations

import math
from typing import Final

from cpd.config.student import StudentConfig

#: Dense widths are multiples of this: with others, matrix products take up to twice the time on some processors.
WIDTH_MULTIPLE: Final = 16


def final_num_experts(student: StudentConfig, num_tasks: int) -> int:
    """Experts per layer after `num_tasks` distinct tasks: exactly, or at most where growth depends on demand."""
    grown = 0 if student.expansion == "none" else student.experts_per_task * (num_tasks - 1)
    return student.num_experts + grown


def dense_expert_width(student: StudentConfig, num_tasks: int) -> int:
    """The least `expert_width` of a dense student with at least as many parameters as `student` has in the end.

    A dense student is one of a single expert: `num_experts = 1`, `top_k = 1`, `expansion = "none"`, and all else
    as in `student`. Per layer, E experts of width F on tokens of width D have E (2 D F + D) parameters, router
    rows included, and the one of width F' has 2 D F' + D. F' is rounded up to a multiple of `WIDTH_MULTIPLE`.
    """
    num_experts = final_num_experts(student, num_tasks)
    exact = (num_experts * (2 * student.expert_width + 1) - 1) / 2
    return math.ceil(exact / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
