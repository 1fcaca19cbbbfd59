import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cpd.reading import DamagedFileError
from cpd.run.weights import METADATA_KEY, described_weights
from cpd.student.network import Student, load_student, save_student
from tests.student.grown import grown_student

STAGES = 6


def saved(folder: Path, stage: int) -> Path:
    return folder / f"stage-{stage:02d}.safetensors"


def step_forward(student: Student, stage: int) -> None:
    """What a stage does: new experts that learn, and rows of tensors that all tasks share."""
    generator = torch.Generator().manual_seed(stage)
    with torch.no_grad():
        for moe in student.moes:
            for _ in range(2):
                moe.grow(stage, torch.randn(32, generator=generator), group=stage + 3, closed=False)
                moe.up.stack[-1] += 1.0
        student.head.bias[stage] += 1.0
        student.density.mean_KO[stage % 3] = -0.0
        student.plans.resize(stage + 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student after each of several stages, as changes and, below `complete`, in complete files."""
    folder, student = tmp_path_factory.mktemp("weights"), grown_student()
    for stage in range(STAGES):
        save_student(saved(folder / "complete", stage), student, {})
        save_student(saved(folder, stage), student, {}, saved(folder, stage - 1) if stage else None)
        step_forward(student, stage)
    return folder


def test_changes_take_little_space_and_load_bit_for_bit(folder: Path) -> None:
    for stage in range(STAGES):
        path, complete = saved(folder, stage), saved(folder / "complete", stage)
        assert described_weights(path) == complete.read_bytes()
        tensors, wanted = (load_student(file).state_dict() for file in (path, complete))
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        if stage:
            with safetensors.safe_open(path, "pt") as file:
                changes = json.loads(file.metadata()[METADATA_KEY])
                assert changes["builds_on"] == saved(folder, stage - 1).name
                shapes = {name: file.get_slice(name).get_shape() for name in set(file.keys())}
            assert "embed.weight" not in shapes and shapes["head.bias"] == [1]
            assert path.stat().st_size < complete.stat().st_size / 3


def test_where_everything_changes_the_file_is_complete(folder: Path, tmp_path: Path) -> None:
    student = grown_student()
    save_student(saved(tmp_path, 0), student, {})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1.0
    save_student(saved(tmp_path, 1), student, {}, saved(tmp_path, 0))
    saved(tmp_path, 0).unlink()
    assert torch.equal(load_student(saved(tmp_path, 1)).head.bias, student.head.bias)


def test_a_link_of_the_chain_that_is_missing_or_changed_is_named(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    damaged = saved(copied, 2)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"{re.escape(str(damaged))} .*stage-03\.safetensors"):
        load_student(saved(copied, 5))
    with pytest.raises(DamagedFileError, match=r"stage-02\.safetensors .*stage-02\.json"):
        save_student(saved(copied, 3), grown_student(), {}, damaged)
    load_student(saved(copied, 1))
    damaged.unlink()
    with pytest.raises(DamagedFileError, match=rf"{re.escape(str(damaged))} .*stage-03\.safetensors"):
        load_student(saved(copied, 4))
