"""A student as after training, without training it."""

from __future__ import annotations

from typing import Any

import torch

from cpd.config import StudentConfig
from cpd.student.network import Student
from cpd.student.plans import Plan

TASKS = ("drawer-close-v3", "handle-press-side-v3", "window-close-v3")


def grown_student(dtype: torch.dtype = torch.float32, **settings: Any) -> Student:
    """A student of three tasks as after training: groups of experts, densities, prototypes, plans of two tasks."""
    generator = torch.Generator().manual_seed(1)
    student = Student(StudentConfig(**{"width": 32, "expert_width": 32, **settings}), len(TASKS), dtype=dtype)
    student.initialise(generator)
    for group in (1, 2):
        for moe in student.moes:
            for source in (0, 1):
                moe.grow(source, torch.randn(32, generator=generator), group=group, closed=False)
                with torch.no_grad():
                    moe.up.stack[-1] += 0.1 * torch.randn(32, 32, generator=generator)
    for task in range(3):
        student.assign_group(task, task)
    student.known_K[:] = True
    if student.encoder is not None:
        for task in range(3):
            first = observations(10, seed=task) + 0.01 * task
            student.set_prototype(task, first.to(dtype))
            student.density.fit(task, first)
        success = {Plan(0, 1): {0: 0.9, 1: 0.9, 2: 0.2}, Plan(0, 0): {1: 0.3}, Plan(1, 1): {0: 0.2}}
        for plan, by_task in success.items():
            for task, rate in by_task.items():
                student.plans.record(plan, task, rate)
    return student


def observations(num: int, seed: int) -> torch.Tensor:
    centre = torch.linspace(-0.3, 0.7, 39)
    return centre + 0.05 * torch.randn(num, 39, generator=torch.Generator().manual_seed(seed))


def first_observations() -> torch.Tensor:
    """One observation of each task."""
    return torch.cat([observations(1, seed=task) + 0.01 * task for task in range(3)])
