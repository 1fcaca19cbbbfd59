"""Policies as ONNX files, which onnxruntime runs without torch."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from cpd.export.inference import InferenceStudent, InferenceTeacher
from cpd.export.sources import policy_files
from cpd.reading import read_json
from cpd.run.files import atomic_write
from cpd.student.network import load_student
from cpd.teachers.policy import load_policy


def export_onnx(source: Path, output: Path, only: Sequence[str]) -> list[Path]:
    """Write every finished policy of `source` to a file of its name in `output`, as `Exporter` describes."""
    written = []
    for file in policy_files(source, only):
        policy = (
            InferenceStudent(load_student(file.path))
            if file.is_student
            else InferenceTeacher(load_policy(file.path))
        )
        description = read_json(file.path.with_suffix(".json"), dict[str, Any])
        tasks = description["distinct_tasks"] if file.is_student else [description["task"]]
        written.append(output / f"{file.name}.onnx")
        write_onnx(policy, written[-1], {"tasks": json.dumps(tasks), "sha256": description["sha256"]})
    return written


def trace(policy: InferenceStudent | InferenceTeacher) -> tuple[ExportedProgram, list[str], list[str]]:
    """Trace a policy for any number of episodes; return the program and the names of its inputs and outputs."""
    # Two rows: torch.export takes a size of one for a constant.
    examples = {"observation": torch.zeros(2, policy.observation_size)}
    outputs = ["action"]
    if isinstance(policy, InferenceStudent):
        examples["state"] = torch.zeros(2, policy.state_size)
        outputs.append("next_state")
        if policy.is_told:
            examples["task"] = torch.zeros(2, dtype=torch.int64)
    shapes = ({0: torch.export.Dim("episodes")},) * len(examples)
    return torch.export.export(policy, tuple(examples.values()), dynamic_shapes=shapes), list(examples), outputs


def write_onnx(policy: InferenceStudent | InferenceTeacher, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a policy to `path`; the number of episodes is free.

    Args:
        policy: what acts. A teacher has the input `observation` and the output `action`; a student also has the
            input `state` and the output `next_state`, and the input `task` if it is told the task.
        path: ends in `.onnx`.
        metadata: entries of the file's own metadata.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that nothing here needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program, inputs, outputs = trace(policy)
        model = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert model is not None
    # It holds the traces of nodes, with paths of this machine.
    for node in model.model.graph:
        node.metadata_props.clear()
    model.model.metadata_props.update(metadata)
    with atomic_write(path) as temporary:
        model.save(temporary)
