"""The trainer on synthetic teachers: growth, resuming, and reference losses."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cpd.comm import DivergedError, SerialComm
from cpd.config import Config
from cpd.config.load import load
from cpd.distill.batches import Batch
from cpd.distill.growth import opening_offset
from cpd.distill.trainer import StudentTrainer, learning_rate
from cpd.evaluation.measures import curve_steps
from cpd.student.network import Student
from tests.distill.synthetic import stage_data

GOLDEN = Path(__file__).with_name("golden_losses.json")
TASKS = ["drawer-close-v3", "handle-press-side-v3", "window-close-v3"]


def make_config(tasks=TASKS, **over) -> Config:
    over = {name: dict(table) for name, table in over.items()}
    tables = {
        "name": "t",
        "stream": {"tasks": tasks},
        "student": {"context": 4, "width": 16, "expert_width": 32, **over.pop("student", {})},
        "rollouts": {"num_steps": 280},
        "memory": {"share": 0.2, **over.pop("memory", {})},
        "distill": {
            "steps_per_stage": 60,
            "batch_size": 32,
            "lr_warmup_steps": 10,
            "precision": "float64",
            **over.pop("distill", {}),
        },
        "evaluation": {"curve_points": 0},
    }
    return load(Config, {**tables, **over}, "test")


#: All tasks share all experts without task identity, and only replay acts against forgetting.
PLAIN = {
    "student": {"task_identity": "none", "num_experts": 4, "experts_per_task": 1, "opening_steps": 30},
    "memory": {"selection": "reservoir"},
    "protection": {"kind": "none"},
    "distill": {"replay_share": 0.5, "loss": "forward_kl", "lr": 1e-3},
}


def make_trainer(**over) -> StudentTrainer:
    """With the default method."""
    return StudentTrainer(make_config(**over), 1, SerialComm(), torch.device("cpu"))


def make_plain(**over) -> StudentTrainer:
    tables = {name: {**PLAIN.get(name, {}), **over.get(name, {})} for name in {**PLAIN, **over} if name != "tasks"}
    return make_trainer(**tables, **({"tasks": over["tasks"]} if "tasks" in over else {}))


def train(trainer: StudentTrainer, until: int | None = None) -> None:
    """Train over the stream, or up to a number of steps in all."""
    config, tasks = trainer.config, trainer.config.stream
    steps = config.distill.steps_per_stage
    for stage in range(trainer.learner.progress.stage, len(tasks.tasks)):
        if stage * steps == until:
            return
        data = stage_data(tasks.distinct_tasks.index(tasks.tasks[stage]))
        trainer.begin_stage(data)
        while trainer.learner.progress.step < steps:
            if stage * steps + trainer.learner.progress.step == until:
                return
            trainer.train_step()
        trainer.end_stage(data)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def new_task_shares(trainer: StudentTrainer, batch: Batch) -> np.ndarray:
    """Shares [layers, experts] of the assignments of a batch."""
    with torch.no_grad():
        out = trainer.learner.student(batch.obs_RLO, task_B=batch.task_R, valid_BL=batch.valid_RL)
    return np.stack([(stats.counts_E / stats.counts_E.sum()).numpy() for stats in out.stats])


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_growth_changes_no_output_by_a_single_bit_and_then_lives(precision):
    """Within opening_steps + 30 = 60 steps the new experts serve at least 5 % of the new task's assignments."""
    trainer = make_plain(distill={"precision": precision})
    train(trainer, until=60)
    data = stage_data(1)
    windows = np.stack([data.observations[i : i + 4] for i in range(200)])
    obs = torch.from_numpy(windows).to(trainer.learner.student.dtype)
    with torch.no_grad():
        old_output = trainer.learner.student(obs)
        decisions = trainer.begin_stage(data)
        after = trainer.learner.student(obs)
    assert torch.equal(old_output.mean_BLA, after.mean_BLA)
    assert torch.equal(old_output.log_std_BLA, after.log_std_BLA)

    (decision,) = decisions
    assert (decision.stage, decision.task, decision.num_new) == (1, 1, 1)
    probe = trainer.learner.source.probe()
    shares = new_task_shares(trainer, probe)
    assert shares.shape == (2, 4)
    assert decision.sources == [[int(shares[layer].argmax())] for layer in range(2)]

    start = [[p[4].clone() for p in moe.parameters()] for moe in trainer.learner.student.moes]
    for _ in range(60):
        trainer.train_step()
    assert (new_task_shares(trainer, probe)[:, 4] > 0.05).all()
    for layer, moe in enumerate(trainer.learner.student.moes):
        assert moe.logit_offset.tolist() == [0.0] * 5
        for old, new in zip(start[layer], moe.parameters(), strict=True):
            assert (new[4] - old).abs().max() > 1e-3


def test_growth_is_closed_until_the_first_step_and_open_after_the_schedule():
    trainer = make_plain()
    train(trainer, until=60)
    trainer.begin_stage(stage_data(1))
    assert trainer.learner.student.moes[0].logit_offset.tolist()[4] == -np.inf
    offsets = []
    for _ in range(31):
        trainer.train_step()
        offsets.append(trainer.learner.student.moes[1].logit_offset.tolist()[4])
    np.testing.assert_allclose(np.exp(offsets), [*(np.arange(1, 31) / 30), 1.0])


def test_growth_is_open_at_the_end_of_a_stage_that_is_shorter_than_the_schedule():
    trainer = make_plain(distill={"steps_per_stage": 20})
    train(trainer, until=39)
    assert trainer.learner.student.moes[0].logit_offset.tolist()[4] < 0.0
    trainer.train_step()
    assert trainer.learner.student.moes[0].logit_offset.tolist() == [0.0] * 5


def test_experts_are_added_for_new_tasks_only():
    trainer = make_trainer(
        tasks=[TASKS[0], TASKS[1], TASKS[0], TASKS[1]],
        distill={"steps_per_stage": 5},
    )
    held, experts = [], []
    for task in (0, 1, 0, 1):
        data = stage_data(task)
        trainer.begin_stage(data)
        for _ in range(5):
            trainer.train_step()
        trainer.end_stage(data)
        held.append(trainer.memory.num_steps)
        experts.append(trainer.learner.student.num_experts)
    assert experts == [2, 4, 4, 4]
    # Half of the stream's budget of 0.2 x 2 x 280 steps would hold the steps of the first task twice.
    assert trainer.memory.budget == 112
    assert held[1] == held[2] == held[3] <= 112
    assert trainer.learner.progress.seen == [0, 1]


def test_expansion_none_adds_nothing():
    trainer = make_trainer(student={"expansion": "none"}, distill={"steps_per_stage": 3})
    train(trainer)
    assert trainer.learner.student.num_experts == 2 and not trainer.learner.progress.growth


def test_a_skipped_stage_is_recorded_and_changes_nothing():
    trainer = make_trainer(distill={"steps_per_stage": 3})
    trainer.skip_stage()
    data = stage_data(1)
    assert trainer.begin_stage(data) == []
    assert trainer.learner.progress.skipped == [0] and trainer.learner.progress.seen == [1]


#: Everything that a checkpoint must hold: while an expert opens; belief, masks and rehearsal; importance.
SHORT = {
    "plain": {**PLAIN, "student": {**PLAIN["student"], "opening_steps": 12}},
    "default": {"distill": {"rehearsal": True, "replay_share": 0.5}},
    "rehearsed": {
        **PLAIN,
        "student": {**PLAIN["student"], "opening_steps": 12},
        "distill": {**PLAIN["distill"], "rehearsal": True},
    },
    "scaled": {
        "student": {"new_experts": "fresh"},
        "protection": {"mask_fraction": 0.5, "mask_mode": "scaled"},
        "distill": {"weight_decay": 0.1},
    },
}


def make_short(name: str) -> StudentTrainer:
    tables = {section: dict(table) for section, table in SHORT[name].items()}
    tables["distill"] = {**tables.get("distill", {}), "steps_per_stage": 25}
    return make_trainer(**tables)


@pytest.fixture(scope="module", params=sorted(SHORT))
def straight(request) -> tuple[str, StudentTrainer]:
    """A short run without interruption."""
    trainer = make_short(request.param)
    train(trainer)
    return request.param, trainer


@pytest.mark.parametrize("until", [10, 25, 30, 49])
def test_resuming_equals_going_on_bit_for_bit(straight, until):
    """Within stages, between two, and before a stage's last step."""
    name, wanted = straight
    first = make_short(name)
    train(first, until=until)
    resumed = make_short(name)
    resumed.restore(through_a_file(first.state()))
    train(resumed)
    assert torch.equal(resumed.learner.flat.values, wanted.learner.flat.values)
    assert torch.equal(resumed.learner.optimizer.second_moment, wanted.learner.optimizer.second_moment)
    assert resumed.learner.progress == wanted.learner.progress
    assert resumed.memory.num_steps == wanted.memory.num_steps
    for (key, left), right in zip(
        resumed.learner.student.state_dict().items(), wanted.learner.student.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), key


def test_replay_alone_learns_without_forgetting_much():
    trainer = make_plain(distill={"steps_per_stage": 120, "lr": 5e-3}, student={"width": 32})
    train(trainer, until=0)
    naive = [float(np.square(stage_data(task).teacher_mean).mean()) for task in range(3)]
    for stage in range(3):
        train(trainer, until=120 * (stage + 1))
        assert mean_error(trainer.learner.student, stage) < 0.1 * naive[stage]
    for task in range(2):
        assert mean_error(trainer.learner.student, task) < 0.2 * naive[task]


def mean_error(student: Student, task: int) -> float:
    """Mean squared error of the action, with full windows, over a task's data."""
    data = stage_data(task)
    lengths = np.diff(data.offsets)
    full = np.flatnonzero(np.arange(data.num_steps) - np.repeat(data.offsets[:-1], lengths) >= 3)
    windows = np.stack([data.observations[i - 3 : i + 1] for i in full])
    obs = torch.from_numpy(windows).to(student.dtype)
    with torch.no_grad():
        task_B = torch.full((len(obs),), task)
        mean = student(obs, task_B=task_B).mean_BLA[:, -1].numpy()
    return float(np.square(mean - data.teacher_mean[full]).mean())


def test_report_adds_up():
    trainer = make_trainer(distill={"replay_share": 0.5})
    train(trainer, until=60)
    trainer.begin_stage(stage_data(1))
    report = trainer.train_step(report=True)
    config = trainer.config.distill
    extra = config.load_balance_coef * report.load_balance + config.router_z_coef * report.router_z
    extra += config.contrast_coef * report.contrast
    assert report.contrast > 0
    assert report.loss == pytest.approx(report.imitation + extra)
    assert report.by_task == {0: pytest.approx(report.replay), 1: pytest.approx(report.current)}
    assert min(report.current, report.replay) < report.imitation < max(report.current, report.replay)
    for shares in report.expert_shares:
        assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("name, make", [("plain", make_plain), ("default", make_trainer)])
def test_losses_of_the_first_steps_are_the_known_ones(name, make):
    """A refactoring must leave them as they are; the file holds them and changes with the method only."""
    trainer = make()
    losses = []
    for stage in range(2):
        data = stage_data(stage)
        trainer.begin_stage(data)
        while trainer.learner.progress.step < trainer.config.distill.steps_per_stage:
            report = trainer.train_step(report=trainer.learner.progress.step < 5)
            losses += [report.loss] if report else []
        trainer.end_stage(data)
    golden = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(losses, golden, rtol=1e-7)


def test_a_gradient_that_is_not_finite_stops_training():
    trainer = make_trainer()
    data = stage_data(0)
    data.observations[:] = np.nan
    trainer.begin_stage(data)
    trainer.train_step()
    with pytest.raises(DivergedError, match="stage 0, step 0"):
        trainer.check_finite()


class TestSchedules:
    def test_learning_rate(self):
        config = make_config().distill
        rates = [learning_rate(config, step) for step in range(60)]
        assert rates[0] == pytest.approx(config.lr / 10)
        assert rates[9] == rates[10] == config.lr == max(rates)
        assert all(left > right for left, right in pairwise(rates[10:]))
        assert config.lr * 0.1 < rates[-1] < config.lr * 0.11
        no_warmup = make_config(distill={"lr_warmup_steps": 0}).distill
        assert learning_rate(no_warmup, 0) == config.lr

    def test_opening(self):
        assert opening_offset(0, 1) == 0.0
        assert opening_offset(0, 100) == pytest.approx(-4.60517)
        assert opening_offset(99, 100) == opening_offset(1000, 100) == 0.0

    def test_curve_points_end_with_the_stage(self):
        assert curve_steps(4, 1000) == [250, 500, 750, 1000]
        assert curve_steps(3, 10) == [3, 7, 10]
        assert curve_steps(0, 10) == []


class CountingComm(SerialComm):
    """Counts collectives; the other of two ranks adds nothing."""

    size = 2

    def __init__(self) -> None:
        self.num_sums = 0

    def all_reduce_sum(self, array) -> None:
        self.num_sums += 1


@pytest.mark.parametrize(("num_experts", "num_sums"), [(2, 1), (3, 2)])
def test_only_where_experts_are_chosen_their_balance_is_worked_out(num_experts: int, num_sums: int) -> None:
    student = {"num_experts": num_experts, "experts_per_task": num_experts, "top_k": 2}
    comm = CountingComm()
    trainer = StudentTrainer(make_config(student=student), 1, comm, torch.device("cpu"))
    trainer.begin_stage(stage_data(0))
    comm.num_sums = 0
    trainer.train_step()
    assert comm.num_sums == num_sums
    report = trainer.train_step(report=True)
    assert report is not None
    assert (report.load_balance == 0.5) == (num_sums == 1)


def as_earlier(trainer: StudentTrainer) -> dict:
    """The trainer's state as versions wrote it in which every expert had parameters of its own."""
    state, flat = trainer.state(), trainer.learner.flat
    num_first = trainer.config.student.num_experts

    def split(vector: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = {}
        for name, slot in flat.slots.items():
            tensor = vector[slot].view(flat.shapes[name])
            if not name.endswith(".stack"):
                parts[name] = tensor.flatten()
                continue
            moe, kind = name.removesuffix(".stack").rsplit(".", 1)
            for expert, part in enumerate(tensor):
                former = f"{moe}.router.{expert}" if kind == "router" else f"{moe}.experts.{expert}.{kind}.weight"
                parts[former] = (part.t() if kind == "down" else part).flatten()
        number = {name: re.search(r"(?:experts|router)\.(\d+)", name) for name in parts}
        is_new = {name: found is not None and int(found[1]) >= num_first for name, found in number.items()}
        return dict(sorted(parts.items(), key=lambda item: is_new[item[0]]))

    def convert(value):
        if isinstance(value, dict):
            return {name: convert(entry) for name, entry in value.items()}
        is_vector = isinstance(value, torch.Tensor) and value.shape == flat.values.shape
        return torch.cat(list(split(value).values())) if is_vector else value

    earlier = convert(state)
    earlier["names"] = list(split(flat.values))
    ages = torch.zeros_like(flat.values)
    for start, stop, age in state["optimizer"]["cohorts"]:
        ages[start:stop] = age
    values, counts = torch.unique_consecutive(torch.cat(list(split(ages).values())), return_counts=True)
    stops = counts.cumsum(0)
    earlier["optimizer"]["cohorts"] = torch.stack([stops - counts, stops, values.long()], 1).tolist()
    assert len(earlier["optimizer"]["cohorts"]) == 2
    return earlier


def test_a_checkpoint_of_an_earlier_version_goes_on_bit_for_bit():
    """Between growth and the end of a stage, with importance, a mask, and moments of two ages."""
    wanted, resumed = make_short("scaled"), make_short("scaled")
    train(wanted, until=30)
    resumed.restore(through_a_file(as_earlier(wanted)))
    train(wanted)
    train(resumed)
    assert torch.equal(resumed.learner.flat.values, wanted.learner.flat.values)
    assert torch.equal(resumed.learner.optimizer.second_moment, wanted.learner.optimizer.second_moment)
