"""Writes frames as mp4 (H.264) and gif."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from cpd.run.files import atomic_write

Frame = npt.NDArray[np.uint8]
"""[height, width, 3]; height and width are even."""

#: Frames that a gif's colours are chosen from.
_PALETTE_FRAMES: Final = 8
#: One of the 256 stays free: for pixels that stay as they are.
_COLOURS: Final = 255


def write_mp4(path: Path, frames: Sequence[Frame], fps: int) -> None:
    """Write H.264 that every browser plays.

    Raises:
        ValueError: if imageio-ffmpeg is not installed.
    """
    if find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            "mp4 needs the encoder of imageio-ffmpeg, which is not installed: "
            "pip install 'continual-policy-distillation[export]', or write gif alone (--format gif)"
        )
    import imageio_ffmpeg

    height, width, _ = frames[0].shape
    options = ["-f", "mp4", "-crf", "26", "-preset", "slow", "-movflags", "+faststart", "-bitexact"]
    with atomic_write(path) as temporary:
        encoder = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=2,
            output_params=options,
            ffmpeg_log_level="error",
        )
        encoder.send(None)
        for frame in frames:
            encoder.send(np.ascontiguousarray(frame))
        encoder.close()


def write_gif(path: Path, frames: Sequence[Frame], fps: int) -> None:
    """Write a gif that repeats. All frames have the same colours, so that pixels that stay take no space."""
    step = max(1, len(frames) // _PALETTE_FRAMES)
    sample = Image.fromarray(np.concatenate(frames[::step]))
    # Unlike the median cut, this keeps rare colours: of buttons, goals and flags.
    palette = sample.quantize(_COLOURS, Image.Quantize.FASTOCTREE)
    first, *others = (Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    with atomic_write(path) as temporary:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=round(1000 / fps),
            loop=0,
            optimize=True,
        )


#: By the suffix of its files.
FORMATS: Final[dict[str, Callable[[Path, Sequence[Frame], int], None]]] = {"mp4": write_mp4, "gif": write_gif}
