"""What the model cards of published students and of exported policies have in common."""

from __future__ import annotations

from cpd.envs.suite import DEFAULT_SUITE

_ON_METAWORLD = """\
import gymnasium

import cpd.envs.gym
{imports}

policy = {policy}
env = gymnasium.make("cpd/{task}", split="held_out", max_episode_steps={horizon})
policy.reset(["{task}"])
obs, _ = env.reset(seed=1)
is_over, success = False, False
while not is_over:
    obs, _, _, is_over, info = env.step(policy.act(obs[None].astype("float32"))[0])
    success |= bool(info["success"])
print(f"success: {{success}}")
"""
# A task need not have a success measure.
_ON_OTHERS = """\
from gymnasium.wrappers import TimeLimit

from cpd.envs.gym import StreamEnv
{imports}

policy = {policy}
env = TimeLimit(StreamEnv(["{task}"], suite="{suite}", split="held_out"), {horizon})
policy.reset(["{task}"])
obs, _ = env.reset(seed=1)
is_over, total = False, 0.0
while not is_over:
    obs, reward, _, is_over, _ = env.step(policy.act(obs[None].astype("float32"))[0])
    total += reward
print(f"return: {{total:.1f}}")
"""


def example(suite: str, task: str, horizon: int, *, imports: str, policy: str) -> str:
    """Return Python code that runs an episode.

    Args:
        suite: name of the suite, or of several, joined.
        task: name of the task.
        horizon: steps of the episode.
        imports: lines that import what `policy` needs.
        policy: the expression that loads the policy, an `Actor`.
    """
    code = _ON_METAWORLD if suite == DEFAULT_SUITE else _ON_OTHERS
    return code.format(suite=suite, task=task, horizon=horizon, imports=imports, policy=policy)


def suite_title(suite: str) -> str:
    """Return what a reader calls a suite, or several that are joined."""
    return " and ".join("Meta-World" if name == DEFAULT_SUITE else name for name in suite.split("+"))


def tags_of(suite: str) -> list[str]:
    """Return the tags of a policy for tasks of a suite."""
    return ["reinforcement-learning", "robotics", *(["meta-world"] if DEFAULT_SUITE in suite.split("+") else [])]
