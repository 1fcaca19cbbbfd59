"""A student acts in NumPy from its two files alone, as its description says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from cpd.student.actor import StudentActor
from cpd.student.network import load_student, save_student
from cpd.student.plans import FIRST_STEPS
from tests.student.grown import TASKS, grown_student, observations


def gelu(x: np.ndarray) -> np.ndarray:
    return (x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2).astype(x.dtype)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


class NumpyStudent:
    """Follows `acting` of a description, for one episode."""

    def __init__(self, path: Path) -> None:
        self.tensors = safetensors.numpy.load_file(path)
        self.described: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.config, self.constants = self.described["student"], self.described["acting"]
        self.observed = np.ones(len(self.described["obs_scale"]), bool)
        for first, end in self.config["unobserved"]:
            self.observed[first:end] = False
        self.history: list[np.ndarray] = []
        self.plan: Any = None

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + x.dtype.type(self.constants["norm_eps"]))
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def scaled(self, obs: np.ndarray) -> np.ndarray:
        dtype = self.described["dtype"]
        centre, scale = (np.array(self.described[name], dtype) for name in ("obs_centre", "obs_scale"))
        return ((obs.astype(dtype) - centre) / scale * self.observed).astype(dtype)

    def belief(self, obs: np.ndarray) -> np.ndarray:
        get, constants = self.tensors.get, self.constants
        known, num, mean, std = get("known_K"), get("density.num_K"), get("density.mean_KO"), get("density.std_KO")
        s = np.where(known, 0.0, -np.inf)
        if not known.any():
            return np.full(len(s), 1 / len(s))
        if self.config["belief"] != "embedding" and num[known].all():
            for k in np.flatnonzero(num):
                dof, scale = max(num[k] - 1.0, 1.0), std[k] * math.sqrt(1 + 1 / num[k])
                normaliser = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(dof * math.pi) / 2
                t = (obs.astype(np.float64) - mean[k]) / scale
                density = normaliser - np.log(scale) - (dof + 1) / 2 * np.log1p(t**2 / dof)
                s[k] += density[self.observed].sum() / constants["density_temperature"]
        if self.config["belief"] != "density":
            x = self.scaled(obs)
            z = self.linear("encoder.linear", x) + self.linear(
                "encoder.out", gelu(self.linear("encoder.hidden", x))
            )
            s += (self.tensors["prototypes_KZ"] @ (z / np.linalg.norm(z))) / constants["embedding_temperature"]
        return softmax(s)

    def choose(self, obs: np.ndarray) -> Any:
        belief, num_tasks = self.belief(obs), self.described["num_tasks"]
        if self.config["act"] == "most_likely":
            return [belief.argmax()] * 2
        values = self.tensors["plans.success_PK"] @ belief
        values[:num_tasks] += self.constants["tie_break"] * belief
        values = values[: None if self.config["act"] == "hedged" else num_tasks]
        return self.tensors["plans.tasks_P2"][values.argmax()]

    def attention(self, name: str, x: np.ndarray) -> np.ndarray:
        length, heads = len(x), self.config["num_heads"]
        q, k, v = self.linear(f"{name}.qkv", x).reshape(length, 3, heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.array(q.shape[-1], x.dtype))
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        return self.linear(f"{name}.out", (softmax(scores) @ v).transpose(1, 0, 2).reshape(x.shape))

    def experts(self, name: str, x: np.ndarray, task: int | None) -> np.ndarray:
        def expert(e: int, row: np.ndarray) -> np.ndarray:
            return gelu(row @ up[e].T) @ down[e]

        up, down, router = (self.tensors[f"{name}.{kind}.stack"] for kind in ("up", "down", "router"))
        offset, group = self.tensors[f"{name}.logit_offset"], self.tensors[f"{name}.group_E"]
        present = np.flatnonzero(offset > -np.inf)
        if len(present) == 1:
            return expert(0, x)
        if task is not None:
            present = present[group[present] == self.tensors["group_K"][task]]
        rows = []
        for row in x:
            logits = (router[present] @ row + offset[present]).astype(x.dtype)
            best = np.argsort(-logits)[: self.config["top_k"]]
            weights = softmax(logits[best])
            rows.append(sum(weight * expert(present[i], row) for weight, i in zip(weights, best, strict=True)))
        return np.array(rows)

    def act(self, obs: np.ndarray) -> np.ndarray:
        if self.plan is None and self.config["task_identity"] == "inferred":
            self.plan = self.choose(obs)
        step = len(self.history)
        task = None if self.plan is None else self.plan[int(step >= self.constants["first_steps"])]
        self.history.append(obs)
        x = self.linear("embed", self.scaled(np.array(self.history[-self.config["context"] :])))
        x = x + self.tensors["position"][: len(x)]
        x = x if task is None else x + self.tensors["task"][task]
        for layer in range(self.config["num_layers"]):
            name = f"blocks.{layer}"
            x = x + self.attention(f"{name}.attention", self.layer_norm(f"{name}.attention_norm", x))
            x = x + self.experts(f"{name}.moe", self.layer_norm(f"{name}.moe_norm", x), task)
        mean = self.linear("head", self.layer_norm("norm", x))[-1, : self.constants["action_size"]]
        return mean.clip(-self.constants["action_clip"], self.constants["action_clip"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"context": 4},
        {"belief": "density", "act": "expected_success"},
        {"belief": "embedding", "act": "most_likely"},
        {"task_identity": "none", "context": 2},
        {"unobserved": ((3, 7), (18, 36)), "context": 4},
    ],
    ids=str,
)
def test_a_student_acts_in_numpy_from_its_two_files(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_student(path, grown_student(**settings), {"distinct_tasks": TASKS})
    actor, again = StudentActor(load_student(path), TASKS), NumpyStudent(path)
    actor.reset(TASKS[:1])
    for obs in observations(FIRST_STEPS + 5, seed=7).numpy():
        np.testing.assert_allclose(again.act(obs), actor.act(obs[None])[0], rtol=0, atol=1e-6)
    if actor.beliefs:
        assert again.belief(again.history[0]).max() == pytest.approx(actor.beliefs[0].confidence, abs=1e-6)


def test_the_belief_and_the_plan_are_those_of_the_description(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_student(path, grown_student(), {"distinct_tasks": TASKS})
    actor, plans = StudentActor(load_student(path), TASKS), set()
    for obs in torch.cat([observations(10, seed=task) + 0.01 * task for task in range(3)]).numpy():
        again = NumpyStudent(path)
        actor.reset(TASKS[:1])
        np.testing.assert_allclose(again.act(obs), actor.act(obs[None])[0], rtol=0, atol=1e-6)
        (belief,) = actor.beliefs
        assert [TASKS[task] for task in again.plan] == list(belief[2:4])
        plans.add(tuple(int(task) for task in again.plan))
    assert len(plans) > 1
