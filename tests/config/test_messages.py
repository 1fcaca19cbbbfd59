"""What is refused or warned about, by the path that each message names; a golden file holds the full texts.

`UPDATE_GOLDEN=1 pytest tests/config/test_messages.py` writes that file again.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cpd.config import Config
from cpd.config.load import WHOLE, ConfigError, load, merge
from cpd.config.profile import Profile

GOLDEN = Path(__file__).with_name("golden_messages.txt")
MINIMAL = {"name": "x", "stream": {"tasks": "demo"}}
#: A student without memory, protection or a task identity.
PLAIN = {
    "student": {"task_identity": "none"},
    "memory": {"selection": "none"},
    "protection": {"kind": "none"},
}
AGEM = {"protection": {"kind": "agem"}}
PACKNET = {
    "student": {"task_identity": "none", "expansion": "none"},
    "memory": {"selection": "none"},
    "protection": {"kind": "packnet"},
}

#: Settings on top of `MINIMAL`, and the paths that the refusal must name.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown keys and wrong types, all at once": (
        {
            "strem": 1,
            "stream": {"tasks": ["hamer-v3", "push-v3"], "horizon": 501},
            "teacher": {"ppo": {"learning_rat": 1, "gamma": "high"}},
        },
        ["strem", "stream.tasks.0", "stream.horizon", "teacher.ppo.learning_rat", "teacher.ppo.gamma"],
    ),
    "unknown stream": ({"stream": {"tasks": "cw11"}}, ["stream.tasks"]),
    "task in place of a list": ({"stream": {"tasks": "window-close-v3"}}, ["stream.tasks"]),
    "list in quotes": ({"stream": {"tasks": "[push-v3]"}}, ["stream.tasks"]),
    "date": ({"stream": {"horizon": datetime.date(2026, 1, 31)}}, ["stream.horizon"]),
    "repeated seed": ({"seeds": [1, 1]}, ["seeds"]),
    "seed 0": ({"seeds": [0]}, ["seeds.0"]),
    "negative seed": ({"seeds": [-1]}, ["seeds.0"]),
    "no seeds": ({"seeds": []}, ["seeds"]),
    "seeds in quotes": ({"seeds": "1,2,3"}, ["seeds"]),
    "single seed": ({"seeds": 4}, ["seeds"]),
    "word for a flag": ({"variants_only": "yes"}, ["variants_only"]),
    "flag for a number": ({"distill": {"lr": True}}, ["distill.lr"]),
    "fraction for a count": ({"distill": {"steps_per_stage": 1.5}}, ["distill.steps_per_stage"]),
    "share of 0": ({"memory": {"share": 0.0}}, ["memory.share"]),
    "too many goals": ({"teacher": {"num_training_goals": 50_001}}, ["teacher.num_training_goals"]),
    "retired setting": ({"distill": {"final_lr_share": 0.5}}, ["distill.final_lr_share"]),
    "top_k above num_experts": ({"student": {"top_k": 9}}, ["student"]),
    "width of no multiple of the heads": ({"student": {"width": 63}}, ["student"]),
    "more curve points than steps": ({"distill": {"steps_per_stage": 5}}, ["evaluation.curve_points"]),
    "memory for no window": ({"memory": {"share": 1e-4}, "student": {"context": 4}}, ["memory.share"]),
    "gate above stop_success": ({"teacher": {"gate": 0.9, "stop_success": 0.5}}, ["teacher"]),
    "starts beyond Meta-World's limit": (
        {
            "teacher": {
                "horizon": 490,
                "exploration": {"start_share": 0.1, "max_steps": 20},
                "ppo": {"steps_per_env": 500},
            }
        },
        ["teacher"],
    ),
    "target above the cap": (
        {"teacher": {"warm_start": {"success_target": 0.6, "success_cap": 0.5}}},
        ["teacher.warm_start"],
    ),
    "cap too high": ({"teacher": {"warm_start": {"success_cap": 0.9}}}, ["teacher.warm_start.success_cap"]),
    "budget without policy gradients": ({"teacher": {"recipe": "demo_rl", "max_env_steps": 14_999}}, ["teacher"]),
    "iteration of one sample": (
        {"teacher": {"ppo": {"num_envs": 1, "steps_per_env": 1, "minibatch_size": 1}}},
        ["teacher.ppo"],
    ),
    "nothing to train without expansion": (
        {"student": {"task_identity": "none", "expansion": "none"}},
        ["student.expansion"],
    ),
    "nothing to train without demand": (
        {"student": {"task_identity": "none", "expansion": "on_demand"}},
        ["student.expansion"],
    ),
    "A-GEM without memory": (merge(PLAIN, AGEM), ["memory.selection"]),
    "A-GEM with replay": (merge(AGEM, {"distill": {"replay_share": 0.5}}), ["distill.replay_share"]),
    "DER++ without replay": ({"protection": {"kind": "derpp"}}, ["distill.replay_share"]),
    "cloning of a rehearsal without memory": (
        merge(PLAIN, {"protection": {"kind": "bc"}, "distill": {"replay_share": 0.5, "rehearsal": True}}),
        ["memory.selection", "distill.rehearsal"],
    ),
    "LoRA with a task identity": (
        merge(PACKNET, {"protection": {"kind": "lora"}, "student": {"task_identity": "onehot"}}),
        ["student.task_identity"],
    ),
    "PackNet with everything": (
        {"protection": {"kind": "packnet"}},
        ["memory.selection", "student.expansion", "student.task_identity"],
    ),
    "variants: unknown keys": (
        {
            "nmae": "y",
            "variants": {
                "no-replay": {"memory": {"shaer": 1}},
                "b": {"student": {"width": "x"}, "sedes": [1], "teacher": {}},
                "c d": {},
            },
        },
        [
            "nmae",
            "variants.no-replay.memory.shaer",
            "variants.b.student.width",
            "variants.b.sedes",
            "variants.b.teacher",
            "variants.c d.[key]",
        ],
    ),
    "variants: mistakes with what they inherit": (
        {
            "method": "ours",
            "variants": {
                "a": {"student": {"top_k": 9}},
                "b": {"memory": {"share": 1e-4}, "student": {"context": 4}},
                "ours": {},
                "teacher": {},
                "fine": {"student": {"top_k": 9, "num_experts": 9, "experts_per_task": 9}},
            },
        },
        ["variants.ours", "variants.a.student", "variants.b.memory.share", "variants.teacher.method"],
    ),
    "variants_only without variants": ({"variants_only": True}, ["variants_only"]),
}

#: Settings on top of `MINIMAL`, and the paths that warnings must name, in order.
WARNED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "replay without memory": (merge(PLAIN, {"distill": {"replay_share": 0.2}}), ["distill.replay_share"]),
    "share of no memory": ({"memory": {"selection": "none", "share": 0.2}}, ["memory.share"]),
    "start_share of a reservoir": (
        {"memory": {"selection": "reservoir", "start_share": 0.2}},
        ["memory.start_share"],
    ),
    "settings of another kind of protection": (
        merge(PLAIN, {"protection": {"strength": 2.0, "agem_windows": 4}}),
        ["protection.strength", "protection.agem_windows"],
    ),
    "masks without expansion": ({"student": {"expansion": "none"}}, ["student.expansion"]),
    "replay of what is frozen": ({"distill": {"replay_share": 0.5}}, ["distill.replay_share"]),
    "student told the task": (
        {
            "student": {"task_identity": "onehot", "opening_steps": 7, "demand_threshold": 0.1},
            "protection": {"mask_mode": "scaled"},
        },
        [
            "student.demand_threshold",
            "protection.mask_mode",
            "student.opening_steps",
            "memory.selection",
        ],
    ),
    "one expert per token": ({"student": {"top_k": 1}}, ["student.top_k"]),
    "student without task identity": (
        merge(PLAIN, {"student": {"num_heads": 2}, "distill": {"contrast_coef": 0.5}}),
        ["distill.contrast_coef", "student.num_heads"],
    ),
    "load balance without a choice": ({"distill": {"load_balance_coef": 0.5}}, ["distill.load_balance_coef"]),
    "rehearsal without replay": ({"distill": {"rehearsal": True}}, ["distill.rehearsal"]),
    "memory that nothing reads": (
        {"student": {"task_identity": "none"}, "protection": {"kind": "none"}},
        ["memory.selection"],
    ),
    "belief by density alone": (
        {"student": {"belief": "density", "act": "most_likely"}, "distill": {"contrast_coef": 0.5}},
        ["distill.contrast_coef", "memory.selection"],
    ),
    "plans without memory": (
        {"student": {"act": "expected_success"}, "memory": {"selection": "none"}},
        ["student.act"],
    ),
    "belief of a student that is told the task": (
        {"student": {"task_identity": "given", "belief": "embedding", "act": "most_likely"}},
        ["student.belief", "student.act"],
    ),
    "joint training": (
        {
            "distill": {"protocol": "joint", "replay_share": 0.5},
            "memory": {"selection": "uniform"},
            "protection": {"kind": "ewc"},
            "student": {"expansion": "on_demand"},
        },
        ["memory.selection", "protection.kind", "student.expansion", "distill.replay_share"],
    ),
    "short stages": (
        merge(PLAIN, {"distill": {"steps_per_stage": 50}, "student": {"opening_steps": 51}}),
        ["student.opening_steps", "distill.lr_warmup_steps"],
    ),
    "warm start of RL from scratch": (
        {"teacher": {"warm_start": {"num_demonstrations": 3}}},
        ["teacher.warm_start"],
    ),
    "exploration that explores nothing": (
        {"teacher": {"exploration": {"max_steps": 7, "stop_at_success": 0.5, "min_log_std": -4.0}}},
        [
            "teacher.exploration.max_steps",
            "teacher.exploration.stop_at_success",
            "teacher.exploration.min_log_std",
        ],
    ),
    "variants: what they set, not what they inherit": (
        {
            "memory": {"share": 0.2},
            "variants": {
                "a": {"memory": {"selection": "none"}},
                "b": {"memory": {"selection": "none", "share": 0.3}},
            },
        },
        ["variants.b.memory.share"],
    ),
}

#: Profiles on top of a Slurm profile, and the paths that the refusal must name.
REFUSED_PROFILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "profile: unknown key": ({"zzz": 1}, ["zzz"]),
    "profile: misspelt key": ({"partitoin": "main"}, ["partitoin"]),
    "profile: unknown key of a role": ({"teacher": {"zzz": 1}}, ["teacher.zzz"]),
    "profile: two mistakes": ({"cores": -1, "student": {"ranks": "two"}}, ["cores", "student.ranks"]),
    "profile: uneven ranks": ({"student": {"ranks": 5, "nodes": 2}}, ["student"]),
    "profile: no time to work": ({"report": {"minutes": 2}, "signal_seconds": 60}, [WHOLE]),
    "profile: reserved option": ({"sbatch": {"array": "0-3"}}, ["sbatch"]),
    "profile: option with dashes": ({"teacher": {"sbatch": {"--mail-type": "FAIL"}}}, ["teacher.sbatch"]),
}

CASES = [*REFUSED, *WARNED, *REFUSED_PROFILES]


def messages(case: str) -> list[str]:
    """The lines of a case."""
    if case in WARNED:
        return load(Config, merge(MINIMAL, WARNED[case][0]), "recipe").warnings()
    with pytest.raises(ConfigError) as caught:
        if case in REFUSED:
            load(Config, merge(MINIMAL, REFUSED[case][0]), "recipe")
        else:
            load(Profile, merge({"cluster": "slurm"}, REFUSED_PROFILES[case][0]), "profile")
    return caught.value.problems


@pytest.mark.parametrize("case", CASES)
def test_messages_name_the_settings_that_they_are_about(case: str) -> None:
    if case in WARNED:
        assert [line.split()[0] for line in messages(case)] == WARNED[case][1]
    else:
        expected = REFUSED[case][1] if case in REFUSED else REFUSED_PROFILES[case][1]
        assert sorted(line.partition(": ")[0] for line in messages(case)) == sorted(expected)


def test_messages_read_as_recorded() -> None:
    text = "\n".join("\n".join([f"# {case}", *messages(case), ""]) for case in CASES)
    text = re.sub(r"\(known: .*\)", "(known: ...)", text)  # which changes with every setting
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), f"read the changes, then record them: {__doc__}"


@pytest.mark.parametrize(
    "tables",
    [
        {"memory": {"selection": "uniform", "share": 0.2}},
        {"student": {"expansion": "none"}, "protection": {"mask_fraction": 0.5}},
        {"student": {"expansion": "none"}, "stream": {"tasks": ["push-v3"]}},
        merge(PLAIN, {"memory": {"selection": "reservoir"}, "distill": {"replay_share": 0.5}}),
        PLAIN,
        merge(PLAIN, {"memory": {"selection": "reservoir"}, **AGEM}),
        PACKNET,
        {"distill": {"protocol": "joint"}},
        {"teacher": {"recipe": "scripted", "ppo": {"gamma": 0.5}}},
        {"teacher": {"exploration": {"step_rate": 0.1, "max_steps": 7, "stop_at_success": 0.5}}},
        {"teacher": {"exploration": {"stop_at_success": 0.5, "min_log_std": -1.0}}},
    ],
)
def test_sound_settings_are_not_warned_about(tables: dict[str, Any]) -> None:
    assert load(Config, merge(MINIMAL, tables), "recipe").warnings() == []
