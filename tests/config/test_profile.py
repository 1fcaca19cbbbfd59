"""Profiles: what they hold, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from cpd.config.load import ConfigError, load
from cpd.config.profile import PROFILES, ROLES, Profile, load_profile


def slurm(**over: object) -> Profile:
    return load(Profile, {"cluster": "slurm", **over}, "test")


@pytest.mark.parametrize("name", ["local", "testbed", "generic", "preemptible"])
def test_those_that_come_along_are_sound(name: str) -> None:
    profile = load_profile(name)
    assert profile.cluster == ("local" if name == "local" else "slurm")


def test_all_in_the_folder_are_sound() -> None:
    assert len([load_profile(path.stem) for path in PROFILES.glob("*.toml")]) >= 4


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"zzz: .*cluster, cores, clusters, partition, .*report"):
        slurm(zzz=1)
    with pytest.raises(ConfigError, match=r"partitoin: .*'partition'"):
        slurm(partitoin="main")
    with pytest.raises(ConfigError, match=r"teacher\.zzz: .*ranks, nodes, cpus, .*srun_args"):
        slurm(teacher={"zzz": 1})


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        slurm(cores=-1, student={"ranks": "two"})
    assert len(caught.value.problems) == 2


def test_ranks_are_spread_evenly() -> None:
    assert slurm(student={"ranks": 6, "nodes": 3}).student.ranks_per_node == 2
    with pytest.raises(ConfigError, match=r"ranks \(5\) .*nodes \(2\)"):
        slurm(student={"ranks": 5, "nodes": 2})


def test_a_limit_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"report\.minutes \(2\)"):
        slurm(report={"minutes": 2}, signal_seconds=60)
    assert slurm(report={"minutes": 2}, signal_seconds=59).report.minutes == 2
    assert load(Profile, {"cluster": "local", "report": {"minutes": 1}}, "test").report.minutes == 1


def test_the_free_table_refuses_what_the_launcher_needs() -> None:
    with pytest.raises(ConfigError, match="sbatch: 'array'"):
        slurm(sbatch={"array": "0-3"})
    with pytest.raises(ConfigError, match="--mail-type"):
        slurm(teacher={"sbatch": {"--mail-type": "FAIL"}})


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("partition", {"partition": "main\nrm -r /"}),
        ("modules.0", {"modules": ["gcc\n"]}),
        ("setup.1", {"setup": ["a", "b\rc"]}),
        ("student.srun_args.0", {"student": {"srun_args": ["\x1b"]}}),
        ("sbatch.comment", {"sbatch": {"comment": "a\nb"}}),
        ("sbatch", {"sbatch": {"mail type": "x"}}),
        ("sbatch", {"sbatch": {"x\n#SBATCH --y": True}}),
        ("python", {"python": "python 'x"}),
    ],
)
def test_what_would_leave_its_line_of_the_script_is_refused(path: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm(**settings)
    assert any(problem.startswith(f"{path}") for problem in caught.value.problems), caught.value.problems


def test_an_unknown_profile_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gemeric'.*'generic'"):
        load_profile("gemeric")
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_profile(str(tmp_path / "none.toml"))


def test_more_cores_than_there_are_are_warned_of() -> None:
    there = len(os.sched_getaffinity(0))
    assert load(Profile, {"cluster": "local", "cores": there}, "test").warnings() == []
    (warning,) = load(Profile, {"cluster": "local", "cores": there + 1}, "test").warnings()
    assert f"cores ({there + 1}) exceed the {there}" in warning


def test_every_role_has_resources() -> None:
    assert set(ROLES) <= {field.name for field in fields(Profile)}
