"""Finished teachers as files: publish a run's, take up published ones in a new run, check them independently."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from cpd.runs import Run
from jobs.common import EXIT_FAILED, EXIT_USAGE, parser_with_examples, tell

#: The first seed of the held-out goals: Meta-World draws the very same ones from it.
HELD_OUT_SEED = 2001


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_with_examples(
        "jobs.teachers",
        "Finished teachers as files.",
        [
            "python -m jobs.teachers publish runs/cw10 my-teachers           # tables, curves, and policy files",
            "python -m jobs.launch cw10 --prepare",
            "python -m jobs.teachers adopt my-teachers runs/cw10             # then launch: no training any more",
            "python -m jobs.teachers check my-teachers                       # by Meta-World's own evaluation",
            "python -m jobs.teachers check my-teachers --seed 7 --csv seven.csv",
        ],
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    publish = verbs.add_parser("publish", help="copy a run's tables and policy files to a folder")
    publish.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    publish.add_argument("folder", type=Path, metavar="FOLDER")
    adopt = verbs.add_parser("adopt", help="give published policies to a prepared run's untrained teachers")
    adopt.add_argument("folder", type=Path, metavar="FOLDER")
    adopt.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    check = verbs.add_parser("check", help="evaluate published policies with metaworld.evaluation")
    check.add_argument("folder", type=Path, metavar="FOLDER")
    check.add_argument("--only", action="append", default=[], metavar="TASK", help="a task; repeatable")
    check.add_argument(
        "--seed",
        type=int,
        default=HELD_OUT_SEED,
        help=f"of metaworld.MT1, for its goals (default: {HELD_OUT_SEED}, the held-out goals)",
    )
    check.add_argument("--episodes", type=int, default=50, metavar="N", help="per policy (default: 50)")
    check.add_argument("--csv", type=Path, metavar="FILE", help="write the results there, too")
    return parser


def check_teachers(folder: Path, only: Sequence[str], seed: int, num_episodes: int, table: Path | None) -> bool:
    """Evaluate every policy in `folder` by Meta-World's own code, and compare with what was published.

    Returns:
        Whether the published success rate lies within the 95 % interval of every new one.

    Raises:
        ValueError: if `folder` holds no such policy.
    """
    import torch

    from cpd.files import read_json
    from cpd.metrics import wilson
    from cpd.tables import EvaluationRow, read_rows
    from cpd.teachers.policy import load_policy
    from cpd.teachers.protocol import evaluate_by_protocol

    torch.set_num_threads(1)
    rows = read_rows(folder / "evaluations.csv", EvaluationRow)
    published = {(row.task, row.seed): row for row in rows if row.goal_set == "held_out"}
    files = sorted((folder / "policies").glob("*.safetensors"))
    found: list[dict[str, object]] = []
    for file in files:
        description = read_json(file.with_suffix(".json"))
        task, teacher_seed, labels = description["task"], description["seed"], description["labels"]
        if only and task not in only:
            continue
        result = evaluate_by_protocol(
            load_policy(file), task, seed=seed, horizon=labels["horizon"], num_episodes=num_episodes
        )
        low, high = (float(bound) for bound in wilson(result.successes, result.episodes))
        ours = published[task, teacher_seed]
        agrees = low <= ours.successes / ours.episodes <= high
        found.append(
            {
                "task": task,
                "teacher_seed": teacher_seed,
                "teacher_recipe": labels["teacher_recipe"],
                "horizon": labels["horizon"],
                "goal_seed": seed,
                "episodes": result.episodes,
                "successes": result.successes,
                "low": low,
                "high": high,
                "published_episodes": ours.episodes,
                "published_successes": ours.successes,
                "agrees": int(agrees),
            }
        )
        tell(
            f"{task} seed {teacher_seed}: {result.successes}/{result.episodes} [{low:.2f}, {high:.2f}] by "
            f"Meta-World's evaluation, published {ours.successes}/{ours.episodes}: "
            f"{'agrees' if agrees else 'DISAGREES'}"
        )
    if not found:
        raise ValueError(f"{folder} has no policy {'of ' + ', '.join(only) if only else 'in policies/'}")
    if table:
        with table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    return all(row["agrees"] for row in found)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.teachers`; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.verb == "check":
            agree = check_teachers(
                arguments.folder, arguments.only, arguments.seed, arguments.episodes, arguments.csv
            )
            return 0 if agree else EXIT_FAILED
        from cpd.teachers.published import adopt_teachers, publish_teachers

        run = Run(arguments.run_dir)
        if arguments.verb == "publish":
            files = publish_teachers(run, arguments.folder)
            tell(f"{len(files)} of {len(run.teachers())} teachers published in {arguments.folder}")
        else:
            adopted = adopt_teachers(run, arguments.folder)
            tell(f"{len(adopted)} of {len(run.teachers())} teachers of {run.root} need no training any more")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
