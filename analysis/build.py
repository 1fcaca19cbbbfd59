"""Builds the figures and tables of one or more runs from their results alone; needs no torch, MPI or simulator."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from matplotlib.figure import Figure

from analysis.build_teachers import build_teachers
from analysis.captions import conditions, short_conditions
from analysis.dataset import Dataset, load_dataset
from analysis.figures import (
    fig_finals,
    fig_losses,
    fig_methods,
    fig_retrieval,
    fig_stream,
    fig_success_matrix,
    fig_teacher_curves,
    fig_transfer,
    fig_usage,
)
from analysis.paper_tables import write_tables
from analysis.published_teachers import find_published
from analysis.style import paper_style, save_figure, stamp
from analysis.terminal import show
from cpd.evaluation.gather import find_results
from cpd.evaluation.publish import publish_results
from cpd.run.claim import check_repository_place, claim

#: Files that this or an earlier version writes.
OWN = re.compile(
    r"((success_matrix|usage|retrieval)(_.+)?|stream|losses|masks|methods|profile|transfer|finals|teacher_student"
    r"|teacher_curves|table_(tasks|seeds|methods|look_alikes|starts))\.(pdf|png|txt|csv|tex|md)"
)
EXAMPLES = """examples:
  python -m analysis.build runs/demo                       gather, then draw into runs/demo/figures
  python -m analysis.build analysis/results/demo           draw again from published results
  python -m analysis.build analysis/results/teachers       published teachers and their learning curves
  python -m analysis.build runs/lab-ablation --publish analysis/results/stand-ins/ablation
  python -m analysis.build runs/moe runs/dense --out compare   methods side by side
"""

#: The figures that show one method.
FIGURES_OF_ONE = {"success_matrix": fig_success_matrix, "usage": fig_usage, "retrieval": fig_retrieval}


def build(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write the figures, their captions and the tables.

    Args:
        paths: run directories, which are gathered first, or folders of gathered results. Several are compared
            as methods on one stream.
        out: folder to write to. The default for a single path is `figures` beside its results.

    Returns:
        The files written.

    Raises:
        ValueError: if a path holds no results, or the results cannot be compared.
    """
    folder = figures_folder(paths, out)
    return _build(load_all(paths), folder, sweep=out is None)


def load_all(paths: Sequence[Path]) -> Dataset:
    """Load the results of all paths as one data set; gather runs first."""
    return load_dataset([find_results(path) for path in paths])


def figures_folder(paths: Sequence[Path], out: Path | None) -> Path:
    """Return the folder for the figures, and check that it may hold them."""
    if out is not None:
        claim(out, "figures")
        return out
    if len(paths) != 1:
        raise ValueError("several directories are given without a folder for their figures; add --out DIR")
    path = paths[0].resolve()
    return (path.parent if path.name == "results" else path) / "figures"


def _build(data: Dataset, folder: Path, *, sweep: bool) -> list[Path]:
    """Draw into `folder`. With `sweep`, remove the figures and tables of earlier builds there."""
    check_repository_place(folder, data.labels["teacher_recipe"])
    written: list[Path] = []
    with paper_style():
        for name, method, figure, caption in _figures(data):
            if figure is not None:
                stamp(figure, short_conditions(data, method))
                written += save_figure(figure, folder / name, f"{caption} {conditions(data, method)}")
    written += write_tables(folder, data, conditions(data))
    # Figures of an earlier build, e.g. of fewer methods, would not fit the new ones.
    for path in set(folder.iterdir()) - set(written) if sweep else ():
        if OWN.fullmatch(path.name):
            path.unlink()
    return written


def _figures(data: Dataset) -> Iterable[tuple[str, str | None, Figure | None, str]]:
    """Yield every figure's name, its method if it shows only one, the figure or None, and its caption."""
    methods = data.method_names
    for method in methods:
        for name, module in FIGURES_OF_ONE.items():
            full = name if len(methods) == 1 else f"{name}_{method}"
            yield full, method, module.draw(data, method), module.caption(data, method)
    modules: dict[str, ModuleType] = {}
    if methods:
        modules |= {"stream": fig_stream, "losses": fig_losses}
    if len(methods) > 1:
        modules |= {"methods": fig_methods, "transfer": fig_transfer, "finals": fig_finals}
    if data.teacher_curves:
        modules |= {"teacher_curves": fig_teacher_curves}
    for name, module in modules.items():
        yield name, None, module.draw(data), module.caption(data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m analysis.build`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.build",
        description="Gather a run's results and make its figures and tables. Rebuilding gives the same bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR", help="run directory, or published results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures (default: DIR/figures)")
    parser.add_argument(
        "--publish", type=Path, metavar="DIR", help="copy a run's small tables there first, and draw from them"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.out is not None:
            claim(arguments.out, "figures")
        if len(arguments.paths) == 1 and arguments.paths[0].is_dir() and find_published(arguments.paths[0]):
            if arguments.publish is not None:
                raise ValueError(
                    f"--publish copies results of students, but {arguments.paths[0]} holds published teachers; "
                    "publish the teachers of a run with `python -m jobs.publish RUN_DIR FOLDER`"
                )
            written = build_teachers(arguments.paths[0], arguments.out)
            print(f"{len(written)} files in {written[0].parent}")
            return 0
        paths = arguments.paths
        if arguments.publish is not None:
            if len(paths) != 1:
                raise ValueError("--publish takes one run, but several are given; publish each to its own folder")
            paths = [publish_results(paths[0], arguments.publish)]
        folder = figures_folder(paths, arguments.out)
        data = load_all(paths)
        written = _build(data, folder, sweep=arguments.out is None)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    show(data)
    print(f"{len(written)} files in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
