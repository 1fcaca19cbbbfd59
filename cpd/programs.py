"""Where the command line's own files are: in a clone, or inside an installed wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

#: In a wheel, the folder of cpd/ that holds jobs/, analysis/ and slurm/. It installs no package of these names.
BUNDLE: Final = "bundled"
PACKAGE = Path(__file__).resolve().parent
#: The folder that holds jobs/, analysis/ and slurm/.
ROOT = PACKAGE / BUNDLE if (PACKAGE / BUNDLE).is_dir() else PACKAGE.parent


def load_program(name: str) -> ModuleType:
    """Import a module of jobs/ or analysis/, also where the current directory has folders of these names."""
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)
