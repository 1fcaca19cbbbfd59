"""The measures of a continual stream and their uncertainty, in plain NumPy.

Shapes: K stages, J distinct tasks, N seeds. `rates` is the success matrix with K + 1 rows, of which row 0 is
stage -1, before any training. A cell that was not measured is NaN, and so is every measure that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpd.evaluation.intervals import Floats
from cpd.run.tables import EvaluationRow

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class SuccessMatrix:
    """Success counts of one student: rows are stages -1 … K-1, columns the distinct tasks of the stream."""

    stream: tuple[str, ...]
    tasks: tuple[str, ...]
    successes: Floats
    """(K+1, J); sums of normalised returns for tasks without a success measure."""
    episodes: NDArray[np.int64]
    """(K+1, J); 0 where nothing was measured."""

    @property
    def rates(self) -> Floats:
        """(K+1, J) success rates, NaN where nothing was measured."""
        with np.errstate(invalid="ignore"):  # 0 / 0 in cells without episodes
            return np.where(self.episodes > 0, self.successes / self.episodes, np.nan)


def success_matrix(rows: Iterable[EvaluationRow], stream: Sequence[str], goal_set: str) -> SuccessMatrix:
    """Assemble the success matrix of one student from its long-form rows.

    Args:
        rows: rows of one method and seed; rows of other goal sets are skipped.
        stream: the task of every stage.
        goal_set: the goals to count.

    Raises:
        ValueError: if a row is of no stage or task of the stream, or if two rows are of the same cell.
    """
    tasks = tuple(dict.fromkeys(stream))
    successes = np.zeros((len(stream) + 1, len(tasks)))
    episodes = np.zeros(successes.shape, np.int64)
    for row in rows:
        if row.goal_set != goal_set:
            continue
        if row.task not in tasks or row.stage is None or not -1 <= row.stage < len(stream):
            raise ValueError(f"stage {row.stage}, task {row.task!r} is outside the stream of {len(stream)} stages")
        cell = row.stage + 1, tasks.index(row.task)
        if episodes[cell]:
            raise ValueError(f"stage {row.stage}, task {row.task!r} was evaluated twice on {goal_set} goals")
        successes[cell], episodes[cell] = row.total, row.episodes
    return SuccessMatrix(tuple(stream), tasks, successes, episodes)


def own_stages(stream: Sequence[str]) -> NDArray[np.int64]:
    """Return (J,) the last stage of every distinct task, after which forgetting of the task begins."""
    tasks = dict.fromkeys(stream)
    return np.array([max(k for k, name in enumerate(stream) if name == task) for task in tasks], np.int64)


def final_stage(rates: Floats, stream: Sequence[str], expected: Bools) -> int | None:
    """Return the stage of the final row, or None if the stream has not been evaluated to its end.

    It is K-1, or the last distilled stage if all later ones were skipped because their teachers were rejected:
    the policy has not changed since.

    Args:
        rates: (K+1, J) success matrix.
        stream: the task of every stage.
        expected: (J,) whether a task's stages are to be distilled, that is, its teacher was not rejected.
    """
    last = max(own_stages(stream)[expected], default=-1)
    # Without any expected stage, `last` is -1; the row before training is never the final one.
    measured = [k for k in range(max(last, 0), len(stream)) if not np.isnan(rates[k + 1]).all()]
    return max(measured, default=None)


def average_performance(final: Floats, admitted: Bools) -> float:
    """`AP = mean_j S[K-1, j]`, with 0 for every task without an admitted teacher.

    Args:
        final: (J,) the final row of the success matrix.
        admitted: (J,) whether the task has an admitted teacher.
    """
    # Without the zeros, a stream would score higher because some of its tasks are too hard for their teachers.
    return float(np.where(admitted, final, 0.0).mean())


@dataclass(frozen=True)
class Forgetting:
    """How much success on earlier tasks was lost; negative values are gains (backward transfer)."""

    per_task: Floats
    """(J,) `S[own last stage, j] - S[K-1, j]`; NaN for tasks without an admitted teacher."""
    mean: float
    """Mean over the tasks before the last."""
    over_all: float
    """The same sum divided by the number of all distilled tasks, the last included (Wolczyk et al. 2021)."""
    worst: int | None
    """Column of the task that is forgotten most."""
    max_based: float
    """Mean over the tasks before the last of `max_k S[k, j] - S[K-1, j]`, `k` from the task's first stage to the
    one before the last (Chaudhry et al. 2018). The maximum of noisy rates is biased upwards, more so with few
    episodes per cell."""


def forgetting(rates: Floats, stream: Sequence[str], admitted: Bools, final: int) -> Forgetting:
    """Compute forgetting at stage `final`.

    Args:
        rates: (K+1, J) success matrix.
        stream: the task of every stage.
        admitted: (J,) whether the task has an admitted teacher; the others are left out.
        final: the stage of the final row, from `final_stage`.
    """
    last_stages = own_stages(stream)
    columns = np.arange(len(last_stages))
    drop = np.where(admitted, rates[last_stages + 1, columns] - rates[final + 1], np.nan)
    last = max(last_stages[admitted], default=-1)
    # The last task has had no time to be forgotten: its zero would only dilute the mean.
    earlier = admitted & (last_stages < last)
    if not earlier.any():
        return Forgetting(drop, np.nan, np.nan, None, np.nan)
    first = [stream.index(task) for task in dict.fromkeys(stream)]
    # fmax passes over NaN: stages that were skipped have no row.
    highest = np.array([np.fmax.reduce(rates[first[j] + 1 : last + 1, j], initial=np.nan) for j in columns])
    # Plain means, not nanmean: one unmeasured cell makes the mean unknown, not an average of other tasks.
    return Forgetting(
        per_task=drop,
        mean=float(drop[earlier].mean()),
        over_all=float(drop[earlier].sum() / admitted.sum()),
        worst=_arg_extreme(np.where(earlier, drop, np.nan), np.nanargmax),
        max_based=float((highest - rates[final + 1])[earlier].mean()),
    )


def _arg_extreme(values: Floats, choose: Callable[[Floats], Any]) -> int | None:
    return None if np.isnan(values).all() else int(choose(values))


@dataclass(frozen=True)
class Recovery:
    """The student's final success as a share of its teachers'."""

    per_task: Floats
    """(J,) unclipped `S[K-1, j] / S_teacher[j]`; NaN where there is no admitted teacher or it never succeeds."""
    mean: float
    """Headline: `mean_j min(1, S[K-1, j] / S_teacher[j])`."""
    unclipped: float
    """`mean_j S[K-1, j] / S_teacher[j]`."""
    ratio_of_means: float
    """`sum_j S[K-1, j] / sum_j S_teacher[j]`."""
    worst: int | None
    """Column of the task with the least share."""


def recovery(final: Floats, teacher: Floats, admitted: Bools) -> Recovery:
    """Compute recovery over the tasks whose teacher is admitted and succeeds at least once.

    Args:
        final: (J,) the final row of the success matrix.
        teacher: (J,) the teachers' success rates on the same goals.
        admitted: (J,) whether the task has an admitted teacher.
    """
    # Not `teacher > 0`: a teacher whose rate is NaN must make the mean NaN instead of dropping out of it.
    counted = admitted & ~(teacher == 0)
    share = np.full(len(final), np.nan)
    share[counted] = final[counted] / teacher[counted]
    if not counted.any():
        return Recovery(share, np.nan, np.nan, np.nan, None)
    return Recovery(
        per_task=share,
        # Clipped: a task in which the student beats its teacher must not make up for a task that it lost.
        mean=float(np.minimum(1.0, share[counted]).mean()),
        unclipped=float(share[counted].mean()),
        ratio_of_means=float(final[counted].sum() / teacher[counted].sum()),
        worst=_arg_extreme(share, np.nanargmin),
    )


def curve_steps(num_points: int, steps_per_stage: int) -> list[int]:
    """The steps of a stage after which its learning curve gets a point: evenly spaced, the last one at its end."""
    return [round(steps_per_stage * point / num_points) for point in range(1, num_points + 1)]


def area_under_curve(steps: Sequence[float], success: Sequence[float], length: float) -> float:
    """Compute the mean success over the first `length` steps of a stage, by the trapezoid rule.

    The first value extends back to step 0 and the last one forward to `length`.

    Args:
        steps: increasing steps at which success was measured.
        success: the rates there.
        length: number of steps of the stage.

    Raises:
        ValueError: if there are no steps, or if they do not increase from 0 to `length`.
    """
    inside = np.asarray(steps, float)
    if not len(inside) or (np.diff(inside) <= 0).any() or inside[0] < 0 or inside[-1] > length:
        raise ValueError(f"a curve's steps must increase from 0 to {length:g}, not {list(steps)}")
    x = np.concatenate([[0.0], inside, [length]])
    y = np.asarray(success, float)
    return float(np.trapezoid(np.concatenate([y[:1], y, y[-1:]]), x) / length)


def forward_transfer(area: Floats, baseline: Floats, at_most: Floats) -> tuple[Floats, Bools]:
    """Compute `(AUC_k - AUC_k^b) / (1 - AUC_k^b)` of every stage (Wolczyk et al. 2021); its mean is the transfer.

    Args:
        area: (..., K) area under the curve of each stage's task, from `area_under_curve`.
        baseline: (K,) the same for a student distilled on that task alone with the same steps and data.
        at_most: (K,) the area of such a student if it succeeded at every evaluation. Stages whose `baseline`
            reaches it are left out, since nothing is left to gain.

    Returns:
        (..., K) gains, NaN for stages that are left out or not measured, and (K,) which stages are left out.
    """
    # Both are means of floating-point areas, which may differ by rounding.
    left_out = baseline > at_most - 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = (area - baseline) / (1.0 - baseline)
    return np.where(left_out, np.nan, gain), left_out
