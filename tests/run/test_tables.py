"""Tables read back exactly what was written."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows, write_rows

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
