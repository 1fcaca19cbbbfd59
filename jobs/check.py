"""Check published teachers with Meta-World's evaluation code, independently of this project's."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from cpd.reading import read_json
from cpd.run.claim import expect
from cpd.run.command import EXIT_FAILED, EXIT_USAGE, exit_quietly
from cpd.run.descriptions import Policy
from cpd.run.directory import published_policy
from jobs.common import log, parser_with_examples

#: The first seed of the held-out goals. Meta-World draws the same goals from it.
HELD_OUT_SEED = 2001
#: The first columns of a table of results.
COLUMNS = "task,teacher_seed"


def check_teachers(folder: Path, only: Sequence[str], seed: int, num_episodes: int, table: Path | None) -> bool:
    """Evaluate the policies in `folder` with Meta-World's code, and compare with the published success rates.

    Two rates agree if the 95 % interval of their difference (Newcombe 1998) includes 0.

    Args:
        folder: published teachers.
        only: tasks to check; empty: all.
        seed: of `metaworld.MT1`, which draws the goals.
        num_episodes: per policy.
        table: CSV file for the results; None: none.

    Returns:
        Whether all rates agree.

    Raises:
        ValueError: if `folder` holds no policy of these tasks, or `table` cannot be written.
    """
    import numpy as np
    import torch

    from cpd.envs.metaworld.own_evaluation import evaluate_with_metaworld
    from cpd.evaluation.intervals import difference_interval, wilson
    from cpd.run.tables import EvaluationRow, read_rows
    from cpd.teachers.policy import TeacherActor, load_policy

    torch.set_num_threads(1)
    if table:
        _check_table(table)
    if num_episodes < 1:
        raise ValueError(f"--episodes {num_episodes}: at least one is needed")
    policies = _policies(folder, only)
    rows = read_rows(folder / "evaluations.csv", EvaluationRow)
    published = {
        (row.task, row.seed): row for row in rows if (row.method, row.goal_set) == ("teacher", "held_out")
    }
    results: list[dict[str, object]] = []
    for file, description in policies:
        task, teacher_seed, labels = description["task"], description["seed"], description["labels"]
        result = evaluate_with_metaworld(
            TeacherActor(load_policy(file)), task, seed=seed, horizon=labels.horizon, num_episodes=num_episodes
        )
        row = published.get((task, teacher_seed))
        if row is None:
            raise ValueError(f"{folder / 'evaluations.csv'} has no held-out row of {task} (seed {teacher_seed})")
        successes = np.array([result.successes, row.successes])
        episodes = np.array([result.episodes, row.episodes])
        rates = np.stack([successes / episodes, *wilson(successes, episodes)])
        _, low, high = (float(value) for value in rates[:, 0])
        below, above = difference_interval(tuple(rates[:, :1]), tuple(rates[:, 1:]))
        agrees = float(below[0]) <= 0.0 <= float(above[0])
        results.append(
            {
                "task": task,
                "teacher_seed": teacher_seed,
                "teacher_recipe": labels.teacher_recipe,
                "horizon": labels.horizon,
                "goal_seed": seed,
                "episodes": result.episodes,
                "successes": result.successes,
                "low": low,
                "high": high,
                "published_episodes": row.episodes,
                "published_successes": row.successes,
                "agrees": int(agrees),
            }
        )
        log(
            f"{task} seed {teacher_seed}: {result.successes}/{result.episodes} [{low:.2f}, {high:.2f}] by "
            f"Meta-World's evaluation, published {row.successes}/{row.episodes}: "
            f"{'agrees' if agrees else 'DISAGREES'}"
        )
    if table:
        with table.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(results[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)
    return all(result["agrees"] for result in results)


def _check_table(path: Path) -> None:
    """Raise ValueError if the results cannot be written to `path`, or would overwrite something else."""
    if not path.parent.is_dir():
        raise ValueError(f"--csv {path}: there is no directory {path.parent}")
    if path.exists() and not path.read_bytes().startswith(f"{COLUMNS},".encode()):
        raise ValueError(f"--csv {path} exists and is not a table of this command: name another file")


def _policies(folder: Path, only: Sequence[str]) -> list[tuple[Path, Policy]]:
    """Return the policy files of the tasks in `only`, or of all tasks, with their descriptions."""
    expect(folder, "teachers", "name what `cpd publish` wrote")
    files = sorted((folder / "policies").glob("*.safetensors"))
    if not files or not (folder / "evaluations.csv").exists():
        raise ValueError(
            f"{folder} has no policies, or no evaluations.csv: name a folder that `cpd publish` wrote"
        )
    policies = [(file, read_json(file.with_suffix(".json"), Policy)) for file in files]
    for file, description in policies:
        task, seed = description["task"], description["seed"]
        if file != published_policy(folder, task, seed):
            raise ValueError(f"{file} is the policy of {task} seed {seed}: rename it")
    tasks = {description["task"] for _, description in policies}
    if unknown := [task for task in only if task not in tasks]:
        raise ValueError(f"{folder} has no policy of {', '.join(unknown)} (it has {', '.join(sorted(tasks))})")
    return [(file, description) for file, description in policies if not only or description["task"] in only]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd check`; return the exit code."""
    parser = parser_with_examples(
        "jobs.check",
        "Evaluate published teachers with metaworld.evaluation on goals that Meta-World draws, and compare with "
        "the published success rates. Exit code 1 if the 95 % interval of the difference of a policy's two rates "
        "excludes 0.",
        [
            "cpd check analysis/results/teachers/cw10-demo_rl",
            "cpd check analysis/results/teachers/cw10-demo_rl --only hammer-v3 --seed 7",
        ],
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="published teachers, as `cpd publish` writes them"
    )
    parser.add_argument("--only", action="append", default=[], metavar="TASK", help="a task; repeatable")
    parser.add_argument(
        "--seed",
        type=int,
        default=HELD_OUT_SEED,
        help=f"seed of metaworld.MT1, which draws the goals (default: {HELD_OUT_SEED}, the held-out goals)",
    )
    parser.add_argument("--episodes", type=int, default=50, metavar="N", help="episodes per policy (default: 50)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args(argv)
    try:
        agree = check_teachers(arguments.folder, arguments.only, arguments.seed, arguments.episodes, arguments.csv)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0 if agree else EXIT_FAILED


if __name__ == "__main__":
    exit_quietly(main)
