"""Tables read back exactly what was written."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.reading import DamagedFileError
from cpd.run.tables import (
    LARGE_TABLE,
    EpisodeRow,
    EvaluationRow,
    compress_tables,
    find_table,
    read_rows,
    write_rows,
)

# Labels are names: text without control characters.
NAME = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


def tables_of(kind: type) -> st.SearchStrategy[list]:
    given_by_type = {str: NAME, float: st.floats(allow_nan=False)}
    values = {name: given_by_type[hint] for name, hint in get_type_hints(kind).items() if hint in given_by_type}
    return st.lists(st.builds(kind, **values), min_size=1, max_size=5)


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


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "the columns are , but"),
        ("method,seed\n", "the columns are method,seed, but"),
        ("{header}\nteacher,1,,push-v3,training,3,yes,0,500,1.0\n", "line 2: 'yes' is neither 0 nor 1"),
        (
            "{header}\nteacher,1,,push-v3,training,3,1,0,500,1.0\nteacher,x,,p,t,3,1,0,5,1.0\n",
            "line 3: invalid literal",
        ),
        ("{header}\nteacher,1\n", "line 2: "),
    ],
)
def test_damaged_tables(tmp_path: Path, text: str, cause: str) -> None:
    header = "method,seed,stage,task,goal_set,goal,success,success_last,length,episode_return"
    path = tmp_path / "episodes.csv"
    path.write_text(text.format(header=header))
    with pytest.raises(ValueError, match=cause):
        read_rows(path, EpisodeRow)


def test_large_tables_are_compressed_to_the_same_bytes_and_read_as_they_are(tmp_path: Path) -> None:
    row = EpisodeRow("teacher", 1, None, "push-v3", "training", 3, True, False, 500, 1e-7)
    rows = [row] * (LARGE_TABLE // 40)
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
