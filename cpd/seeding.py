"""Random streams as pure functions of a seed and a name: no draw depends on what was drawn before it."""

from __future__ import annotations

import zlib

import numpy as np


def _words(seed: int, path: tuple[int | str, ...]) -> list[int]:
    return [seed, *(zlib.crc32(name.encode()) if isinstance(name, str) else name for name in path)]


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """Return a NumPy generator for the stream named by `path`, e.g. `generator(seed, "batch", stage, step)`.

    Integers in `path` must not be negative. The same number of them must always follow a name, since NumPy pads
    short seeds with zeros, and a 0 at the end may then make no difference.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_words(seed, path))))


def derive(seed: int, *path: int | str) -> int:
    """Return a 63-bit seed for another library's generator, from the stream named by `path`."""
    words = np.random.SeedSequence(_words(seed, path)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
