"""What the recipes promise about each other."""

from __future__ import annotations

import pytest

from cpd.config.student import dense_expert_width, final_num_experts
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
    dense = [own for own in map(config.of_method, config.methods) if own.student.num_experts == 1]
    assert len(dense) == 10
    for own in dense:
        assert own.student.expert_width == dense_expert_width(config.student, num_tasks), own.method
    wide = config.of_method("no-expansion")
    assert wide.student.num_experts == final_num_experts(config.student, num_tasks)
    assert config.of_method("onehot").student.task_identity == "onehot"
    assert {own.distill.steps_per_stage for own in map(config.of_method, config.methods)} == {
        config.distill.steps_per_stage
    }
