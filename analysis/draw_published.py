"""Draws the figures and tables of all published results, several folders in parallel (`make figures`)."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from analysis.build import build
from cpd.run.claim import REPOSITORY_RESULTS
from cpd.run.command import exit_quietly

#: Figures that compare several folders: the folder to write to, and the folders of results.
COMPARISONS = {
    "stand-ins/figures": ("stand-ins/ablation", "stand-ins/baselines", "stand-ins/tuned", "stand-ins/ewc")
}
#: Time to draw all of them, in core-minutes.
CORE_MINUTES = 6


def figure_folders(root: Path) -> dict[Path, tuple[Path, ...]]:
    """Return every folder of figures below `root` and the folders of results that it is drawn from."""
    folders: dict[Path, tuple[Path, ...]] = {}
    for table in root.rglob("stages.csv"):
        folders[table.parent / "figures"] = (table.parent,)
    for target, names in COMPARISONS.items():
        if all((root / name).is_dir() for name in names):
            folders[root / target] = tuple(root / name for name in names)
    if (root / "teachers").is_dir():
        folders[root / "teachers" / "figures"] = (root / "teachers",)
    # Largest first, so that the last folder to finish is a small one.
    return dict(sorted(folders.items(), key=lambda item: -sum(map(_num_bytes, item[1]))))


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.csv*"))


def draw_folder(target: Path, sources: tuple[Path, ...]) -> tuple[int, float]:
    """Draw one folder of figures; return the number of files written and the seconds that it took."""
    start = time.monotonic()
    # Without an explicit target, build() also removes what earlier versions drew there.
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
    exit_quietly(main)
