"""Recipes: relations between them, and defaults that depend on the kind of teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cpd.config import Config, PPOConfig
from cpd.config.load import setting_lines
from cpd.config.student import dense_expert_width, final_num_experts
from cpd.config.teacher import WARM_START_PPO
from jobs.launch_options import load_recipe

ABLATIONS = ("ablation", "lab_ablation")


def test_the_laboratory_compares_what_the_ablation_compares() -> None:
    real, stand_ins = (load_recipe(name, []) for name in ABLATIONS)
    assert stand_ins.variants == real.variants
    assert (stand_ins.memory, stand_ins.student) == (real.memory, real.student)
    assert (stand_ins.teacher.recipe, real.teacher.recipe) == ("scripted", "demo_rl")


def test_the_ablation_can_share_the_teachers_of_cw10() -> None:
    ours, theirs = load_recipe("ablation", []), load_recipe("cw10", [])
    assert (ours.teacher, ours.stream, ours.rollouts) == (theirs.teacher, theirs.stream, theirs.rollouts)
    assert ours.evaluation == theirs.evaluation


@pytest.mark.parametrize("name", ABLATIONS)
def test_baselines_have_as_many_parameters_as_the_method_has_in_the_end(name: str) -> None:
    config = load_recipe(name, [])
    num_tasks = len(config.stream.distinct_tasks)
    methods = [config.of_method(label) for label in config.methods]
    dense = [
        method
        for method in methods
        if method.student.num_experts == 1 and method.student.expansion == "none"
        if method.distill.protocol != "isolated"  # many networks
    ]
    assert len(dense) == 17
    for method in dense:
        if method.protection.kind in ("lora", "hat"):  # narrower, by what the parameters of tasks take
            continue
        assert method.student.expert_width == dense_expert_width(config.student, num_tasks), method.method
    wide = config.of_method("no-expansion")
    assert wide.student.num_experts == final_num_experts(config.student, num_tasks)
    assert config.of_method("onehot").student.task_identity == "onehot"
    assert {method.distill.steps_per_stage for method in methods} == {config.distill.steps_per_stage}


@pytest.mark.parametrize("recipe", ["demo_rl", "rl"])
def test_the_defaults_of_ppo_follow_the_kind_of_teacher(tmp_path: Path, recipe: str) -> None:
    changed = WARM_START_PPO if recipe == "demo_rl" else {}
    expected = replace(PPOConfig(), **{**changed, "hidden_sizes": tuple(changed.get("hidden_sizes", (128, 128)))})
    mine = tmp_path / "mine.toml"
    for base in ('extends = "cw10"', 'name = "mine"\nstream.tasks = "demo"'):
        mine.write_text(f'{base}\nteacher.recipe = "{recipe}"\n')
        assert load_recipe(str(mine), []).teacher.ppo == expected
        overridden = load_recipe(str(mine), ["--teacher.ppo.target_kl", "0.5"]).teacher.ppo
        assert overridden == replace(expected, target_kl=0.5)


def test_help_texts_name_the_defaults_after_a_warm_start() -> None:
    lines = " ".join("\n".join(setting_lines(Config)).split()).split(" --")
    for name, value in WARM_START_PPO.items():
        (text,) = [line for line in lines if line.startswith(f"teacher.ppo.{name} ")]
        assert str(tuple(value) if isinstance(value, list) else value) in text


def test_teachers_from_in_a_recipe_is_relative_to_it_and_on_the_command_line_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    upper = tmp_path / "lab" / "upper.toml"
    upper.parent.mkdir()
    (tmp_path / "base.toml").write_text('extends = "demo"\nteachers_from = "runs/shared"\n')
    upper.write_text('extends = "../base"\n')
    assert Path(load_recipe(str(upper), []).teachers_from).resolve() == tmp_path / "runs" / "shared"
    upper.write_text('extends = "../base"\nteachers_from = "own"\n')
    assert Path(load_recipe(str(upper), []).teachers_from).resolve() == tmp_path / "lab" / "own"
    assert load_recipe(str(upper), ["--teachers_from=here"]).teachers_from == "here"
