"""What a run made opens in other tools, through their own readers, and exporting again changes nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpd.export.formats import FORMATS
from cpd.run.directory import Run
from cpd.run.files import sha256
from cpd.run.provenance import labels
from cpd.run.shards.reader import read_rollouts, stream_episodes
from cpd.run.shards.schema import Episode
from cpd.run.shortage import OPTIONAL
from cpd.run.tables import EvaluationRow, read_rows
from jobs.export import main
from tests.export.conftest import TASK
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "export.md"


@pytest.fixture
def episodes(run: Run) -> list[Episode]:
    return list(stream_episodes(run.teachers()[0].shards))


def follow_docs(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the example in a section of docs/export.md from `folder`; return its variables."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder)
    variables: dict[str, Any] = {}
    exec(example, variables)
    return variables


def export(run: Run, name: str, output: Path) -> Path:
    """Export twice; the second time must give the same bytes, and leave nothing else behind."""
    assert main([str(run.root), name, "--output", str(output)]) == 0
    first = {path: sha256(path) for path in output.rglob("*") if path.is_file()}
    assert main([str(run.root), name, "--output", str(output)]) == 0
    assert {path: sha256(path) for path in output.rglob("*") if path.is_file()} == first
    return output


def test_episodes_are_streamed_as_they_were_recorded(run: Run, episodes: list[Episode]) -> None:
    folder = run.teachers()[0].shards
    rollouts = read_rollouts(folder, task=TASK, labels=labels(run.config))
    assert len(list(folder.glob("*.h5"))) == 2 and sum(map(len, episodes)) == rollouts.num_steps == 700
    np.testing.assert_array_equal(np.concatenate([e.observations[:-1] for e in episodes]), rollouts.observations)
    np.testing.assert_array_equal(np.concatenate([e.teacher_mean for e in episodes]), rollouts.teacher_mean)
    assert [e.episode_success for e in episodes] == rollouts.episode_success.tolist()


def test_minari(run: Run, episodes: list[Episode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "set by the example")
    export(run, "minari", tmp_path / "datasets")
    example = follow_docs("Minari", tmp_path, monkeypatch)
    dataset, env = example["dataset"], example["env"]
    assert list(minari.list_local_datasets()) == [f"demo/{TASK}/seed-1-v0"]
    assert (dataset.total_episodes, dataset.total_steps) == (len(episodes), 700)
    details = dataset.storage.get_episode_metadata(range(len(episodes)))
    for read, entry, episode in zip(dataset, details, episodes, strict=True):
        assert (entry["seed"], entry["options"]) == (episode.seed, {"goal": episode.goal_index})
        np.testing.assert_array_equal(read.observations, episode.observations)
        np.testing.assert_array_equal(read.actions, episode.actions)
        np.testing.assert_array_equal(read.rewards, episode.rewards)
        np.testing.assert_array_equal(read.infos["success"], episode.successes)
        assert {array.dtype for array in (read.observations, read.actions, read.rewards)} == {np.dtype("float32")}
        assert not read.terminations.any()
        assert read.truncations.tolist() == [False] * (len(episode) - 1) + [True]
    # The environment that the dataset names repeats an episode to the last bit.
    assert env.spec.id == f"cpd/{TASK}"
    obs, _ = env.reset(seed=entry["seed"], options=entry["options"])
    replayed = [obs, *(env.step(action)[0] for action in read.actions)]
    np.testing.assert_array_equal(np.float32(replayed), read.observations)
    env.close()


def test_robomimic(run: Run, episodes: list[Episode], tmp_path: Path, monkeypatch) -> None:
    reader = pytest.importorskip("robomimic.utils.dataset")
    file = export(run, "robomimic", tmp_path / "robomimic") / TASK / "seed-1.hdf5"
    assert follow_docs("robomimic", tmp_path, monkeypatch)["dataset"][0]["obs"]["flat"].shape == (10, 39)
    keys = ("actions", "rewards", "dones")
    masks = {
        None: list(range(len(episodes))),
        "train": [e for e in range(len(episodes)) if e % 10 != 9],
        "successful": [e for e, episode in enumerate(episodes) if episode.episode_success],
    }
    for mask, chosen in masks.items():
        dataset = reader.SequenceDataset(str(file), ("flat",), keys, filter_by_attribute=mask)
        assert chosen and (dataset.n_demos, len(dataset)) == (len(chosen), sum(len(episodes[e]) for e in chosen))
        item, episode = dataset[len(dataset) - 1], episodes[chosen[-1]]
        np.testing.assert_array_equal(item["obs"]["flat"][0], episode.observations[-2])
        np.testing.assert_array_equal(item["next_obs"]["flat"][0], episode.observations[-1])
        np.testing.assert_array_equal(item["actions"][0], episode.actions[-1])
        assert (item["rewards"][0], item["dones"][0]) == (np.float32(episode.rewards[-1]), 1)
    dataset.close_and_delete_hdf5_handle()


def test_tensorboard(run: Run, tmp_path: Path, monkeypatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = export(run, "tensorboard", tmp_path / "curves")
    assert follow_docs("TensorBoard and Weights & Biases", tmp_path, monkeypatch)["curves"].Tags()["scalars"] == [
        "loss"
    ]
    curves = {
        "students/moe/seed-1": ("loss", range(5, 81, 5)),
        f"teachers/{TASK}/seed-1": ("train_success", range(100, 801, 100)),
    }
    for name, (tag, steps) in curves.items():
        accumulator = accumulators.EventAccumulator(str(output / name))
        accumulator.Reload()
        assert [event.step for event in accumulator.Scalars(tag)] == list(steps)
    assert accumulator.Scalars("train_success")[-1].value == pytest.approx(0.8)


def test_wandb(run: Run, tmp_path: Path) -> None:
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    for _ in range(2):
        assert main([str(run.root), "wandb", "--output", str(tmp_path)]) == 0
    files = list(tmp_path.glob("wandb/offline-run-*/*students-moe*.wandb"))
    assert len(files) == 1 and len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    history = [record.history for record in leveldb_records(files[0], records) if record.HasField("history")]
    assert [entry.step.num for entry in history] == list(range(5, 81, 5))


def leveldb_records(path: Path, kind: type) -> list:
    """The records of a file of Weights & Biases: a header of 7 bytes, then LevelDB's log format."""
    content, position, pending, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if (rest := 32_768 - position % 32_768) < 7:
            position += rest
            continue
        length, part = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last part
            found.append(kind.FromString(pending))
            pending = b""
    return found


def test_hub(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    output = export(run, "hub", tmp_path)
    teacher, student = output / "teachers" / TASK / "seed-1", output / "students" / "moe" / "seed-1"
    for folder in (teacher, student):
        assert {path.name for path in folder.iterdir()} == {"README.md", "policy.json", "policy.safetensors"}
        monkeypatch.chdir(folder)
        capsys.readouterr()
        (snippet,) = blocks(folder / "README.md", "python")
        exec(snippet, {})
        assert capsys.readouterr().out in ("success: True\n", "success: False\n")
    (row,) = [row for row in read_rows(run.teachers()[0].evaluation, EvaluationRow) if row.goal_set == "held_out"]
    card = (teacher / "README.md").read_text()
    assert f"| {TASK} | {100 * row.successes / row.episodes:.0f} % |" in card and "model-index" in card
    assert "model-index" not in (student / "README.md").read_text()  # it is not evaluated


@pytest.mark.parametrize("module", ["minari", "tensorboard.summary.writer.record_writer", "wandb"])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    run: Run, tmp_path: Path, monkeypatch, capsys, module: str
) -> None:
    name = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"cpd.export.{FORMATS[name].module}", raising=False)
    assert main([str(run.root), name, "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert name in message and f"[{OPTIONAL[name]}]" in message
    assert not list(tmp_path.rglob("*.*"))


def test_damaged_rollouts_leave_the_last_export_as_it_was(run: Run, tmp_path: Path) -> None:
    output = export(run, "robomimic", tmp_path)
    before = {path: sha256(path) for path in output.rglob("*.hdf5")}
    shard = next(run.root.rglob("*.h5"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert main([str(run.root), "robomimic", "--output", str(tmp_path)]) == 2
    finally:
        shard.write_bytes(content)
    assert {path: sha256(path) for path in output.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("minari", "students"),
        ("robomimic", "teachers/drawer-close-v3"),
        ("tensorboard", "results"),
        ("hub", "none"),
    ],
)
def test_what_is_not_there_is_refused(run: Run, tmp_path: Path, capsys, name: str, only: str) -> None:
    assert main([str(run.root), name, "--only", only, "--output", str(tmp_path / "new")]) == 2
    assert str(run.root) in capsys.readouterr().err and not (tmp_path / "new").exists()
