"""Recipes are read strictly: every mistake is named at once, with its path and a suggestion."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpd.config import Config, MethodConfig, continued, differences
from cpd.config.load import ConfigError, load, merge, parse_overrides, read_toml, setting_lines, to_dict
from cpd.envs.tasks import STREAMS
from jobs.launch_options import RECIPES

MINIMAL = {"name": "x", "stream": {"tasks": "demo"}}


def problems(tables: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Config, tables, "recipe.toml")
    return caught.value.problems


def test_all_mistakes_are_reported_at_once_with_their_paths() -> None:
    found = problems(
        {
            "name": "x",
            "strem": 1,
            "stream": {"tasks": ["hamer-v3", "push-v3"], "horizon": 501},
            "teacher": {"ppo": {"learning_rat": 1, "gamma": "high"}},
        }
    )
    text = "\n".join(found)
    assert len(found) == 5
    assert "strem: unknown key; did you mean 'stream'?" in text
    assert "stream.tasks.0: unknown task 'hamer-v3'; did you mean 'hammer-v3'" in text
    assert "stream.horizon: " in text and "500" in text
    assert "teacher.ppo.learning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "teacher.ppo.gamma: " in text and "'high'" in text


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"stream": {"tasks": "cw11"}}, "unknown stream 'cw11'; did you mean 'cw10'"),
        ({"student": {"top_k": 9}}, "top_k (9) exceeds num_experts"),
        ({"student": {"width": 63}}, "width (63) is not a multiple"),
        ({"teacher": {"gate": 0.9, "stop_success": 0.5}}, "below the gate"),
        ({"memory": {"share": 0.0001}, "student": {"context": 4}}, "less than 3 window(s)"),
        ({"seeds": [1, 1]}, "the same seed"),
        ({"seeds": [0]}, "greater than or equal to 1"),
        ({"seeds": []}, "at least 1"),
        ({"seeds": "1,2,3"}, "(given: '1,2,3'); write a list: [1, 2, 3]"),
        ({"seeds": 4}, "; write a list: [4]"),
        ({"variants_only": "yes"}, "; write true or false"),
        ({"stream": {"tasks": "window-close-v3"}}, "no stream; write a list of tasks: ['window-close-v3']"),
        ({"stream": {"tasks": "[push-v3]"}}, "no stream; write a list of tasks: ['push-v3']"),
        ({"distill": {"lr": True}}, "distill.lr"),
        ({"distill": {"steps_per_stage": 1.5}}, "distill.steps_per_stage"),
        ({"student": {"min_log_std": 1.0, "max_log_std": 0.5}}, "min_log_std (1.0) is not below max_log_std"),
        ({"memory": {"share": 0.0}}, "memory.share"),
        (
            {"teacher": {"ppo": {"exploring_min_log_std": 0.0}}},
            "init_log_std (-0.3) must lie between exploring_min_log_std (0) and max_log_std (0.5)",
        ),
        (
            {"teacher": {"recipe": "demo_rl", "warm_start": {"rl_init_log_std": -4.0}}},
            "warm_start.rl_init_log_std (-4) must lie between min_log_std (-3) and max_log_std (0.5)",
        ),
        (
            {"teacher": {"recipe": "demo_rl", "ppo": {"exploring_min_log_std": -1.0}}},
            "warm_start.rl_init_log_std (-2) must lie between exploring_min_log_std (-1) and max_log_std (0.5)",
        ),
        (
            {"teacher": {"num_training_goals": 50_001}},
            "teacher.num_training_goals: Input should be less than or equal",
        ),
        ({"teacher": {"ppo": {"num_envs": 1, "steps_per_env": 1, "minibatch_size": 1}}}, "must be 2 or more"),
        ({"stream": {"horizon": datetime.date(2026, 1, 31)}}, "stream.horizon: Input should be a valid integer"),
        ({"student": {"task_identity": "none", "expansion": "none"}}, "would have nothing to train"),
        ({"student": {"task_identity": "none", "expansion": "on_demand"}}, "would have nothing to train"),
    ],
)
def test_impossible_values_and_combinations_are_refused(tables: dict, told: str) -> None:
    assert told in "\n".join(problems(merge(MINIMAL, tables)))


def test_a_wrong_entry_of_a_list_is_one_mistake() -> None:
    (line,) = problems({**MINIMAL, "seeds": [-1]})
    assert line.startswith("seeds.0: ")


def test_a_mistake_of_several_settings_is_told_without_a_path() -> None:
    with pytest.raises(ConfigError, match=r"has a mistake:\n  memory\.share = 0\.0001 gives"):
        load(Config, {**MINIMAL, "memory": {"share": 0.0001}, "student": {"context": 4}}, "recipe.toml")


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
        with pytest.raises(ConfigError, match="given both as a value and as a table of settings"):
            parse_overrides(arguments)


def test_differences_name_what_affects_results_only() -> None:
    old = load(Config, MINIMAL, "recipe")
    new = load(Config, merge(MINIMAL, {"distill": {"lr": 0.5}, "logging": {"metrics_every": 7}}), "recipe")
    assert differences(old, new) == ["distill.lr: 0.003 -> 0.5"]
    assert differences(old, dataclasses.replace(old)) == []


def test_settings_without_effect_are_warned_about() -> None:
    tables = merge(
        MINIMAL,
        {"memory": {"selection": "none"}, "distill": {"replay_share": 0.2}, "protection": {"kind": "none"}},
    )
    assert load(Config, tables, "recipe").warnings() == [
        "distill.replay_share has no effect: memory.selection is 'none'"
    ]


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        ({"selection": "none", "share": 0.2}, ["memory.share has no effect: memory.selection is 'none'"]),
        (
            {"selection": "reservoir", "dpp_candidates": 9},
            ["memory.dpp_candidates has no effect: memory.selection is 'reservoir'"],
        ),
        ({"selection": "dpp", "dpp_candidates": 9}, []),
        (
            {"selection": "reservoir", "start_share": 0.2},
            ["memory.start_share has no effect: memory.selection is 'reservoir'"],
        ),
        ({"selection": "uniform", "share": 0.2}, []),
    ],
)
def test_memory_settings_without_effect_are_warned_about(memory: dict, told: list[str]) -> None:
    assert load(Config, merge(MINIMAL, {"memory": memory}), "recipe").warnings() == told


#: What is said of a memory that is filled for nobody.
UNREAD = (
    "memory.selection has no effect: nothing reads the memory; set distill.replay_share above 0, or "
    "memory.selection = 'none'"
)


def test_masks_that_leave_little_to_train_are_warned_about() -> None:
    tables = merge(MINIMAL, {"student": {"expansion": "none"}})
    (warning,) = load(Config, tables, "recipe").warnings()
    assert "nothing but its task vector to train" in warning
    for more in ({"protection": {"mask_fraction": 0.5}}, {"stream": {"tasks": ["push-v3"]}}):
        assert load(Config, merge(tables, more), "recipe").warnings() == []


def test_parts_of_the_student_and_of_masks_without_effect_are_warned_about() -> None:
    tables = {
        "student": {"task_identity": "onehot", "belief_decay": 0.5, "opening_steps": 7, "demand_threshold": 0.1},
        "protection": {"mask_mode": "scaled"},
    }
    assert load(Config, merge(MINIMAL, tables), "recipe").warnings() == [
        "student.demand_threshold has no effect: student.expansion is 'per_task'",
        "student.belief_decay has no effect: student.task_identity is 'onehot'",
        "protection.mask_mode has no effect: protection.mask_fraction is 1",
        "student.opening_steps has no effect: experts are open to their own tasks alone",
        UNREAD,
    ]
    (line,) = load(Config, merge(MINIMAL, {"student": {"top_k": 1}}), "recipe").warnings()
    assert line.startswith("student.top_k = 1 leaves one expert a gate of 1")


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
    own = {"stream", "teacher", "rollouts", "evaluation", "logging"}
    sections = {
        field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)
    }
    assert {field.name for field in dataclasses.fields(MethodConfig)} == sections - own
    for name in own:
        with pytest.raises(ConfigError, match=rf"variants\.a\.{name}: unknown key \(known: student"):
            load(Config, {**MINIMAL, "variants": {"a": {name: {}}}}, "recipe")


def test_mistakes_in_variants_are_told_with_their_paths_together_with_all_others() -> None:
    variants = {
        "no-replay": {"memory": {"shaer": 1}},
        "b": {"student": {"width": "x"}, "sedes": [1]},
        "c d": {},
    }
    text = "\n".join(problems({**MINIMAL, "nmae": "y", "variants": variants}))
    assert "nmae: unknown key; did you mean 'name'" in text
    assert "variants.no-replay.memory.shaer: unknown key; did you mean 'share'?" in text
    assert "variants.b.student.width: " in text and "'x'" in text
    assert "variants.b.sedes: unknown key" in text
    assert "variants.c d" in text


def test_settings_of_a_variant_must_go_with_those_that_it_does_not_change() -> None:
    found = problems(
        {
            **MINIMAL,
            "method": "ours",
            "variants": {
                "a": {"student": {"top_k": 9}},
                "b": {"memory": {"share": 1e-4}, "student": {"context": 4}},
                "ours": {},
                "teacher": {},
                "fine": {"student": {"top_k": 9, "num_experts": 9, "experts_per_task": 9}},
            },
        }
    )
    assert [line.split(":")[0] for line in found] == [
        "variants.ours",
        "variants.a.student",
        "variants.b",
        "variants.teacher.method",
    ]


def test_the_method_that_variants_vary_can_be_left_out() -> None:
    config = load(Config, {**MINIMAL, "variants": VARIANTS, "variants_only": True}, "recipe")
    assert config.methods == ("no-replay", "wide")
    assert problems({**MINIMAL, "variants_only": True}) == ["variants_only: there are no variants"]


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


def test_a_variant_is_warned_of_what_it_gives_without_effect_and_not_of_what_it_inherits() -> None:
    memory = {"memory": {"share": 0.2}}
    variants = {"a": {"memory": {"selection": "none"}}, "b": {"memory": {"selection": "none", "share": 0.3}}}
    assert load(Config, {**MINIMAL, **memory, "variants": variants}, "recipe").warnings() == [
        "variants.b.memory.share has no effect: memory.selection is 'none'"
    ]


def test_experts_that_never_open_wholly_are_warned_of() -> None:
    tables = merge(
        MINIMAL, {"distill": {"steps_per_stage": 50}, "student": {"opening_steps": 51, "task_identity": "none"}}
    )
    line, *others = sorted(load(Config, tables, "recipe").warnings(), reverse=True)
    assert line.startswith("student.opening_steps (51) exceeds distill.steps_per_stage (50)")
    assert others == [
        UNREAD,
        "distill.lr_warmup_steps (50) is not below distill.steps_per_stage (50): the learning rate reaches "
        "distill.lr at the end, if at all",
    ]


def test_a_memory_that_nothing_reads_is_warned_of() -> None:
    plain = {"student": {"task_identity": "none"}, "protection": {"kind": "none"}}
    assert load(Config, merge(MINIMAL, plain), "recipe").warnings() == [UNREAD]
    for more in (
        {"distill": {"replay_share": 0.5}},
        {"memory": {"selection": "none"}},
        {"protection": {"kind": "agem"}},
        {"student": {"task_identity": "inferred"}},
    ):
        assert load(Config, merge(merge(MINIMAL, plain), more), "recipe").warnings() == []


def test_settings_of_what_a_student_does_not_have_are_warned_of() -> None:
    tables = {
        "student": {"task_identity": "none", "num_heads": 2},
        "distill": {"contrast_coef": 0.5, "contrast_batch_size": 64, "contrast_noise": 0.0, "replay_share": 0.5},
    }
    assert load(Config, merge(MINIMAL, tables), "recipe").warnings() == [
        *(
            f"distill.contrast_{name} has no effect: student.task_identity is 'none'"
            for name in ("coef", "batch_size", "noise")
        ),
        "student.num_heads has no effect: student.context is 1: attention sees one observation",
    ]


def test_every_setting_is_listed() -> None:
    lines = "\n".join(setting_lines(Config))
    assert "--teacher.ppo.gae_lambda" in lines and "0.95" in lines and "(required)" in lines
    assert "--variants  " in lines and "Undefined" not in lines
    assert ". One of none, per_task, on_demand.\n" in lines


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8))
def test_merging_nothing_changes_nothing(tables) -> None:
    if isinstance(tables, dict):
        assert merge(tables, {}) == tables
        assert merge({}, tables) == tables
        assert merge(tables, tables) == tables


def test_a_file_lays_its_tables_on_those_of_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\n[stream]\ntasks = "cw10"\nhorizon = 200\n')
    (tmp_path / "middle.toml").write_text('extends = "base"\nname = "middle"\nseeds = [3]\n')
    (tmp_path / "folder").mkdir()
    top = tmp_path / "folder" / "top.toml"
    top.write_text('extends = "../middle"\nname = "top"\n[stream]\nhorizon = 500\n')
    assert read_toml(top) == {"name": "top", "seeds": [3], "stream": {"tasks": "cw10", "horizon": 500}}


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (
            '"none-such"',
            r"recipe\.toml has a mistake:\n  extends: 'none-such': there is no .*/none-such\.toml; write",
        ),
        ('"none-such.toml"', r"there is no .*/none-such\.toml; write the path of the file to extend, relative to"),
        ("3", r"extends: the name of one file is expected \(given: 3\)"),
        ('"recipe"', "extends: 'recipe' extends this file in turn"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, base: str, found: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"extends = {base}\n")
    with pytest.raises(ConfigError, match=found):
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
    with pytest.raises(
        ConfigError, match=r"mine\.toml has .*\n.*nor is it a name in .*shipped; did you mean 'base'"
    ):
        read_toml(recipe, shipped=shipped)
    recipe.write_text('extends = "base"\n')
    (tmp_path / "base.toml").write_text('name = "beside"\n')
    assert read_toml(recipe, shipped=shipped) == {"name": "beside"}


def test_a_file_in_another_encoding_is_named_with_the_byte(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes('# one\nname = "Stra\u00dfe"\n'.encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"recipe\.toml has .*\n.*not UTF-8: byte 0xdf at position 18 \(line 2\)"
    ):
        read_toml(recipe)
