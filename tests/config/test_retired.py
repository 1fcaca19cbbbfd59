"""Configurations of earlier versions load: retired settings are dropped, renamed ones move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpd.config import Config, changes, differences, retired
from cpd.config.load import ConfigError, load, merge, parse_overrides, read_toml, to_dict
from cpd.config.retired import upgrade
from jobs.launch_options import RECIPES

MINIMAL = {"name": "x", "stream": {"tasks": "demo"}}
RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"


@pytest.fixture(autouse=True)
def _history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that no version ever had, beside the real ones."""
    monkeypatch.setitem(retired.RETIRED, "student.wings", 2)
    monkeypatch.setitem(retired.RETIRED, "teacher.ppo.eyes", [1, 2])
    monkeypatch.setitem(retired.RENAMED, "student.breadth", "student.width")
    monkeypatch.setitem(retired.RENAMED_FOR_DEMO_RL, "teacher.warm_start.pace", "teacher.ppo.learning_rate")
    monkeypatch.setattr(retired, "IGNORED", (*retired.IGNORED, "teacher.legs"))


def refusals(tables: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Config, merge(MINIMAL, tables), "recipe.toml")
    return caught.value.problems


def test_a_retired_setting_is_dropped_where_it_holds_the_value_that_is_built_in() -> None:
    tables = {
        "student": {"wings": 2},
        "teacher": {"ppo": {"eyes": [1, 2]}, "legs": {"length": 3}},
        "variants": {"a": {"student": {"wings": 2}}, "b": {"student": {"wings": 2, "width": 32}}},
    }
    assert upgrade(tables) == {"variants": {"a": {}, "b": {"student": {"width": 32}}}}
    config = load(Config, merge(MINIMAL, tables), "recipe.toml")
    assert config.variants == {"a": {}, "b": {"student": {"width": 32}}}


def test_a_retired_setting_with_another_value_is_refused_by_name_together_with_all_other_mistakes() -> None:
    tables = {
        "student": {"wings": 3, "width": "x"},
        "variants": {"a": {"student": {"wings": 4}}},
    }
    problems = {line.partition(": ")[0]: line for line in refusals(tables)}
    assert set(problems) == {"student.wings", "student.width", "variants.a.student.wings"}
    assert "always 2" in problems["student.wings"] and "given: 3" in problems["student.wings"]


def test_a_renamed_setting_moves_to_its_new_place() -> None:
    tables = {"student": {"breadth": 32}, "variants": {"a": {"student": {"breadth": 128}}}}
    config = load(Config, merge(MINIMAL, tables), "recipe.toml")
    assert config.student.width == 32
    assert config.of_method("a").student.width == 128


def test_a_setting_under_its_old_and_its_new_name_is_refused_unless_both_agree() -> None:
    (line,) = refusals({"student": {"breadth": 32, "width": 128}})
    assert line.startswith("student.breadth: ") and "student.width" in line
    assert upgrade({"student": {"breadth": 32, "width": 32}}) == {"student": {"width": 32}}


def test_of_an_old_and_a_new_name_in_different_layers_the_upper_one_counts(tmp_path: Path) -> None:
    for lower, upper, over in (("breadth", "width", "breadth"), ("width", "breadth", "width")):
        (tmp_path / "lower.toml").write_text(f"[student]\n{lower} = 16\n")
        (tmp_path / "upper.toml").write_text(f'extends = "lower"\n[student]\n{upper} = 32\n')
        tables = read_toml(tmp_path / "upper.toml")
        assert tables == {"student": {"width": 32}}
        overrides = parse_overrides([f"--student.{over}", "64"])
        assert merge(tables, overrides) == {"student": {"width": 64}}


@pytest.mark.parametrize(("recipe", "learning_rate"), [("demo_rl", 5e-5), ("rl", 0.5)])
def test_settings_of_demo_rl_alone_overrule_their_new_place_there_and_are_dropped_elsewhere(
    recipe: str, learning_rate: float
) -> None:
    renamed = {"teacher": {"warm_start": {"pace": 5e-5}}}
    assert upgrade(renamed) == renamed
    tables = merge({"teacher": {"recipe": recipe, "ppo": {"learning_rate": 0.5}}}, renamed)
    assert load(Config, merge(MINIMAL, tables), "recipe.toml").teacher.ppo.learning_rate == learning_rate


def test_what_is_no_table_is_left_to_be_refused() -> None:
    for wrong in ([], {"student": 3}, {"student": {"breadth": 3}, "variants": {"a": 1}}, {"variants": []}):
        upgrade(wrong)
    problems = refusals({"student": 3, "variants": {"a": 1}})
    assert {line.partition(": ")[0] for line in problems} == {"student", "variants.a"}


def test_upgrading_changes_nothing_that_it_was_passed_and_nothing_twice() -> None:
    tables = {"student": {"breadth": 32, "wings": 2}}
    once = upgrade(tables)
    assert tables == {"student": {"breadth": 32, "wings": 2}}
    assert upgrade(once) == once


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("config.json")), ids=lambda path: path.parent.name)
def test_every_published_configuration_loads_with_the_values_that_it_holds(path: Path) -> None:
    stored = json.loads(path.read_text())
    config = load(Config, stored, str(path))
    # Settings that the file lacks did not exist yet.
    differing = [line for line in changes(upgrade(stored), to_dict(config)) if ": None -> " not in line]
    assert differing == []
    assert config.of_method(config.methods[0]) is not None


def test_sac_is_refused_by_name_and_its_settings_are_dropped() -> None:
    tables = {"name": "old", "stream": {"tasks": "demo"}}
    old = {**tables, "teacher": {"learner": "ppo", "sac": {"batch_size": 64}}}
    assert load(Config, old, "test") == load(Config, tables, "test")
    with pytest.raises(ConfigError, match=r"teacher\.learner: SAC was removed"):
        load(Config, {**tables, "teacher": {"learner": "sac"}}, "test")


def test_a_run_directory_of_an_earlier_version_can_be_launched_again() -> None:
    current = load(Config, read_toml(RECIPES / "cw10_rl.toml", shipped=RECIPES), "cw10_rl")
    stored = to_dict(current)
    stored["torch_threads"] = 1
    stored["logging"]["agree_every"] = 1
    stored["teacher"]["learner"] = "ppo"
    stored["teacher"]["ppo"]["exploring_min_log_std"] = stored["teacher"]["exploration"].pop("min_log_std")
    stored["teacher"]["exploring_share"] = stored["teacher"]["exploration"].pop("start_share")
    assert differences(load(Config, stored, "stored"), current) == []
