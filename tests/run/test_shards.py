"""Round trips, and everything that a reader must refuse."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.envs.metaworld.tasks import ACTION_SIZE, OBSERVATION_SIZE
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import InterruptedBySignal
from cpd.run.lease import LeaseLostError
from cpd.run.provenance import Labels
from cpd.run.shards.reader import read_rollouts
from cpd.run.shards.schema import INDEX_NAME, Episode, ShardAttributes, ShardError, read_index
from cpd.run.shards.writer import clear_shards, write_shards

ATTRIBUTES = ShardAttributes(
    task="push-v3",
    teacher_recipe="rl",
    policy_sha256="ab" * 32,
    std_source="policy",
    metaworld="3.1.1",
    mujoco="3.3.0",
    reward_version="v2",
    horizon=500,
    steps_after_success=20,
)
LABELS = Labels("rl", 500, "none", "v2", "3.1.1", "3.3.0")


def make_episode(num_steps: int, number: int) -> Episode:
    rng = np.random.default_rng(1000 * num_steps + number)

    def steps(*shape: int) -> np.ndarray:
        return rng.normal(size=(num_steps, *shape)).astype(np.float32)

    return Episode(
        observations=rng.normal(size=(num_steps + 1, OBSERVATION_SIZE)).astype(np.float32),
        actions=steps(ACTION_SIZE),
        teacher_mean=steps(ACTION_SIZE),
        teacher_raw_mean=steps(ACTION_SIZE),
        teacher_log_std=steps(ACTION_SIZE),
        rewards=rng.normal(size=num_steps),
        successes=rng.random(num_steps) < 0.2,
        noise_scale=steps(),
        goal_index=number % 50,
        seed=int(rng.integers(2**63)),
    )


def write(folder: Path, lengths: list[int], shard_steps: int = 1000, **labels: object) -> list[Episode]:
    episodes = [make_episode(length, number) for number, length in enumerate(lengths)]
    write_shards(folder, replace(ATTRIBUTES, **labels), episodes, shard_steps)
    return episodes


def read(folder: Path, **wanted: object):
    arguments = {"task": "push-v3", "labels": LABELS, "policy_sha256": "ab" * 32} | wanted
    return read_rollouts(folder, **arguments)


def read_datasets(folder: Path) -> dict[str, np.ndarray]:
    """Every field but the offsets, over all shards."""
    shards: list[dict[str, np.ndarray]] = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            shards.append({name: file[name][:] for name in file if name != "offsets"})
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), shard_steps=st.integers(1, 120))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_steps: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    episodes = write(folder, lengths, shard_steps)
    rollouts = read(folder)

    assert rollouts.num_steps == sum(lengths)
    assert rollouts.offsets.tolist() == np.cumsum([0, *lengths]).tolist()
    for name in ("teacher_mean", "teacher_log_std"):
        expected = np.concatenate([getattr(episode, name) for episode in episodes])
        assert np.array_equal(getattr(rollouts, name), expected), name
    for e, episode in enumerate(episodes):
        steps = slice(rollouts.offsets[e], rollouts.offsets[e + 1])
        assert np.array_equal(rollouts.observations[steps], episode.observations[:-1])
        assert rollouts.episode_success[e] == episode.successes.any()
    assert rollouts.episode_success.dtype == np.bool_
    assert rollouts.observations.dtype == np.float32
    stored = read_datasets(folder)
    for name in ("actions", "teacher_raw_mean", "noise_scale", "successes", "observations"):
        expected = np.concatenate([getattr(episode, name) for episode in episodes])
        assert np.array_equal(stored[name], expected), name
    assert np.array_equal(stored["rewards"], np.concatenate([e.rewards for e in episodes]).astype(np.float32))
    for name in ("goal_index", "seed", "episode_return", "episode_success"):
        assert stored[name].tolist() == [getattr(episode, name) for episode in episodes], name
    # A shard closes once it is full, and only the last one may stay short.
    counts = [entry.num_steps for entry in read_index(folder).shards]
    assert all(count >= shard_steps for count in counts[:-1])
    assert all(count < shard_steps + 40 for count in counts)


def test_every_shard_and_the_rollouts_have_labels(tmp_path: Path) -> None:
    write(tmp_path, [30, 30, 5], shard_steps=30, std_source="assumed")
    for path in sorted(tmp_path.glob("*.h5")):
        with h5py.File(path) as file:
            stored = {
                name: value.decode() if isinstance(value, bytes) else value for name, value in file.attrs.items()
            }
            assert stored == replace(ATTRIBUTES, std_source="assumed").as_dict()
            assert all(file[name].chunks is None and file[name].compression is None for name in file)
    assert read(tmp_path).task == "push-v3"
    assert read_index(tmp_path).attributes == replace(ATTRIBUTES, std_source="assumed")


def test_same_data_gives_same_bytes_in_another_process(tmp_path: Path) -> None:
    write(tmp_path / "a", [7, 9, 20], shard_steps=16)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_shards import write
write(Path({str(tmp_path / "b")!r}), [7, 9, 20], shard_steps=16)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["index.json", "shard-00000.h5", "shard-00001.h5"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_writer_that_fails_publishes_no_index(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Episode]:
        yield make_episode(10, 0)
        raise InterruptedBySignal

    write(tmp_path, [10, 10])
    with pytest.raises(InterruptedBySignal):
        write_shards(tmp_path, ATTRIBUTES, interrupted(), 5)
    with pytest.raises(ShardError, match=r"index\.json"):
        read(tmp_path)
    write(tmp_path, [4])  # and the next attempt starts clean
    assert read(tmp_path).num_steps == 4


def test_publication_is_refused_once_the_lease_is_lost(tmp_path: Path) -> None:
    calls = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) > 2:
            raise LeaseLostError

    with pytest.raises(LeaseLostError):
        write_shards(tmp_path, ATTRIBUTES, [make_episode(6, 0), make_episode(6, 1)], 5, check)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.h5"]


KILLED_WRITER = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
from test_shards import ATTRIBUTES, make_episode
from cpd.run.shards.writer import write_shards
episodes = [make_episode(400, n) for n in range(8)]

def reported():
    for episode in episodes:
        yield episode
        print("x", flush=True)

while True:
    write_shards(Path({folder!r}), ATTRIBUTES, reported(), 800)
"""


@pytest.mark.parametrize("after", [1, 4, 9, 14])
def test_a_writer_killed_at_any_time_leaves_all_or_nothing(tmp_path: Path, after: int) -> None:
    code = KILLED_WRITER.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(after):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    try:
        rollouts = read(tmp_path)
    except ShardError as error:
        assert "launch again" in str(error)
    else:
        assert rollouts.num_steps == 3200
    write(tmp_path, [10, 12])
    assert read(tmp_path).num_steps == 22
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-00000.h5"]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_flipped_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    write(folder, [3, 4])
    path = folder / "shard-00000.h5"
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-00000\.h5"):
        read(folder)


@pytest.mark.parametrize("keep", [0, 1, 700, -1])
def test_truncated_shard(tmp_path: Path, keep: int) -> None:
    write(tmp_path, [10, 10])
    path = tmp_path / "shard-00000.h5"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match=r"shard-00000\.h5 .* \d+ bytes"):
        read(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, [10, 10], shard_steps=10)
    (tmp_path / "shard-00001.h5").unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.h5"):
        read(tmp_path)


def test_missing_folder_or_index(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere.*index\.json"):
        read(tmp_path / "nowhere")


def test_shards_swapped_between_tasks(tmp_path: Path) -> None:
    write(tmp_path / "push", [10, 10])
    write(tmp_path / "reach", [10, 10], task="reach-v3")
    (tmp_path / "reach" / "shard-00000.h5").replace(tmp_path / "push" / "shard-00000.h5")
    with pytest.raises(ShardError, match=r"shard-00000\.h5 .*task.*'reach-v3'.*'push-v3'"):
        read(tmp_path / "push")


def test_folders_swapped_between_tasks(tmp_path: Path) -> None:
    write(tmp_path, [10, 10], task="reach-v3")
    with pytest.raises(ShardError, match=r"index\.json.*task.*'reach-v3'.*'push-v3'"):
        read(tmp_path)


def test_shard_of_another_task_with_a_forged_index(tmp_path: Path) -> None:
    write(tmp_path, [10, 10], task="reach-v3")
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["attributes"]["task"] = "push-v3"
    write_json(tmp_path / INDEX_NAME, index)
    with pytest.raises(ShardError, match=r"shard-00000\.h5 .*task.*'reach-v3'"):
        read(tmp_path)


def test_not_hdf5(tmp_path: Path) -> None:
    write(tmp_path, [10, 10])
    path = tmp_path / "shard-00000.h5"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ShardError, match=r"shard-00000\.h5 .*HDF5"):
        read(tmp_path)


def test_hdf5_with_other_fields(tmp_path: Path) -> None:
    write(tmp_path, [10, 10])
    path = tmp_path / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        rows = file["teacher_mean"][:].astype("float64")
        del file["teacher_mean"]
        file["teacher_mean"] = rows
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["shards"][0]["sha256"] = sha256(path)
    write_json(tmp_path / INDEX_NAME, index)
    with pytest.raises(ShardError, match=r"teacher_mean.*float64 \(20, 4\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        {"teacher_recipe": "scripted"},
        {"horizon": 200},
        {"reward_version": "v1"},
        {"metaworld": "3.0.0"},
        {"mujoco": "3.4.0"},
    ],
)
def test_foreign_labels(tmp_path: Path, labels: dict[str, object]) -> None:
    write(tmp_path, [10, 10])
    ((name, wanted),) = labels.items()
    with pytest.raises(ShardError, match=f"{name}.*{getattr(ATTRIBUTES, name)!r}.*{wanted!r}"):
        read(tmp_path, labels=replace(LABELS, **labels))


def test_rollouts_of_an_older_policy(tmp_path: Path) -> None:
    write(tmp_path, [10, 10])
    with pytest.raises(ShardError, match=r"abababababab.*cdcdcdcdcdcd"):
        read(tmp_path, policy_sha256="cd" * 32)
    assert read(tmp_path, policy_sha256=None).num_steps == 20


def test_shard_that_the_index_does_not_list(tmp_path: Path) -> None:
    write(tmp_path, [10, 10])
    (tmp_path / "shard-00001.h5").write_bytes((tmp_path / "shard-00000.h5").read_bytes())
    with pytest.raises(ShardError, match=r"shard-00001\.h5"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"attributes": {"schema_version": 1}, "shards": []}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    write(tmp_path, [10, 10])
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ShardError, match=r"index\.json"):
        read(tmp_path)


def test_index_with_wrong_totals(tmp_path: Path) -> None:
    write(tmp_path, [10, 10])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["num_steps"] += 1
    write_json(tmp_path / INDEX_NAME, index)
    with pytest.raises(ShardError, match=r"index\.json.*\(21, 2\)"):
        read(tmp_path)


def test_other_schema_version(tmp_path: Path) -> None:
    write(tmp_path, [10, 10], schema_version=2)
    with pytest.raises(ShardError, match=r"index\.json.*version 2.*version 1"):
        read(tmp_path)


def test_clearing_removes_the_index_first_and_leaves_other_files(tmp_path: Path) -> None:
    write(tmp_path, [10, 10])
    (tmp_path / "notes.txt").write_text("kept")
    clear_shards(tmp_path)
    clear_shards(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_hashes_are_computed_once_while_the_files_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [30, 30, 30], shard_steps=40)
    hashed: list[str] = []
    monkeypatch.setattr("cpd.run.shards.checked.sha256", lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(2):
        read(tmp_path)
    assert len(hashed) == 4, "a file that has just been written may change again unseen"
    monkeypatch.setattr("cpd.run.shards.checked.SETTLED_AFTER", -1.0)
    for _ in range(2):
        read(tmp_path)
    assert len(hashed) == 6
    shard = tmp_path / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-00001\.h5"):
        read(tmp_path)


@pytest.mark.parametrize("content", [None, "{", '{"shard-00000.h5": ["0", 1]}', "[]"])
def test_a_file_of_hashes_that_cannot_be_used_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr("cpd.run.shards.checked.SETTLED_AFTER", -1.0)
    write(tmp_path, [30])
    remembered = tmp_path / f".checked-{platform.node()}.json"
    if content is None:
        remembered.mkdir()  # neither readable nor writable
    else:
        remembered.write_text(content)
    assert read(tmp_path).num_steps == 30
    shard = tmp_path / "shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match="truncated"):
        read(tmp_path)
