"""What changes with the step within a stage."""

from __future__ import annotations

import math

from cpd.config import DistillConfig


def learning_rate(config: DistillConfig, step: int) -> float:
    """The learning rate of step `step` of a stage: linear warm-up, then a cosine down to `final_lr_share`."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    decay_steps = max(config.steps_per_stage - config.lr_warmup_steps, 1)
    progress = (step - config.lr_warmup_steps) / decay_steps
    return config.lr * (
        config.final_lr_share + (1.0 - config.final_lr_share) * (1.0 + math.cos(math.pi * progress)) / 2.0
    )


def opening_offset(step: int, opening_steps: int) -> float:
    """Router logit offset of experts that were added when the stage began.

    The logarithm of a share that grows linearly to 1: against its source, of which it is a copy, a new expert's
    unnormalised probability grows from 1/opening_steps of the source's to all of it.
    """
    return math.log(min(step + 1, opening_steps) / opening_steps)


def curve_steps(num_points: int, steps_per_stage: int) -> list[int]:
    """`num_points` evenly spaced numbers of steps done within a stage, the last one at its end."""
    return [round(steps_per_stage * point / num_points) for point in range(1, num_points + 1)]
