"""Lays films of teachers and students out as the frames of one video, with what happens written on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cpd.envs.episodes import Outcome
from cpd.export.movie_files import Frame
from cpd.export.video import Film, Pair

#: Width of a whole video, pixels, that the default size of a tile leads to.
MAX_WIDTH: Final = 1600
MAX_TILE: Final = 320
ASPECT: Final = 16 / 9
#: Height of a pair of tiles relative to its width, with its lines of text.
_PAIR_ASPECT: Final = 0.68
_BACKGROUND: Final = "#ffffff"
_TEXT: Final = "#1f2328"
_FAINT: Final = "#59636e"
_RIGHT: Final = "#1a7f37"
_WRONG: Final = "#b42318"


def choose_columns(num_pairs: int) -> int:
    """Return the number of columns whose grid is nearest to 16:9 and has few empty places."""

    def cost(columns: int) -> float:
        rows = math.ceil(num_pairs / columns)
        empty = (rows * columns - num_pairs) / num_pairs
        return abs(math.log(columns / (rows * _PAIR_ASPECT) / ASPECT)) + empty

    return min(range(1, num_pairs + 1), key=cost)


def choose_size(columns: int) -> int:
    """Return the width of a tile in pixels, for a video of at most `MAX_WIDTH`."""
    return min(MAX_TILE, MAX_WIDTH // columns // 4 * 2)


class _Layout:
    """Places and fonts of a grid of pairs."""

    def __init__(self, pairs: Sequence[Pair], columns: int) -> None:
        self.tile = pairs[0].teacher.frames[0].shape[0]
        self.columns = min(columns, len(pairs))
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        points = min(18, max(10, round(0.07 * self.tile)))
        self.font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), points)
        self.bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), points)
        self.line = round(1.4 * points)
        self.margin = max(4, self.tile // 24) // 2 * 2
        has_beliefs = any(pair.student.outcome.believed for pair in pairs)
        self.header = self.line * (2 if has_beliefs else 1) + self.margin // 2
        self.width = 2 * self.tile + self.margin
        self.height = self.header + self.tile + self.line + self.margin // 2
        rows = math.ceil(len(pairs) / self.columns)
        width = self.columns * (self.width + 2 * self.margin)
        height = rows * (self.height + 2 * self.margin)
        self.picture = (width + width % 2, height + height % 2)

    def corner(self, index: int) -> tuple[int, int]:
        """Return the left upper corner of a pair."""
        row, column = divmod(index, self.columns)
        return (
            self.margin + column * (self.width + 2 * self.margin),
            self.margin + row * (self.height + 2 * self.margin),
        )


def grid_frames(pairs: Sequence[Pair], columns: int, num_held: int) -> list[Frame]:
    """Return the frames of the video; shorter episodes keep their last frame, and all hold it for `num_held`."""
    layout = _Layout(pairs, columns)
    length = max(len(film.frames) for pair in pairs for film in (pair.teacher, pair.student))
    frames = []
    for index in range(length):
        picture = Image.new("RGB", layout.picture, _BACKGROUND)
        draw = ImageDraw.Draw(picture)
        for place, pair in enumerate(pairs):
            _draw_pair(picture, draw, layout, layout.corner(place), pair, index)
        frames.append(np.asarray(picture))
    return frames + [frames[-1]] * num_held


def _draw_pair(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    layout: _Layout,
    corner: tuple[int, int],
    pair: Pair,
    index: int,
) -> None:
    x, y = corner
    draw.text((x, y), _cut(pair.task.removesuffix("-v3"), layout.bold, layout.width), _TEXT, layout.bold)
    outcome = pair.student.outcome
    if outcome.believed:
        is_right = outcome.believed == pair.task
        text = _cut(_belief(outcome, is_right), layout.font, layout.width)
        draw.text((x, y + layout.line), text, _RIGHT if is_right else _WRONG, layout.font)
    for name, film, left in (
        ("teacher", pair.teacher, x),
        ("student", pair.student, x + layout.width - layout.tile),
    ):
        _draw_film(picture, draw, layout, (left, y + layout.header), name, film, index)


def _belief(outcome: Outcome, is_right: bool) -> str:
    """Say what the student believes, and what it acts for if that is not only the most likely task."""
    text = f"{'✓' if is_right else '✗'} believes {outcome.believed} {100 * (outcome.confidence or 0.0):.0f} %"
    plan = dict.fromkeys(task for task in (outcome.plan_first, outcome.plan_second) if task)
    if list(plan) != [outcome.believed]:
        text += f", acts for {', then '.join(plan)}"
    return text.replace("-v3", "")


def _draw_film(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    layout: _Layout,
    corner: tuple[int, int],
    name: str,
    film: Film,
    index: int,
) -> None:
    left, top = corner
    tile = layout.tile
    index = min(index, len(film.frames) - 1)
    step = film.steps[index]
    picture.paste(Image.fromarray(film.frames[index]), corner)
    below = top + tile + layout.margin // 2
    draw.text((left, below), name, _TEXT, layout.font)
    draw.text((left + tile, below), f"step {step}", _FAINT, layout.font, anchor="ra")
    has_succeeded = film.success_step is not None and step >= film.success_step
    if not has_succeeded and index < len(film.frames) - 1:
        return
    colour, flag = (_RIGHT, "success") if has_succeeded else (_WRONG, "no success")
    box = draw.textbbox((left + layout.margin, top + layout.margin), flag, layout.bold)
    draw.rectangle((left, top, box[2] + layout.margin, box[3] + layout.margin), colour)
    draw.text((left + layout.margin, top + layout.margin), flag, "#ffffff", layout.bold)
    draw.rectangle((left, top, left + tile - 1, top + tile - 1), outline=colour, width=max(2, tile // 80))


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
