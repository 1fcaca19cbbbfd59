"""Films a student's episodes of its evaluation beside those of its teachers.

The evaluation's own code runs the episode, in a batch with the same other episodes, so the student does to the bit
what the tables of results say. A second environment repeats the actions and is rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import mujoco
import numpy as np
import numpy.typing as npt
import torch

from cpd.comm import TORCH_THREADS, SerialComm, choose_device
from cpd.config import Config
from cpd.envs.cells import CHUNK, EnvPool
from cpd.envs.episodes import Actor, Belief, Outcome, run_episodes
from cpd.envs.goals import Goal
from cpd.envs.metaworld.fast.rendering import RenderModel
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.suite import DEFAULT_SUITE
from cpd.evaluation.run_evaluation import load_stage, row_actor
from cpd.export.movie_files import Frame
from cpd.run.directory import Run, RunError, StudentElement, TeacherElement

#: The view from the robot's left: it hides no task's object, as Meta-World's own cameras do, and is upright.
_LOOK_AT: Final = (-0.05, 0.66, 0.12)
_DISTANCE: Final = 1.15
_AZIMUTH: Final = 190.0
_ELEVATION: Final = -28.0


class Film(NamedTuple):
    """One policy's episode."""

    outcome: Outcome
    """As in the table of episodes."""
    success_step: int | None
    """The first step that counts as a success, from 1."""
    steps: list[int]
    """How many steps each frame shows the episode after."""
    frames: list[Frame]


class Pair(NamedTuple):
    """The episodes of a teacher and of the student from one goal."""

    task: str
    teacher: Film
    student: Film


class _Recorder:
    """Acts like another actor, and keeps the actions of one episode of the batch."""

    def __init__(self, actor: Actor, row: int) -> None:
        self._actor, self._row = actor, row
        self.actions: list[npt.NDArray[np.float32]] = []

    @property
    def beliefs(self) -> Sequence[Belief]:
        beliefs: Sequence[Belief] = getattr(self._actor, "beliefs", ())
        return beliefs

    def reset(self, tasks: Sequence[str]) -> None:
        self._actor.reset(tasks)

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        actions_BA = self._actor.act(obs_BO)
        self.actions.append(actions_BA[self._row].copy())
        return actions_BA


def run_evaluated(
    actor: Actor, config: Config, task: str, index: int, pool: EnvPool
) -> tuple[Outcome, list[npt.NDArray[np.float32]]]:
    """Run the episode of an evaluation goal as the evaluation does; return its outcome and its actions, [4] each.

    Raises:
        ValueError: if the evaluation has no goal `index`.
    """
    counts = config.evaluation
    if not 0 <= index < counts.num_episodes:
        raise ValueError(f"goal {index}: the evaluation of {config.name} has goals 0 to {counts.num_episodes - 1}")
    # Rounding depends on the batch, so the goals that the evaluation runs together stay together.
    start = index - index % CHUNK
    goals = pool.suite.goal_set(task, counts.goal_set, counts.num_episodes)[start : start + CHUNK]
    recorder = _Recorder(actor, index - start)
    groups = [(pool.get(task), goals)]
    (outcomes,) = run_episodes(recorder, groups, config.stream.horizon, stop_at_success=False)
    return outcomes[index - start], recorder.actions


class _Camera:
    """Renders one task's episodes."""

    def __init__(self, task: str, size: int) -> None:
        self._env = TaskEnv(task)
        self._picture = RenderModel(self._env.unwrapped.fullpath, size, size)
        self._renderer = mujoco.Renderer(self._picture.model, size, size)
        self._view = mujoco.MjvCamera()
        self._view.lookat[:] = _LOOK_AT
        self._view.distance, self._view.azimuth, self._view.elevation = _DISTANCE, _AZIMUTH, _ELEVATION

    def film(
        self,
        goal: Goal,
        outcome: Outcome,
        actions: Sequence[npt.NDArray[np.float32]],
        every: int,
        to_the_end: bool,
    ) -> Film:
        """Repeat an episode; render every `every`-th step and the last, by default the first success."""
        self._env.reset(goal)
        steps, frames = [0], [self._render()]
        success_step = None
        for step, action in enumerate(actions, start=1):
            _, _, success = self._env.step(action)
            if success and success_step is None:
                success_step = step
            is_last = step == len(actions) or (success_step is not None and not to_the_end)
            if is_last or step % every == 0:
                steps.append(step)
                frames.append(self._render())
            if is_last:
                break
        assert outcome.success == (success_step is not None), "a repeated episode is the same to the bit"
        return Film(outcome, success_step, steps, frames)

    def _render(self) -> Frame:
        env = self._env.unwrapped
        self._picture.copy_state(env.model, env.data)
        self._renderer.update_scene(self._picture.data, camera=self._view)
        # Without a GPU, shadows and reflections take three quarters of the time.
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        frame: Frame = self._renderer.render()
        return frame

    def close(self) -> None:
        self._renderer.close()
        self._env.close()


def film_student(
    run: Run,
    student: StudentElement,
    tasks: Sequence[str],
    goal: int,
    *,
    size: int,
    every: int,
    to_the_end: bool,
    make_teacher: Callable[[TeacherElement], Actor],
    log: Callable[[str], None],
) -> list[Pair]:
    """Film the student after its latest stage, and the teacher of each task.

    Args:
        run: the run directory.
        student: one of its students.
        tasks: of the student's stream.
        goal: index of the evaluation goal.
        size: width and height of a frame in pixels.
        every: render each so many steps.
        to_the_end: whether films go on after the first success.
        make_teacher: makes the actor of a teacher.
        log: receives a line per task.

    Raises:
        RunError: if the student has no stage yet, or a task has no trained teacher.
        ValueError: if the evaluation has no such goal.
        DamagedFileError: if a policy is damaged.
    """
    torch.set_num_threads(TORCH_THREADS)
    config, device = student.config, choose_device(SerialComm())
    stages = [s for s in range(-1, len(config.stream.tasks)) if student.stage_policy(s).exists()]
    if not stages:
        raise RunError(f"{student.path} holds no trained stage yet; run `cpd distill` first")
    if config.stream.suite != DEFAULT_SUITE:
        raise RunError(f"{run.root} is on the suite {config.stream.suite!r}: only Meta-World can be filmed")

    def teacher_of(task: str) -> Actor:
        teacher = run.teacher_of(task, student.seed)
        if not run.is_trained(teacher):
            raise RunError(f"{teacher.path} holds no policy; launch the run again to finish it")
        return make_teacher(teacher)

    teachers = {task: teacher_of(task) for task in tasks}
    actor = row_actor(student, load_stage(student, stages[-1]).to(device), stages, teacher_of)
    pairs = []
    for number, task in enumerate(tasks, start=1):
        pool = EnvPool()
        camera = _Camera(task, size)
        films = []
        for policy in (teachers[task], actor):
            outcome, actions = run_evaluated(policy, config, task, goal, pool)
            goals = pool.suite.goal_set(task, config.evaluation.goal_set, config.evaluation.num_episodes)
            films.append(camera.film(goals[goal], outcome, actions, every, to_the_end))
        camera.close()
        pool.close()
        pairs.append(Pair(task, *films))
        results = (f"{name} {_result(film)}" for name, film in zip(("teacher", "student"), films, strict=True))
        log(f"{task} ({number}/{len(tasks)}): {', '.join(results)}")
    return pairs


def _result(film: Film) -> str:
    return f"succeeds at step {film.success_step}" if film.success_step else "does not succeed"
