"""Film a student beside its teachers, on goals of the evaluation."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cpd.export.graphics import choose_graphics
from cpd.run.command import EXIT_USAGE, exit_quietly
from cpd.run.directory import Run, StudentElement
from cpd.run.shortage import not_installed, shortage
from jobs.common import choose_element, log, parser_with_examples

#: Seconds that the last frame stays.
HOLD_SECONDS = 0.5


def _parser() -> argparse.ArgumentParser:
    parser = parser_with_examples(
        "jobs.video",
        "Film the student after its latest stage beside the teachers, one pair of pictures per task. The episodes "
        "are those of the evaluation, to the bit. A picture stops at the episode's first success. No display is "
        "needed: EGL or OSMesa renders, whichever works.",
        [
            "cpd video runs/demo",
            "cpd video runs/cw10 students/moe/seed-2 --task hammer-v3 --goal 7",
            "cpd video runs/cw10 --format gif --columns 5 --size 120 --out pictures",
        ],
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "student", nargs="?", metavar="STUDENT", help="its name, as `cpd status` shows it (default: the first)"
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="TASK",
        help="a task; repeatable (default: all of the stream)",
    )
    parser.add_argument("--goal", type=int, default=0, metavar="N", help="evaluation goal, from 0 (default: 0)")
    parser.add_argument(
        "--format", action="append", choices=("mp4", "gif"), help="repeatable (default: mp4 and gif)"
    )
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="of a picture (default: 320, less in a wide grid)"
    )
    parser.add_argument("--columns", type=int, metavar="N", help="pairs in a row (default: nearest to 16:9)")
    parser.add_argument("--fps", type=int, default=20, metavar="N", help="frames per second (default: 20)")
    parser.add_argument(
        "--every", type=int, default=3, metavar="N", help="steps per frame; real time is 80 steps/s (default: 3)"
    )
    parser.add_argument("--to-the-end", action="store_true", help="go on after the first success")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: RUN_DIR/videos)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd video`; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        written = make_videos(arguments)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {shortage(error, arguments.run_dir) or error}", file=sys.stderr)
        return EXIT_USAGE
    for path in written:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def make_videos(arguments: argparse.Namespace) -> list[Path]:
    """Film the student that the command line names; return the files written.

    Raises:
        ValueError: for a mistake in the arguments or the run, or if nothing can be rendered.
    """
    run = Run(arguments.run_dir)
    student = choose_element(run.students(), arguments.student)
    tasks = _tasks(student, arguments.task)
    for option in ("size", "columns", "fps", "every"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise ValueError(f"--{option} {value}: it must be positive")
    if missing := not_installed():
        raise ValueError(missing)
    log(f"rendering with {choose_graphics()}")
    # Imported only now, since mujoco chooses how to render when it is imported.
    from cpd.export.movie_files import FORMATS
    from cpd.export.video import film_student
    from cpd.export.video_grid import choose_columns, choose_size, grid_frames
    from cpd.teachers.policy import TeacherActor
    from cpd.teachers.run_teacher import load_teacher

    columns = arguments.columns or choose_columns(len(tasks))
    start = time.monotonic()
    pairs = film_student(
        run,
        student,
        tasks,
        arguments.goal,
        size=arguments.size or choose_size(columns),
        every=arguments.every,
        to_the_end=arguments.to_the_end,
        make_teacher=lambda teacher: TeacherActor(load_teacher(run.config, teacher)),
        log=log,
    )
    frames = grid_frames(pairs, columns, round(HOLD_SECONDS * arguments.fps))
    log(f"{len(frames)} frames in {time.monotonic() - start:.0f} s; encoding")
    stem = "-".join(
        [
            f"{student.method}-seed-{student.seed}",
            *(task.removesuffix("-v3") for task in dict.fromkeys(arguments.task)),
            *([f"goal-{arguments.goal}"] if arguments.goal else []),
        ]
    )
    written = []
    for name in dict.fromkeys(arguments.format or FORMATS):
        path = (arguments.out or run.root / "videos") / f"{stem}.{name}"
        FORMATS[name](path, frames, arguments.fps)
        written.append(path)
    return written


def _tasks(student: StudentElement, names: Sequence[str]) -> list[str]:
    """Return the tasks to film, in the order of the stream.

    Raises:
        ValueError: if the student's stream lacks one.
    """
    stream = student.config.stream.distinct_tasks
    wanted = {name if name in stream else f"{name}-v3" for name in names}
    if foreign := sorted(wanted - set(stream)):
        raise ValueError(f"--task {foreign[0]}: {student.name} has the tasks {', '.join(stream)}")
    return [task for task in stream if not wanted or task in wanted]


if __name__ == "__main__":
    exit_quietly(main)
