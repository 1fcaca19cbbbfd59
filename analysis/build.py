"""Draw the figures and write the tables of results, without torch, MPI or the simulator.

results of students -> Dataset -> analysis.figures, analysis.paper_tables
published teachers  -> analysis.build_teachers
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

from matplotlib.figure import Figure

from analysis.build_teachers import build_teachers
from analysis.captions import conditions, short_conditions
from analysis.dataset import Dataset, load_dataset
from analysis.figures import (
    fig_finals,
    fig_methods,
    fig_parameters,
    fig_reliability,
    fig_stream,
    fig_success_matrix,
    fig_teacher_curves,
    fig_transfer,
    fig_usage,
)
from analysis.paper_tables import write_tables
from analysis.published_teachers import find_published
from analysis.report_page import write_page
from analysis.style import paper_style, save_figure, stamp
from analysis.terminal import show
from cpd.evaluation.gather import find_results
from cpd.evaluation.publish import publish_results
from cpd.run.claim import check_repository_place, claim
from cpd.run.command import exit_quietly
from cpd.run.directory import Run
from cpd.run.folders import kind_of
from cpd.run.shortage import shortage

#: Names of the files that this version or an earlier one writes.
WRITTEN_FILES = re.compile(
    r"((success_matrix|usage|retrieval|reliability)(_.+)?|stream|losses|masks|methods|parameters|profile|transfer|finals|teacher_student"
    r"|teacher_curves|table_(tasks|seeds|methods|look_alikes|starts))\.(pdf|png|txt|csv|tex|md)"
)
EXAMPLES = """examples:
  cpd build runs/demo                           gather, then draw into runs/demo/figures
  cpd build analysis/results/demo               draw again from published results
  cpd build analysis/results/teachers           published teachers and their learning curves
  cpd build runs/lab-ablation --publish analysis/results/stand-ins/ablation
  cpd build runs/moe runs/dense --out compare   methods side by side
"""

#: The figures that show one method.
FIGURES_OF_ONE = {"success_matrix": fig_success_matrix, "usage": fig_usage, "reliability": fig_reliability}


def build(
    paths: Sequence[Path], out: Path | None = None, report: Callable[[Dataset], None] = lambda data: None
) -> list[Path]:
    """Write the figures, their captions and the tables, and last a page with all of them, `report.html`.

    Args:
        paths: run directories, which are gathered first, or folders of gathered results. Several are compared
            as methods on one stream. A single path may also be or hold folders of published teachers.
        out: folder to write to; the default for a single path is `figures` beside its results, and the folder of
            that for the page. Figures and tables of earlier builds are removed from the default folder.
        report: called with the data set once the files are written; not called for published teachers.

    Returns:
        The files written.

    Raises:
        ValueError: if a path holds no results, or the results cannot be compared.
    """
    if out is not None:
        claim(out, "figures")
    if len(paths) == 1 and find_published(paths[0]):
        return build_teachers(paths[0], out)
    folder = _figures_folder(paths, out)
    sources = [find_results(path) for path in paths]
    data = load_dataset(sources)
    check_repository_place(folder, data.labels["teacher_recipe"])
    written: list[Path] = []
    captions: dict[Path, str] = {}
    with paper_style():
        for name, method, figure, caption in _figures(data):
            if figure is not None:
                stamp(figure, short_conditions(data, method))
                written += save_figure(figure, folder / name, f"{caption} {conditions(data, method)}")
                captions[folder / f"{name}.png"] = caption
    written += write_tables(folder, data, conditions(data))
    # Figures of an earlier build, e.g. of other methods, would contradict the new ones.
    for path in set(folder.iterdir()) - set(written) if out is None else ():
        if WRITTEN_FILES.fullmatch(path.name):
            path.unlink()
    root = folder.parent if out is None else folder
    run = Run(root) if out is None and kind_of(root) == "run" else None
    written.append(write_page(root / "report.html", data, captions, sources, run))
    report(data)
    return written


def _figures_folder(paths: Sequence[Path], out: Path | None) -> Path:
    if out is not None:
        return out
    if len(paths) != 1:
        raise ValueError("several directories are given without a folder for their figures; add --out DIR")
    path = paths[0].resolve()
    return (path.parent if path.name == "results" else path) / "figures"


def _figures(data: Dataset) -> Iterable[tuple[str, str | None, Figure | None, str]]:
    """Yield every figure's name, its method if it shows only one, the figure or None, and its caption."""
    methods = data.method_names
    for method in methods:
        for name, module in FIGURES_OF_ONE.items():
            full = name if len(methods) == 1 else f"{name}_{method}"
            yield full, method, module.draw(data, method), module.caption(data, method)
    modules: dict[str, ModuleType] = {}
    if methods:
        modules |= {"stream": fig_stream}
    if len(methods) > 1:
        modules |= {
            "methods": fig_methods,
            "parameters": fig_parameters,
            "transfer": fig_transfer,
            "finals": fig_finals,
        }
    if data.teacher_curves:
        modules |= {"teacher_curves": fig_teacher_curves}
    for name, module in modules.items():
        yield name, None, module.draw(data), module.caption(data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `cpd build`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="cpd build",
        description="Gather a run's results and make its figures and tables. Rebuilding gives the same bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR", help="run directory, or published results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures (default: DIR/figures)")
    parser.add_argument(
        "--publish", type=Path, metavar="DIR", help="copy a run's small tables there first, and draw from them"
    )
    parser.add_argument(
        "--students",
        action="append",
        default=[],
        metavar="NAME",
        help="with --publish: also publish these students, such as students/ewc; repeatable (default: the first "
        "seed of the first method)",
    )
    arguments = parser.parse_args(argv)
    try:
        paths = arguments.paths
        if arguments.publish is not None:
            if arguments.out is not None:  # before anything is published
                claim(arguments.out, "figures")
            if len(paths) != 1:
                raise ValueError("--publish takes one run, but several are given; publish each to its own folder")
            if find_published(paths[0]):
                raise ValueError(
                    f"--publish copies results of students, but {paths[0]} holds published teachers; "
                    "publish the teachers of a run with `cpd publish RUN_DIR FOLDER`"
                )
            paths = [publish_results(paths[0], arguments.publish, arguments.students)]
        written = build(paths, arguments.out, report=show)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {shortage(error, Path.cwd()) or error}", file=sys.stderr)
        return 2
    print(f"{len(written)} files in {written[0].parent}")
    if written[-1].suffix == ".html":
        print(f"all in one page: {written[-1]}")
    return 0


if __name__ == "__main__":
    exit_quietly(main)
