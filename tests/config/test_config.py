"""Recipes are read strictly: every mistake is named at once, with its path and a suggestion."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpd.config import Config, MethodConfig, TeacherConfig, continued, differences
from cpd.config.load import ConfigError, load, merge, parse_overrides, read_toml, setting_lines, to_dict
from cpd.envs.metaworld.tasks import STREAMS
from jobs.launch_options import RECIPES

MINIMAL = {"name": "x", "stream": {"tasks": "demo"}}


def problems(tables: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Config, tables, "recipe.toml")
    return caught.value.problems


def test_a_required_value_has_no_default() -> None:
    assert "stream: required, but not given" in problems({"name": "x"})


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads_without_warnings_and_survives_a_round_trip(recipe) -> None:
    config = load(Config, read_toml(recipe), str(recipe))
    assert config.warnings() == []
    assert load(Config, to_dict(config), "again") == config


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_may_be_named(name: str) -> None:
    config = load(Config, {"name": "x", "stream": {"tasks": name}}, "recipe")
    assert config.stream.tasks == STREAMS[name]
    assert len(config.stream.distinct_tasks) == len(set(STREAMS[name]))


def test_memory_budget_is_a_share_of_the_whole_streams_data() -> None:
    tables = merge(
        MINIMAL, {"stream": {"tasks": "cw20"}, "memory": {"share": 0.01}, "rollouts": {"num_steps": 8000}}
    )
    assert load(Config, tables, "recipe").memory_steps == 800  # ten distinct tasks


def test_a_row_thins_tasks_that_are_more_than_a_stage_away() -> None:
    counts = {"num_episodes": 50, "num_episodes_brief": 5}
    stream = {"tasks": ["reach-v3", "push-v3", "reach-v3", "sweep-v3", "soccer-v3"]}
    plain, thin = (
        load(Config, {"name": "x", "stream": stream, "evaluation": {**counts, "num_episodes_unmet": number}}, "x")
        for number in (0, 1)
    )
    assert [list(thin.row_episodes(stage, is_last=False).values()) for stage in range(-1, 4)] == [
        [5, 5, 5, 5],
        [50, 5, 1, 1],
        [5, 50, 1, 1],
        [50, 5, 5, 1],
        [5, 5, 50, 5],
    ]
    assert list(plain.row_episodes(0, is_last=False).values()) == [50, 5, 5, 5]
    assert thin.row_episodes(4, is_last=True) == dict.fromkeys(thin.stream.distinct_tasks, 50)


def test_overrides_are_read_as_toml_values() -> None:
    tables = parse_overrides(
        ["--distill.lr", "1e-3", "--seeds=[1, 2]", "--stream.tasks", "cw10", "--distill.steps-per-stage=5"]
    )
    assert tables == {
        "distill": {"lr": 1e-3, "steps_per_stage": 5},
        "seeds": [1, 2],
        "stream": {"tasks": "cw10"},
    }


def test_an_override_of_a_variant_keeps_its_label() -> None:
    tables = parse_overrides(["--variants.no-replay.student.expert-width", "64"])
    assert tables == {"variants": {"no-replay": {"student": {"expert_width": 64}}}}


def test_malformed_overrides_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["lr", "--distill.lr", "--seeds"])
    assert len(caught.value.problems) == 3


def test_a_section_is_no_value() -> None:
    for arguments in (
        ["--stream", "cw10", "--stream.horizon", "200"],
        ["--stream.horizon", "200", "--stream", "cw10"],
    ):
        with pytest.raises(ConfigError, match=r"--stream\.horizon|--stream\b"):
            parse_overrides(arguments)


def test_differences_name_what_affects_results_only() -> None:
    old = load(Config, MINIMAL, "recipe")
    new = load(Config, merge(MINIMAL, {"distill": {"lr": 0.5}, "logging": {"metrics_every": 7}}), "recipe")
    assert differences(old, new) == ["distill.lr: 0.003 -> 0.5"]
    assert differences(old, dataclasses.replace(old)) == []


VARIANTS = {"no-replay": {"memory": {"selection": "none"}}, "wide": {"student": {"width": 128, "num_heads": 8}}}


def test_a_variant_is_the_whole_configuration_with_its_own_settings_on_top() -> None:
    tables = merge(MINIMAL, {"distill": {"lr": 0.5}, "student": {"width": 32}, "method": "ours"})
    config = load(Config, {**tables, "variants": VARIANTS}, "recipe")
    assert config.methods == ("ours", "no-replay", "wide")
    assert config.of_method("ours") == load(Config, tables, "recipe")
    wide = config.of_method("wide")
    assert (wide.method, wide.variants, wide.student.width, wide.student.num_heads) == ("wide", {}, 128, 8)
    assert (wide.distill.lr, wide.memory) == (0.5, config.memory)
    assert config.of_method("no-replay").memory_steps == 0
    assert load(Config, to_dict(config), "again") == config


def test_variants_may_change_every_section_of_a_students_learning_and_no_other() -> None:
    others = {"stream", "teacher", "rollouts", "evaluation", "logging"}
    sections = {
        field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)
    }
    assert {field.name for field in dataclasses.fields(MethodConfig)} == sections - others
    for name in others:
        with pytest.raises(ConfigError, match=rf"variants\.a\.{name}: .*student"):
            load(Config, {**MINIMAL, "variants": {"a": {name: {}}}}, "recipe")


def test_the_method_that_variants_vary_can_be_left_out() -> None:
    config = load(Config, {**MINIMAL, "variants": VARIANTS, "variants_only": True}, "recipe")
    assert config.methods == ("no-replay", "wide")


def test_variants_may_be_added_but_neither_changed_nor_taken_away() -> None:
    old = load(Config, {**MINIMAL, "variants": VARIANTS}, "recipe")
    new = load(Config, {**MINIMAL, "variants": {"first": {}, **dict(reversed(VARIANTS.items()))}}, "recipe")
    assert differences(old, new) == []
    assert continued(old, new).methods == ("moe", "no-replay", "wide", "first")
    assert len(differences(new, old)) == 1
    changed = load(
        Config, {**MINIMAL, "variants": merge(VARIANTS, {"wide": {"student": {"width": 64}}})}, "recipe"
    )
    assert differences(old, changed) == ["variants.wide.student.width: 128 -> 64"]


def test_every_setting_is_listed() -> None:
    lines = "\n".join(setting_lines(Config))
    assert "--teacher.ppo.gae_lambda" in lines and "0.95" in lines and "(required)" in lines
    assert "--variants" in lines and "Undefined" not in lines
    assert " ".join(lines.split()).count("One of none, per_task, on_demand.") == 1


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8))
def test_merging_nothing_changes_nothing(tables) -> None:
    if isinstance(tables, dict):
        assert merge(tables, {}) == tables
        assert merge({}, tables) == tables
        assert merge(tables, tables) == tables


@pytest.mark.parametrize(
    "text", [f"seeds = {'[' * 3000}{']' * 3000}", f"{'.'.join('a' * 3000)} = 1", f"seeds = [{'9' * 5000}]"]
)
def test_what_the_parser_cannot_hold_is_refused_by_name(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=str(recipe)):
        read_toml(recipe)
    if text.startswith("seeds"):  # a string, which is no list of seeds
        assert isinstance(parse_overrides(["--seeds", text.partition("= ")[2]])["seeds"], str)


def test_a_file_lays_its_tables_on_those_of_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\n[stream]\ntasks = "cw10"\nhorizon = 200\n')
    (tmp_path / "middle.toml").write_text('extends = "base"\nname = "middle"\nseeds = [3]\n')
    (tmp_path / "folder").mkdir()
    top = tmp_path / "folder" / "top.toml"
    top.write_text('extends = "../middle"\nname = "top"\n[stream]\nhorizon = 500\n')
    assert read_toml(top) == {"name": "top", "seeds": [3], "stream": {"tasks": "cw10", "horizon": 500}}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            '"none-such"',
            r"recipe\.toml .*\n  extends: 'none-such': .*/none-such\.toml ",
        ),
        ('"none-such.toml"', r"extends: 'none-such\.toml': .*/none-such\.toml "),
        ("3", "extends: 3 "),
        ('"a\\u0000b"', r"extends: 'a\\x00b' "),
        (f'"{"x" * 300}"', "extends: 'xxx"),
        ('"recipe"', "extends: 'recipe' "),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, base: str, message: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"extends = {base}\n")
    with pytest.raises(ConfigError, match=message):
        read_toml(recipe)


def test_a_shipped_file_may_be_extended_from_everywhere_by_its_name(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "base.toml").write_text('name = "base"\nseeds = [3]\n')
    recipe = tmp_path / "mine.toml"
    for name in ("base", "base.toml", "shipped/base", "shipped/base.toml"):
        recipe.write_text(f'extends = "{name}"\nname = "mine"\n')
        assert read_toml(recipe, shipped=shipped) == {"name": "mine", "seeds": [3]}
    recipe.write_text('extends = "bsae"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml .*\n.*/bsae\.toml .*shipped.*'base'"):
        read_toml(recipe, shipped=shipped)
    recipe.write_text('extends = "base"\n')
    (tmp_path / "base.toml").write_text('name = "beside"\n')
    assert read_toml(recipe, shipped=shipped) == {"name": "beside"}


def test_a_file_in_another_encoding_is_named_with_the_byte(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes('# one\nname = "Stra\u00dfe"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"recipe\.toml .*\n.*0xdf .*18 .*line 2"):
        read_toml(recipe)


def test_ranks_that_cannot_share_the_environments_of_a_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match=r"26 .*teacher\.ppo\.num_envs = 25 "):
        TeacherConfig().check_ranks(26)
    TeacherConfig().check_ranks(25)
    TeacherConfig(recipe="scripted").check_ranks(26)
