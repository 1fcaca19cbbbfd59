"""Policies as ONNX files, which onnxruntime runs without torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from cpd.envs.metaworld.tasks import OBSERVATION_SIZE
from cpd.export.inference import InferenceStudent, InferenceTeacher
from cpd.export.sources import policy_files
from cpd.run.files import atomic_write
from cpd.teachers.policy import load_policy


def export_onnx(source: Path, output: Path, only: Sequence[str]) -> list[Path]:
    """Write every finished policy of `source` to a file of its name in `output`, as `Exporter` describes."""
    written = []
    for file in policy_files(source, only):
        if file.is_student:
            continue
        written.append(output / f"{file.name}.onnx")
        write_onnx(InferenceTeacher(load_policy(file.path)), written[-1])
    return written


def write_onnx(policy: InferenceTeacher | InferenceStudent, path: Path) -> None:
    """Write a policy to `path`; the number of episodes is free."""
    # Two rows: torch.export takes a size of one for a constant.
    example = {"observation": torch.zeros(2, OBSERVATION_SIZE)}
    outputs = ["action"]
    if isinstance(policy, InferenceStudent):
        example["state"] = torch.zeros(2, policy.state_size)
        outputs.append("state_after")
        if policy.is_told:
            example["task"] = torch.zeros(2, dtype=torch.int64)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            policy.eval(),
            tuple(example.values()),
            dynamo=True,
            verbose=False,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("episodes")},) * len(example),
        )
    assert program is not None
    with atomic_write(path) as temporary:
        program.save(temporary)
