"""Tables read back exactly what was written."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.envs.metaworld.tasks import ALL_TASKS
from cpd.reading import DamagedFileError
from cpd.run.table_files import LARGE_TABLE, compress_tables, find_table
from cpd.run.tables import LARGEST_INTEGER, EpisodeRow, EvaluationRow, GoalSet, TableRow, read_rows, write_rows

# Labels are names: text without control characters.
NAME = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


COUNT = st.integers(0, LARGEST_INTEGER)
VALUES: dict[str, st.SearchStrategy] = {
    "seed": st.integers(1, LARGEST_INTEGER),
    "stage": st.none() | st.integers(-1, LARGEST_INTEGER),
    "task": st.sampled_from(ALL_TASKS),
    "goal_set": st.sampled_from(get_args(GoalSet)),
    "goal": COUNT,
    "length": st.integers(1, LARGEST_INTEGER),
    "episodes": st.just(LARGEST_INTEGER),
    "successes": st.just(LARGEST_INTEGER),
    "successes_last": st.none() | COUNT,
    "success": st.just(True),
    **dict.fromkeys(("believed", "plan_first", "plan_second"), st.none() | st.sampled_from(ALL_TASKS)),
    "confidence": st.none() | st.floats(0, 1),
}
BY_TYPE = {str: NAME, float: st.floats(allow_nan=False, allow_infinity=False)}


def tables_of(kind: type[TableRow]) -> st.SearchStrategy[list]:
    values = {name: VALUES.get(name, BY_TYPE.get(hint)) for name, hint in get_type_hints(kind).items()}
    built = st.builds(kind, **{name: value for name, value in values.items() if value is not None})
    return st.lists(built, min_size=1, max_size=5, unique_by=lambda row: tuple(getattr(row, c) for c in kind.KEY))


@pytest.mark.parametrize("kind", [EvaluationRow, EpisodeRow])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, kind: type, data: st.DataObject) -> None:
    rows = data.draw(tables_of(kind))
    path = tmp_path_factory.mktemp("tables") / "rows.csv"
    write_rows(path, rows)
    assert read_rows(path, kind) == rows


def test_columns_are_the_published_ones(tmp_path: Path) -> None:
    row = EvaluationRow(
        *("rl", 500, "none", "v2", "3", "4"),
        method="moe",
        seed=1,
        stage=None,
        task="push-v3",
        goal_set="held_out",
        episodes=50,
        successes=49,
        successes_last=None,
        mean_return=0.1,
    )
    write_rows(tmp_path / "evaluation.csv", [row])
    assert (tmp_path / "evaluation.csv").read_text() == (
        "method,seed,stage,task,goal_set,episodes,successes,successes_last,mean_return,"
        "teacher_recipe,horizon,task_identity,reward_version,metaworld,mujoco\n"
        "moe,1,,push-v3,held_out,50,49,,0.1,rl,500,none,v2,3,4\n"
    )
    episode = EpisodeRow("teacher", 1, None, "push-v3", "training", 3, True, False, 500, 1e-7)
    write_rows(tmp_path / "episodes.csv", [episode])
    assert (tmp_path / "episodes.csv").read_text() == (
        "method,seed,stage,task,goal_set,goal,success,success_last,length,episode_return\n"
        "teacher,1,,push-v3,training,3,1,0,500,1e-07\n"
    )


HEADER = "method,seed,stage,task,goal_set,goal,success,success_last,length,episode_return"
GOOD = "teacher,1,,push-v3,training,3,1,0,500,1.0"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""),
        ("method,seed\n", ""),
        (f"{HEADER}\n{GOOD}\nteacher,1\n", "line 3: 2 values"),
        (f"{HEADER}\n{GOOD}", "line 2: "),  # cut off
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", "line 3: .*method, seed, stage, task, goal_set, goal"),
        (f'{HEADER}\n{GOOD}\n"a\rb,1', "line "),
        *(
            (f"{HEADER}\n{GOOD}\n{GOOD.replace(',3,', ',4,').replace(old, new)}\n", f"line 3: {column}")
            for column, old, new in [
                ("seed", ",1,,", ",0,,"),
                ("seed", ",1,,", ",x,,"),
                ("stage", ",1,,", ",1,-2,"),
                ("task", "push-v3", "pusj-v3"),
                ("goal_set", "training", "trainin"),
                ("goal", ",4,", ",-1,"),
                ("goal", ",4,", f",{2**70},"),
                ("success", "1,0,500", "yes,0,500"),
                ("success_last", "1,0,500", "0,1,500"),
                ("length", "500", "0"),
                ("episode_return", "1.0", "nan"),
                ("episode_return", "1.0", "1e999"),
            ]
        ),
    ],
)
def test_damaged_tables_are_refused_by_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "episodes.csv"
    path.write_text(text)
    with pytest.raises(DamagedFileError, match=rf"episodes\.csv.*{place}"):
        read_rows(path, EpisodeRow)


def test_text_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-16")
    with pytest.raises(DamagedFileError, match=r"episodes\.csv"):
        read_rows(path, EpisodeRow)


def test_rows_of_another_file_are_refused_by_column(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n")
    assert len(read_rows(path, EpisodeRow, method="teacher", seed=1)) == 1
    with pytest.raises(DamagedFileError, match=r"episodes\.csv, line 2: seed is 1, .* 2"):
        read_rows(path, EpisodeRow, method="teacher", seed=2)


def test_large_tables_are_compressed_to_the_same_bytes_and_read_as_they_are(tmp_path: Path) -> None:
    row = EpisodeRow("teacher", 1, None, "push-v3", "training", 3, True, False, 500, 1e-7)
    rows = [replace(row, goal=goal) for goal in range(LARGE_TABLE // 40)]
    contents = []
    for name in ("first", "second"):
        large, small = tmp_path / name / "large.csv", tmp_path / name / "small.csv"
        write_rows(large, rows)
        write_rows(small, [row])
        compress_tables(large.parent)
        assert {path.name for path in large.parent.iterdir()} == {"large.csv.gz", "small.csv"}
        assert (read_rows(large, EpisodeRow), read_rows(small, EpisodeRow)) == (rows, [row])
        contents.append((tmp_path / name / "large.csv.gz").read_bytes())
    assert contents[0] == contents[1]
    write_rows(large, [row])
    assert read_rows(large, EpisodeRow) == [row], "the plain form is the newer one"
    compress_tables(large.parent)
    assert find_table(large) == large and not large.with_name("large.csv.gz").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"x" + content])
def test_a_damaged_compressed_table_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "episodes.csv.gz"
    file.write_bytes(damage(gzip.compress(b"method,seed\n" * 100)))
    with pytest.raises(DamagedFileError, match=r"episodes\.csv\.gz"):
        read_rows(tmp_path / "episodes.csv", EpisodeRow)
