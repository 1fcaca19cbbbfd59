"""Draws the figures and tables of all published results again, several folders at a time (`make figures`)."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from analysis.build import build
from analysis.build_teachers import build_teachers
from analysis.published_teachers import find_published
from cpd.run.claim import REPOSITORY_RESULTS

#: Figures of several folders together: where they go, and what they show.
TOGETHER = {"stand-ins/figures": ("stand-ins/ablation", "stand-ins/baselines", "stand-ins/tuned", "stand-ins/ewc")}
#: Core-minutes that all of them take.
CORE_MINUTES = 8


def figure_folders(root: Path) -> dict[Path, tuple[Path, ...]]:
    """Every folder of figures below `root` and the folders of results that it is drawn from; the largest first."""
    folders: dict[Path, tuple[Path, ...]] = {}
    for table in root.rglob("stages.csv"):
        folders[table.parent / "figures"] = (table.parent,)
    for target, names in TOGETHER.items():
        if all((root / name).is_dir() for name in names):
            folders[root / target] = tuple(root / name for name in names)
    if (root / "teachers").is_dir():
        folders[root / "teachers" / "figures"] = (root / "teachers",)
    # The largest first, so that no process draws the longest one alone at the end.
    return dict(sorted(folders.items(), key=lambda item: -sum(map(_num_bytes, item[1]))))


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.csv*"))


def draw_folder(target: Path, sources: tuple[Path, ...]) -> tuple[int, float]:
    """Draw one folder of figures; returns the number of files written and the seconds taken."""
    start = time.monotonic()
    if find_published(sources[0]):
        written = build_teachers(sources[0], target)
    else:
        written = build(sources, target if len(sources) > 1 else None)
    return len(written), time.monotonic() - start


def main() -> int:
    """Command line of `python -m analysis.draw_published`; returns the exit code."""
    folders = figure_folders(REPOSITORY_RESULTS)
    processes = os.cpu_count() or 1
    print(
        f"drawing {len(folders)} folders of figures with {processes} processes: about {CORE_MINUTES} core-minutes",
        flush=True,
    )
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(draw_folder, target, sources): target for target, sources in folders.items()}
        for number, future in enumerate(as_completed(futures), start=1):
            num_files, seconds = future.result()
            name = futures[future].relative_to(REPOSITORY_RESULTS)
            print(f"[{number}/{len(folders)}] {name}: {num_files} files in {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
