"""The rules on imports and names, checked by reading the code."""

from __future__ import annotations

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: From the ground up, a line per floor. A room imports from itself and from the floors below it.
FLOORS = [
    ("cpd",),  # the modules that lie in no room
    ("cpd.envs",),
    ("cpd.config",),
    ("cpd.run",),
    ("cpd.cluster", "cpd.student"),
    ("cpd.evaluation",),
    ("cpd.teachers", "cpd.distill"),
    ("cpd.export",),
    ("analysis",),
    ("jobs",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ["torch", "mpi4py", "mujoco", "metaworld"]


def modules() -> dict[str, Path]:
    files = [path for top in ("cpd", "jobs", "analysis") for path in (ROOT / top).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files
    }


MODULES = modules()


def room(module: str) -> str:
    """The room of a module: its folder below cpd/, or its top-level package."""
    parts = module.split(".")
    folder = MODULES[module].parent.relative_to(ROOT).parts
    return ".".join(parts[:2]) if parts[0] == "cpd" and len(folder) > 1 else parts[0]


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, also inside functions and behind TYPE_CHECKING."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in MODULES else node.module)
    return names


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR_OF)
    assert len([name for name in FLOOR_OF if name.startswith("cpd.")]) <= 9


def test_rooms_import_from_lower_floors_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in targets & MODULES.keys()
        if room(target) != room(name) and FLOOR_OF[room(target)] >= FLOOR_OF[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_files_import_each_other_in_no_circle() -> None:
    inside = {name: (targets & MODULES.keys()) - {name} for name, targets in IMPORTS.items()}
    graphlib.TopologicalSorter(inside).prepare()  # raises CycleError, which names the circle


def test_no_two_folders_have_one_name() -> None:
    folders = {path.parent.relative_to(ROOT) for path in [*MODULES.values(), *(ROOT / "slurm").rglob("*.py")]}
    assert len({folder.name for folder in folders}) == len(folders)


def test_a_public_name_is_defined_once() -> None:
    """`main` starts a program, and a name that three or more files of one folder define is its convention."""
    places = collections.defaultdict(list)
    for path in [*MODULES.values(), *(ROOT / "slurm").rglob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].append(path.relative_to(ROOT))
    several = {
        name: paths
        for name, paths in places.items()
        if len(paths) > 1 and name != "main" and (len(paths) < 3 or len({path.parent for path in paths}) > 1)
    }
    assert not several


def test_mpi_is_imported_in_one_place() -> None:
    assert [name for name, targets in IMPORTS.items() if "mpi4py" in "".join(targets)] == ["cpd.comm"]


@pytest.mark.parametrize(
    "module", ["jobs.launch", "jobs.status", "jobs.report", "analysis.build", "jobs.export", "cpd.export.hub"]
)
def test_what_runs_on_a_login_node_stays_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_training_imports_no_compiler() -> None:
    """The import of torch._dynamo takes longer than that of torch."""
    code = (
        "import sys, torch; from torch import nn; from cpd.teachers.adam import Adam; net = nn.Linear(2, 1);"
        "optimizer = Adam(net.parameters(), .1); net(torch.ones(2)).backward();"
        "nn.utils.clip_grad_norm_(net.parameters(), 1.0); optimizer.step();"
        "from cpd.student.expert_mix import grouped_outer, grouped_product; tokens = torch.ones(3, 2);"
        "ends = torch.tensor([1, 3], dtype=torch.int32); grouped_product(tokens, torch.ones(2, 2, 2), ends);"
        "grouped_outer(tokens, tokens, ends, 0, 2); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
