"""Figures, tables and the printed summary, made from runs with known numbers."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.build import build, main
from analysis.captions import short_conditions
from analysis.dataset import _joined, load_dataset
from analysis.figures import (
    fig_finals,
    fig_methods,
    fig_stream,
    fig_success_matrix,
    fig_teacher_curves,
    fig_transfer,
    fig_usage,
)
from analysis.style import paper_style, stamp
from analysis.terminal import print_summary
from cpd.envs.metaworld.tasks import ALL_TASKS, STREAMS
from cpd.evaluation.gather import find_results, gather
from cpd.evaluation.publish import publish_results
from cpd.run.claim import REPOSITORY_RESULTS
from cpd.run.directory import Run
from tests.synthetic_run import LABELS, write_run

STREAM = STREAMS["demo"]
RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])
TEACHERS = dict(zip(STREAM, (1.0, 0.9, 0.8), strict=True))
FIGURES = (
    "success_matrix",
    "stream",
    "teacher_curves",
    "usage",
)
#: Those that compare methods.
COMPARISONS = ("methods", "finals")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "demo", stream=STREAM, students={1: RATES}, teachers=TEACHERS)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_build_makes_every_figure_and_table(run: Run) -> None:
    written = build([run.root])
    expected = {f"{name}{suffix}" for name in FIGURES for suffix in (".pdf", ".png", ".txt")}
    tables = {f"table_{name}.{form}" for name in ("tasks", "methods") for form in ("csv", "tex", "md")}
    tables.add("table_seeds.csv")
    assert {path.name for path in written[:-1]} == expected | tables | {"success_matrix.csv"}
    assert {path.parent for path in written[:-1]} == {run.figures}
    assert written[-1] == run.root / "report.html"
    for name in FIGURES:
        pdf = (run.figures / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf, "TrueType fonts are embedded"
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
        png = (run.figures / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20], "big") == 990, "one column of 3.3 in at 300 dpi"
        caption = (run.figures / f"{name}.txt").read_text()
        for label in (
            "recipe rl",
            "Horizon 500",
            "identity: none",
            "3.1.1",
            "3.3.0",
            "reward v2",
            "50 for teachers",
        ):
            assert label in caption


def test_tables_hold_the_exact_numbers_and_labels(run: Run) -> None:
    build([run.root])
    rows = read_csv(run.figures / "table_tasks.csv")
    first = rows[0]
    assert (first["task"], first["teacher_state"]) == (STREAM[0], "admitted")
    assert [int(first[f"{n}_successes"]) for n in ("teacher", "before", "own_stage", "final")] == [50, 1, 45, 25]
    assert float(first["forgetting"]) == pytest.approx(0.4)
    assert float(rows[2]["recovery"]) == pytest.approx(1.2)
    (seed,) = read_csv(run.figures / "table_seeds.csv")
    assert float(seed["average_performance"]) == pytest.approx(2.36 / 3)
    assert float(seed["recovery"]) == pytest.approx(2.5 / 3)
    assert float(seed["forgetting_over_all_tasks"]) == pytest.approx(0.1)
    (method,) = read_csv(run.figures / "table_methods.csv")
    assert float(method["average_performance_worst_task"]) == pytest.approx(0.5)
    assert float(method["forgetting_worst_task"]) == pytest.approx(0.4)
    matrix = read_csv(run.figures / "success_matrix.csv")
    values = [[float(row[task]) for task in STREAM] for row in matrix]
    np.testing.assert_allclose(values, RATES)
    for table in (rows, [seed], [method], matrix):
        assert (table[0]["teacher_recipe"], table[0]["horizon"], table[0]["mujoco"]) == ("rl", "500", "3.3.0")
    tex = (run.figures / "table_tasks.tex").read_text()
    stacked = [r"\shortstack[r]{90\\{}[79, 96]}", r"\shortstack[r]{80\\{}[67, 89]}"]
    name = r"\shortstack[l]{handle-\\{}press-\\{}side}"
    assert " & ".join([name, *stacked, stacked[0], "$-$10", r"100 \\"]) in tex
    assert r"\toprule" in tex
    assert "recipe rl" in tex


def test_rebuilding_gives_the_same_bytes_whatever_the_users_own_style(run: Run, tmp_path: Path) -> None:
    build([run.root])
    drawn = {path.name: path.read_bytes() for path in run.figures.iterdir()}
    published = tmp_path / "published" / "demo"
    shutil.copytree(run.results, published)
    shutil.rmtree(run.root)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        build([published])
    again = {path.name: path.read_bytes() for path in (published / "figures").iterdir()}
    assert sorted(again) == sorted(drawn)
    assert [name for name in drawn if drawn[name] != again[name]] == []


def test_analysis_of_published_results_imports_nothing_heavy(run: Run, tmp_path: Path) -> None:
    gather(run)
    published = tmp_path / "published"
    shutil.copytree(run.results, published / "results")
    code = (
        f"import sys; from analysis.build import main; assert main([{str(published)!r}]) == 0; "
        "print([m for m in ('torch', 'mpi4py', 'mujoco', 'metaworld', 'gymnasium') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (published / "figures" / "stream.pdf").exists()


def test_summary_is_plain_text_without_a_terminal(run: Run) -> None:
    gather(run)
    text = io.StringIO()
    print_summary(run.results, text)
    plain = text.getvalue()
    assert "\x1b" not in plain
    line = next(line for line in plain.splitlines() if line.startswith("handle-press-side"))
    assert " ".join(line.split()) == "handle-press-side 90 [79, 96] 80 [67, 89] 90 [79, 96] -10 100"
    assert re.search(r"average performance\s+78\.7 \[\d+\.\d, \d+\.\d\]\s+worst task 50 \(drawer-close\)", plain)
    assert re.search(r"recovery\s+83\.3 .*worst task 50 \(drawer-close\)", plain)
    assert re.search(r"forgetting\s+15\.0 .*worst task 40 \(drawer-close\)", plain)
    assert re.search(r"student: distill\s+1\s+10:00", plain)


def test_several_methods_are_summed_up_side_by_side(tmp_path: Path) -> None:
    variants = {"worse": {1: RATES / 2}}
    run = write_run(tmp_path / "r", stream=STREAM, students={1: RATES}, teachers=TEACHERS, variants=variants)
    gather(run)
    text = io.StringIO()
    print_summary(run.results, text)
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    start = lines.index("methods side by side, in % [as above]")
    assert lines[start + 2].startswith("moe 1 240 78.7 [")
    assert lines[start + 3].startswith("worse 1 240 ")


def test_two_to_four_seeds_show_every_seed_and_five_an_interval(tmp_path: Path) -> None:
    for count, phrase in ((3, "the range of the seeds"), (5, "bootstrap over seeds")):
        students = {seed: np.clip(RATES - 0.02 * (seed % 3), 0, 1) for seed in range(1, count + 1)}
        run = write_run(tmp_path / f"run{count}", stream=STREAM, students=students, teachers=TEACHERS)
        gather(run)
        text = io.StringIO()
        print_summary(run.results, text)
        assert phrase in text.getvalue()


def test_runs_whose_teachers_differ_are_not_drawn_together(tmp_path: Path) -> None:
    for method, rate in (("moe", 1.0), ("dense", 0.5)):
        teachers = dict.fromkeys(STREAM, rate)
        write_run(tmp_path / method, stream=STREAM, students={1: RATES}, teachers=teachers, method=method)
    with pytest.raises(ValueError, match="25/50 and 50/50"):
        build([tmp_path / "moe", tmp_path / "dense"], tmp_path / "out")


def test_methods_on_one_stream_are_drawn_together(tmp_path: Path) -> None:
    for method, keep in (("moe", 1.0), ("dense", 0.5)):
        rates = RATES * keep
        write_run(tmp_path / method, stream=STREAM, students={1: rates}, teachers=TEACHERS, method=method)
    paths = [tmp_path / "moe", tmp_path / "dense"]
    written = {path.name for path in build(paths, tmp_path / "out")}
    assert {"success_matrix_moe.pdf", "success_matrix_dense.pdf", "stream.pdf"} <= written
    assert {f"{name}.pdf" for name in COMPARISONS} <= written
    assert "transfer.pdf" not in written, "there are no students of single tasks to measure it from"
    rows = read_csv(tmp_path / "out" / "table_methods.csv")
    assert [row["method"] for row in rows] == ["moe", "dense"]
    assert [row["improvement_by_first_method"] for row in rows] == ["", "1.0"]
    with pytest.raises(ValueError, match="--out"):
        build(paths)


def test_figures_of_one_method_have_its_task_identity(tmp_path: Path) -> None:
    for name in ("given", "none"):
        labels = replace(LABELS, task_identity=name)
        root = tmp_path / name
        write_run(root, stream=STREAM, students={1: RATES}, teachers=TEACHERS, method=name, labels=labels)
    build([tmp_path / "given", tmp_path / "none"], tmp_path / "both")
    for name in ("given", "none"):
        caption = (tmp_path / "both" / f"success_matrix_{name}.txt").read_text()
        assert f"task identity: {name}." in caption
    assert "task identity: given/none." in (tmp_path / "both" / "methods.txt").read_text()


def test_students_that_one_of_several_runs_has_are_not_missing(tmp_path: Path) -> None:
    """Two runs of one recipe, each with students of some of its methods."""
    options = {"stream": STREAM, "teachers": TEACHERS, "variants": {"a": {1: RATES}, "b": {}}}
    left = write_run(tmp_path / "left", **options, students={1: RATES})
    right = write_run(tmp_path / "right", **options, students={1: RATES})
    shutil.rmtree(left.root / "students" / "a")
    shutil.rmtree(right.root / "students" / "moe")
    data = load_dataset([find_results(path) for path in (left.root, right.root)])
    assert [line for line in data.missing if "no student" in line] == ["no student of b has been evaluated"]
    assert _joined([{"task_identity": "inferred/none"}, {"task_identity": "none"}]) == {
        "task_identity": "inferred/none"
    }


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path, run: Run) -> None:
    options = {"stream": STREAM, "students": {1: RATES}, "teachers": TEACHERS}
    scripted = replace(LABELS, teacher_recipe="scripted")
    stand_in = write_run(tmp_path / "stand-in", **options, method="b", labels=scripted)
    with pytest.raises(ValueError, match="teacher_recipe 'scripted' and 'rl'"):
        build([run.root, stand_in.root], tmp_path / "out")
    twin = write_run(tmp_path / "twin", **options)
    with pytest.raises(ValueError, match="'moe'"):
        build([run.root, twin.root], tmp_path / "out")
    other = {"stream": STREAM[:2], "students": {1: RATES[:3, :2]}, "method": "c"}
    shorter = write_run(tmp_path / "shorter", **{**options, **other})
    with pytest.raises(ValueError, match=str(shorter.results)):
        build([run.root, shorter.root], tmp_path / "out")
    tuning = write_run(tmp_path / "tried", **options, goal_set="validation")
    with pytest.raises(ValueError, match="validation"):
        build([run.root, tuning.root], tmp_path / "out")


def test_results_on_validation_goals_say_so_and_are_kept_apart(tmp_path: Path, run: Run) -> None:
    options = {"stream": STREAM, "students": {1: RATES}, "teachers": TEACHERS}
    tried = write_run(tmp_path / "tried", **options, goal_set="validation")
    assert gather(tried)["students"] == gather(run)["students"]
    build([tried.root])
    caption = (tried.root / "figures" / "success_matrix.txt").read_text()
    assert "on validation goals" in caption and "held-out" not in caption
    with pytest.raises(ValueError, match="tuning/"):
        publish_results(tried.root, REPOSITORY_RESULTS / "tried")


def test_partial_runs_get_the_figures_that_their_data_allow(tmp_path: Path, run: Run) -> None:
    shutil.rmtree(run.root / "students")
    names = {path.name for path in build([run.root])}
    assert "teacher_curves.pdf" in names
    assert "stream.pdf" not in names
    text = io.StringIO()
    print_summary(run.results, text)
    assert any(line.startswith("note: ") and "moe" in line for line in text.getvalue().splitlines())
    rates = RATES.copy()
    rates[3] = np.nan
    unfinished = write_run(tmp_path / "unfinished", stream=STREAM, students={1: rates}, teachers=TEACHERS)
    assert (unfinished.figures / "stream.pdf") in build([unfinished.root])
    text = io.StringIO()
    print_summary(unfinished.results, text)
    assert "window-close" in text.getvalue() and not re.search(r"average performance +\d", text.getvalue())


def test_command_line_explains_a_wrong_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "figures"):
        assert main([str(tmp_path), "--out", str(out)]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err


def test_no_figure_is_drawn_among_a_run_s_own_files(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(run.root.rglob("*"))
    for folder in ("students", "teachers/push-v3", "logs"):
        assert main([str(run.root), "--out", str(run.root / folder)]) == 2
        assert str(run.root) in capsys.readouterr().err
    assert sorted(run.root.rglob("*")) == files


def test_a_folder_that_holds_results_folders_names_them(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "teachers" / "inner", tmp_path / "outer"):
        publish_results(run.root, folder)
    assert main([str(tmp_path)]) == 2
    assert "demo, outer, teachers/inner" in capsys.readouterr().err


def stream_of(length: int) -> tuple[str, ...]:
    named = {3: STREAMS["demo"], 10: STREAMS["cw10"], 20: STREAMS["cw20"], 50: ALL_TASKS}
    return named[length]


def draw_all(folder: Path) -> Iterator[Figure]:
    data = load_dataset([folder])
    with paper_style():
        several = len(data.method_names) > 1
        figures = [
            fig_success_matrix.draw(data, data.method_names[0]),
            fig_stream.draw(data),
            fig_usage.draw(data, data.method_names[0]),
            *(
                (draw(data) for draw in (fig_methods.draw, fig_transfer.draw, fig_finals.draw))
                if several
                else (fig_teacher_curves.draw(data),)
            ),
        ]
        for figure in figures:
            assert figure is not None
            stamp(figure, short_conditions(data))
            yield figure


def visible_texts(figure: Figure) -> list[Text]:
    """Return every text of a figure, except tick labels outside the axes' limits, which are not drawn."""
    shown = [axes for axes in figure.axes if axes.get_visible()]
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.texts)]
    for axes in shown:
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in [axes.xaxis, axes.yaxis, *(child.xaxis for child in axes.child_axes)]:
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [text for text in texts if text.get_visible() and text.get_text()]


@pytest.mark.parametrize(
    ("length", "num_variants"),
    [(3, 0), (3, 2), (10, 0), (10, 13), (20, 0), (50, 0), pytest.param(50, 4, marks=pytest.mark.slow)],
)
def test_names_are_neither_clipped_nor_on_top_of_each_other(
    tmp_path: Path, length: int, num_variants: int
) -> None:
    stream = stream_of(length)
    tasks = tuple(dict.fromkeys(stream))
    rng = np.random.default_rng(length)

    def students() -> dict[int, np.ndarray]:
        return {1: rng.integers(0, 11, (length + 1, len(tasks))) / 10}

    # A skipped stage has the longest name of all.
    teachers = {task: 0.94 for task in tasks if task != "stick-pull-v3"}
    names = ["single-task", *(f"without-part-{i}" for i in range(1, num_variants))][:num_variants]
    variants = {name: students() for name in names}
    run = write_run(
        tmp_path / "run",
        stream=stream,
        students=students(),
        teachers=teachers,
        variants=variants,
        protocols={"single-task": "single_task"},
    )
    gather(run)
    for figure in draw_all(run.results):
        check_layout(figure)


def check_layout(figure: Figure) -> None:
    figure.draw_without_rendering()
    boxes = [(text, text.get_window_extent()) for text in visible_texts(figure)]
    assert len(boxes) > 3
    for text, box in boxes:
        assert box.x0 > -0.5, text
        assert box.y0 > -0.5, text
        assert box.x1 < figure.bbox.x1 + 0.5, text
        assert box.y1 < figure.bbox.y1 + 0.5, text
    # The boxes of slanted names overlap where the letters do not.
    upright = [(text, box) for text, box in boxes if text.get_rotation() in (0, 90)]
    low = np.array([box.min for _, box in upright])
    high = np.array([box.max for _, box in upright])
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    overlap = np.triu(shared.min(axis=-1) >= 1.0, k=1)
    assert not overlap.any(), [(upright[i][0], upright[j][0]) for i, j in np.argwhere(overlap)]
