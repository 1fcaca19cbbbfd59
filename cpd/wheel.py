"""How the wheel is built, for setuptools: jobs/, analysis/ and slurm/ move into cpd/."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel

BUNDLED = ("jobs", "analysis", "slurm")


class BdistWheel(bdist_wheel):  # type: ignore[misc]
    """Builds a wheel whose only top-level package is `cpd`; editable installs are not affected."""

    def run(self) -> None:
        """Build all packages and move those of the command line before they are packed."""
        self.run_command("build")
        library = Path(self.get_finalized_command("build").build_lib)
        bundle = library / "cpd" / "bundled"
        shutil.rmtree(bundle, ignore_errors=True)  # of an earlier build
        bundle.mkdir()
        for name in BUNDLED:
            (library / name).rename(bundle / name)
        super().run()

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        """Write the metadata, which names the top-level packages."""
        super().egg2dist(egginfo_path, distinfo_path)
        (Path(distinfo_path) / "top_level.txt").write_text("cpd\n", encoding="utf-8")
