"""Results that do not belong together are refused: foreign, missing and doubled rows, and contradicting tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cpd.envs.metaworld.tasks import STREAMS
from cpd.evaluation.gather import gather
from cpd.evaluation.results_folder import read_tables
from cpd.reading import DamagedFileError
from cpd.run.directory import Run, RunError
from tests.synthetic_run import write_run

RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])
STREAM = STREAMS["demo"]
FIRST, SECOND, LAST = STREAM


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("results") / "run"
    made = write_run(root, stream=STREAM, students={1: RATES}, teachers=dict.fromkeys(STREAM, 0.9))
    gather(made)
    starts = [f"{task},1,{other},50,{25 if task == other else 1}" for task in STREAM for other in STREAM]
    (made.results / "starts.csv").write_text("\n".join(["task,seed,other,episodes,nearest", *starts, ""]))
    read_tables(made.results)
    return made


def change(folder: Path, name: str, old: str, new: str | None) -> None:
    """Replace `old` in the first line of a table that contains it, or remove that line."""
    lines = (folder / name).read_text().splitlines()
    number = next(number for number, line in enumerate(lines) if old in line)
    lines[number : number + 1] = [] if new is None else [lines[number].replace(old, new)]
    (folder / name).write_text("\n".join([*lines, ""]))


@pytest.mark.parametrize(
    ("name", "old", "new", "place"),
    [
        ("evaluations.csv", "moe,1,0,", "mow,1,0,", "line .: method 'mow'"),
        ("evaluations.csv", "moe,1,0,", "moe,2,0,", "line .: seed 2"),
        ("evaluations.csv", "teacher,1,", "teacher,2,", "line .: seed 2"),
        ("evaluations.csv", "moe,1,0,", "moe,1,,", "line .: stage None"),
        ("evaluations.csv", "moe,1,2,", "moe,1,3,", "line .*: stage 3"),
        ("evaluations.csv", f"moe,1,0,{FIRST}", "moe,1,0,hammer-v3", "line .: task 'hammer-v3'"),
        ("evaluations.csv", "held_out", "validation", "line 2: goal_set 'validation'"),
        ("evaluations.csv", ",rl,500,", ",scripted,500,", "line 2: teacher_recipe 'scripted'"),
        ("evaluations.csv", ",rl,500,", ",rl,200,", "line 2: horizon 200"),
        ("evaluations.csv", ",50,45,", ",50,46,", "line 2: successes is 46, but 45"),
        ("evaluations.csv", ",45,10.0", ",44,10.0", "line 2: successes_last is 44, but 45"),
        ("evaluations.csv", ",45,10.0", ",45,10.5", r"line 2: mean_return is 10\.5, but 10"),
        ("evaluations.csv", ",50,45,", ",49,45,", "line 2: episodes is 49, but 50"),
        ("evaluations.csv", f"moe,1,1,{SECOND}", None, f"no row of {SECOND} .*stage 1"),
        ("evaluations.csv", "teacher,1,", None, "no row of .*'teacher', 1"),
        ("episodes.csv", "moe,1,0,", None, "evaluations.csv, line .: episodes is .*, but"),
        ("episodes.csv", ",120,", ",501,", "line 2: length 501"),
        ("teachers.csv", SECOND, None, f"no row of {SECOND} seed 1"),
        ("teachers.csv", f"{SECOND},1", f"{SECOND},7", "line 3: seed 7"),
        ("curves.csv", f",500,{FIRST}", None, "no row of moe seed 1 stage 0 step 500"),
        ("curves.csv", FIRST, SECOND, f"line 2: task '{SECOND}'"),
        ("stages.csv", "moe,1,2", None, "no row of moe seed 1 stage 2"),
        ("stages.csv", SECOND, FIRST, f"line 4: task '{FIRST}'"),
        ("losses.csv", FIRST, LAST, f"line 2: task '{LAST}'"),
        ("usage.csv", f"moe,1,2,{SECOND},1,3", None, f"no row of {SECOND} with .*layer 1, expert 3"),
        ("retrieval.csv", f"moe,1,2,{SECOND},5", None, f"no row of {SECOND} with .*step 5"),
        ("starts.csv", f"{FIRST},1,{FIRST}", None, f"no row of {FIRST} seed 1"),
        ("starts.csv", f",1,{SECOND}", ",1,hammer-v3", "line .: other 'hammer-v3'"),
    ],
)
def test_tables_that_contradict_each_other_are_refused_by_row(
    run: Run, tmp_path: Path, name: str, old: str, new: str | None, place: str
) -> None:
    shutil.copytree(run.results, tmp_path / "copy")
    change(tmp_path / "copy", name, old, new)
    with pytest.raises(DamagedFileError, match=f"{place if place.endswith('but') else name + '.*' + place}"):
        read_tables(tmp_path / "copy")


@pytest.mark.parametrize(("source", "target"), [(0, 1), (2, -1)])
def test_a_row_of_the_matrix_in_the_place_of_another_is_refused(
    run: Run, tmp_path: Path, source: int, target: int
) -> None:
    copy = Run(shutil.copytree(run.root, tmp_path / "copy"))
    element = copy.evaluations()[0]
    for file in (element.row_file, element.row_episodes_file):
        shutil.copyfile(file(source), file(target))
    place = f"{element.row_file(target)}, line 2: stage is {source}, .*{target}"
    with pytest.raises(DamagedFileError, match=place):
        gather(copy)


def test_episodes_without_their_row_are_those_of_an_evaluation_that_was_killed(run: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(run.root, tmp_path / "copy"))
    copy.evaluations()[0].row_file(1).unlink()
    assert "student moe (seed 1) has not been evaluated after stages 1" in gather(copy)["missing"]


def test_a_results_folder_without_its_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"config\.json"):
        read_tables(tmp_path)
