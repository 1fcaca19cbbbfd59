"""Drawing all published folders again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.draw_published import draw_folder, figure_folders
from cpd.envs.metaworld.tasks import STREAMS
from cpd.evaluation.publish import publish_results
from cpd.run.claim import REPOSITORY_RESULTS
from tests.synthetic_run import write_run

RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])


def test_every_published_folder_is_drawn_into_figures_of_its_own(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "r", stream=STREAMS["demo"], students={1: RATES}, teachers=dict.fromkeys(STREAMS["demo"], 0.9)
    )
    publish_results(run.root, tmp_path / "results" / "group" / "one")
    publish_results(run.root, tmp_path / "results" / "two")
    folders = figure_folders(tmp_path / "results")
    assert set(folders) == {tmp_path / "results" / name / "figures" for name in ("group/one", "two")}
    target = tmp_path / "results" / "two" / "figures"
    num_files, _ = draw_folder(target, folders[target])
    assert num_files == len([*target.iterdir(), target.parent / "report.html"]) > 1


def test_all_committed_results_are_drawn() -> None:
    drawn = {folder for sources in figure_folders(REPOSITORY_RESULTS).values() for folder in sources}
    committed = {path.parent for path in REPOSITORY_RESULTS.rglob("config.json")}
    assert {folder for folder in committed if not {folder, folder.parent} & drawn} == set()
