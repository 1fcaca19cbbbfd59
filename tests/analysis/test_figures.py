"""What figures plot, against rates that a test chooses."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import analysis.build
from analysis.beliefs import beliefs
from analysis.build import build
from analysis.dataset import Dataset, load_dataset
from analysis.figures import (
    fig_methods,
    fig_reliability,
    fig_stream,
    fig_success_matrix,
    fig_transfer,
    fig_usage,
)
from analysis.figures.fig_stream import MOST_LINES
from analysis.paper_tables import task_cells
from analysis.style import paper_style
from analysis.terminal import show
from cpd.envs.metaworld.tasks import STREAMS
from cpd.evaluation.gather import gather
from cpd.evaluation.measures import SuccessMatrix
from cpd.evaluation.results_folder import read_tables
from cpd.evaluation.student_measures import rate_before
from cpd.evaluation.summary import summarize
from cpd.reading import read_json
from cpd.run.directory import RunError
from cpd.run.files import write_json
from tests.synthetic_run import write_run

STREAM = STREAMS["demo"]
RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])
TEACHERS = dict(zip(STREAM, (1.0, 0.9, 0.8), strict=True))
RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"
PUBLISHED = sorted(path.parent for path in RESULTS.rglob("metrics.json"))


def made(root: Path, **over: object) -> Dataset:
    settings = {"stream": STREAM, "students": {1: RATES}, "teachers": TEACHERS, **over}
    run = write_run(root, **settings)  # type: ignore[arg-type]
    gather(run)
    return load_dataset([run.results])


def texts(figure: Figure, axes: int) -> list[str]:
    return [text.get_text() for text in figure.axes[axes].texts]


def test_the_success_matrix_is_that_of_the_students_and_outlines_every_task_s_own_stage(tmp_path: Path) -> None:
    figure = fig_success_matrix.draw(made(tmp_path / "r"), "moe")
    assert texts(figure, 0) == [f"{100 * rate:.0f}" for rate in RATES.flat]
    assert texts(figure, 1) == ["100", "90", "80"]
    outlines = [patch.get_xy() for patch in figure.axes[0].patches]
    assert outlines == [(stage - 0.5, stage + 0.5) for stage in range(3)]


def doubtful(data: Dataset) -> Dataset:
    """In 40 of a task's 50 final episodes the right task has .8, in the other ten the first task has .4."""
    rows = [
        row
        if row.method == "teacher"
        else replace(row, believed=row.task, confidence=0.8, plan_first=row.task, plan_second=row.task)
        if row.goal < 40
        else replace(row, believed=STREAM[0], confidence=0.4, plan_first=STREAM[1], plan_second=STREAM[0])
        for row in data.tables.episodes
    ]
    return replace(data, tables=replace(data.tables, episodes=rows))


def test_confidence_is_plotted_against_how_often_the_belief_is_right(tmp_path: Path) -> None:
    data = made(tmp_path / "r")
    assert beliefs(data, "moe") is None and fig_reliability.draw(data, "moe") is None
    data = doubtful(data)
    axes = fig_reliability.draw(data, "moe").axes[0]
    points = axes.containers[0].lines[0]
    np.testing.assert_allclose(points.get_xdata(), [0.4, 0.8])
    np.testing.assert_allclose(points.get_ydata(), [1 / 3, 1.0])
    assert [text.get_text() for text in axes.texts] == ["30", "120"]
    held = beliefs(data, "moe")
    assert (held.episodes, held.right, held.other_plans) == (150, 130, 30)
    assert held.mean_confidence == pytest.approx(0.72)
    # Successes come first in `RATES`: those beyond the 40th episode.
    assert held.other_successes == sum(max(round(50 * rate) - 40, 0) for rate in RATES[3])
    text = io.StringIO()
    show(data, text)
    assert re.search(r"task inferred\s+right in 86\.7 % of 150 episodes, mean confidence 72\.0 %", text.getvalue())


def test_only_seeds_that_came_to_the_end_are_averaged(tmp_path: Path) -> None:
    unfinished = RATES * 0.2
    unfinished[3] = np.nan
    data = made(tmp_path / "r", students={1: RATES, 2: unfinished})
    assert [student.seed for student in data.of_method("moe")] == [1]
    assert texts(fig_success_matrix.draw(data, "moe"), 0) == [f"{100 * rate:.0f}" for rate in RATES.flat]
    assert "mean of" not in fig_success_matrix.caption(data, "moe")
    ongoing = made(tmp_path / "s", students={1: unfinished, 2: unfinished})
    assert [student.seed for student in ongoing.of_method("moe")] == [1, 2]


def test_lines_over_the_stream_are_means_of_rows(tmp_path: Path) -> None:
    axes = fig_stream.draw(made(tmp_path / "r")).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["mean of all tasks"].get_ydata() == pytest.approx(RATES.mean(axis=1))
    assert lines["mean of tasks so far"].get_ydata() == pytest.approx([0.9, 0.75, RATES[3].mean()])


def test_more_methods_than_colours_have_a_panel_each(tmp_path: Path) -> None:
    rates = {f"part-{i}": np.round(RATES * (1 - i / 10), 1) for i in range(1, MOST_LINES + 1)}
    data = made(tmp_path / "r", variants={name: {1: values} for name, values in rates.items()})
    panels = [axes for axes in fig_stream.draw(data).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["moe", *rates]
    for axes, values in zip(panels, [RATES, *rates.values()], strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert lines["moe"] == pytest.approx(RATES.mean(axis=1))
        assert lines["each method"] == pytest.approx(values.mean(axis=1))
    assert "Grey: moe." in fig_stream.caption(data)


def test_bars_of_methods_are_the_measures_and_no_line_is_cut_off(tmp_path: Path) -> None:
    gaining = np.array([[0.1, 0.0, 0.0], [0.5, 0.1, 0.0], [0.7, 0.6, 0.2], [0.8, 0.7, 0.8]])
    data = made(tmp_path / "r", variants={"gaining": {1: gaining}})
    with paper_style():
        figure = fig_methods.draw(data)
    widths = [[patch.get_width() for patch in axes.patches] for axes in figure.axes]
    assert widths[0] == pytest.approx([RATES[3].mean(), gaining[3].mean()])
    assert widths[1] == pytest.approx([np.mean([0.5, 1, 1]), np.mean([0.8, 0.7 / 0.9, 1])])
    assert widths[2] == pytest.approx([np.mean([0.4, -0.1]), np.mean([-0.3, -0.1])])
    for axes in figure.axes:
        low, high = axes.get_xlim()
        drawn = [x for line in axes.lines for x in line.get_xdata()]
        assert low <= min(drawn) and (max(drawn) <= high or high == 1)


def test_bars_of_methods_have_numbers_and_a_line_at_their_teachers(tmp_path: Path) -> None:
    joint = {"variants": {"all": {1: RATES}}, "protocols": {"all": "joint"}}
    with paper_style():
        figure = fig_methods.draw(made(tmp_path / "r", **joint))
    mean = f"{100 * RATES[3].mean():.1f}"
    assert texts(figure, 0) == [mean, mean]
    assert texts(figure, 2) == ["15.0", "cannot forget"]
    guides = [next(line for line in axes.lines if line.get_linestyle() != "-") for axes in figure.axes]
    assert [guide.get_xdata()[0] for guide in guides] == pytest.approx([0.9, 1.0, 0.0])


@pytest.mark.parametrize("steps", [1_000, 2_000])
def test_curves_lie_within_their_stages(tmp_path: Path, steps: int) -> None:
    run = write_run(tmp_path / "r", stream=STREAM, students={1: RATES, 2: RATES}, teachers=TEACHERS)
    config = read_json(run.config_path, dict)
    config["distill"]["steps_per_stage"] = steps
    write_json(run.config_path, config)
    gather(run)
    data = load_dataset([run.results])
    current = [line for line in fig_stream.draw(data).axes[0].lines if len(line.get_xdata()) == 11]
    for stage, line in enumerate(current):
        places = [stage + 100 * point / steps for point in range(11)]
        assert list(line.get_xdata()) == pytest.approx(places)
        assert line.get_ydata()[0] == pytest.approx(RATES[stage, stage])
    assert len(current) == 3
    assert f"the current task within every stage ({steps} steps each)" in fig_stream.caption(data)


def test_the_caption_does_not_name_curves_that_are_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    run.students()[0].curves.unlink()
    gather(run)
    assert "current task" not in fig_stream.caption(load_dataset([run.results]))


def test_rejected_teachers_count_as_0_where_teachers_are_the_measure(tmp_path: Path) -> None:
    rates = np.where(np.arange(3) == 1, 0.0, RATES)
    teachers = {task: rate for task, rate in TEACHERS.items() if task != STREAM[1]}
    data = made(tmp_path / "r", students={1: rates}, teachers=teachers, variants={"b": {1: rates}})
    assert data.teacher_scores == [1.0, 0.0, 0.8]
    measured = [student.measures.tasks[1] for student in data.of_method("moe")]
    assert task_cells(data, STREAM[1], measured)[0].endswith("rejected")


def test_usage_is_the_share_of_every_task_s_choices_of_the_first_seed(tmp_path: Path) -> None:
    data = made(tmp_path / "r", students={1: RATES, 2: RATES * 0.5})
    usage = [replace(r, chosen=r.chosen + r.seed * r.expert) for r in data.tables.usage]
    data = replace(data, tables=replace(data.tables, usage=usage))
    shares = fig_usage._shares(data, "moe")
    assert shares is not None
    for layer, column, expert in np.ndindex(shares.shape):
        rows = [row for row in data.tables.usage if (row.seed, row.layer, row.task) == (1, layer, STREAM[column])]
        chosen = sum(row.chosen for row in rows if row.expert == expert)
        assert shares[layer, column, expert] == pytest.approx(chosen / sum(row.chosen for row in rows))


def test_numbers_of_transfer_keep_their_zeros() -> None:
    assert [fig_transfer.gain_text(value, 2) for value in (-10.67, -0.5, 0.07, 0.0)] == [
        "\N{MINUS SIGN}10.67",
        "\N{MINUS SIGN}.50",
        ".07",
        ".00",
    ]


def test_a_separate_student_of_every_stage_begins_like_the_first() -> None:
    episodes = np.full((4, 2), 10)
    matrix = SuccessMatrix(("a", "b", "a"), ("a", "b"), np.array([[1, 0], [9, 0], [9, 8], [7, 8]]), episodes)
    assert rate_before(matrix, 2) == 0.9
    assert rate_before(matrix, 2, single_task=True) == 0.1


def test_figures_of_earlier_builds_are_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = analysis.build._figures
    monkeypatch.setattr(
        analysis.build, "_figures", lambda data: (f for f in drawn(data) if f[0].startswith("success_matrix"))
    )
    run = write_run(
        tmp_path / "r", stream=STREAM, students={1: RATES}, teachers=TEACHERS, variants={"b": {1: RATES}}
    )
    figures, paper = run.root / "figures", tmp_path / "paper"
    for folder in (figures, paper):
        folder.mkdir()
        for name in ("success_matrix.pdf", "notes.txt"):
            (folder / name).write_text("before")
    build([run.root])
    assert not list(figures.glob("success_matrix.*")) and (figures / "success_matrix_b.pdf").exists()
    assert (figures / "notes.txt").exists()
    build([run.root], paper)
    assert (paper / "success_matrix.pdf").exists(), "nothing is removed from the user's folder"
    with pytest.raises(RunError, match=re.escape(str(figures))):
        build([run.root], run.root)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_published_measures_are_what_their_raw_tables_give(folder: Path) -> None:
    published = read_json(folder / "metrics.json", dict)
    del published["provenance"]
    published.pop("kind", None)  # earlier versions did not write it
    assert json.loads(json.dumps(summarize(read_tables(folder)).to_json())) == published
