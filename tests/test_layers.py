"""The house's rules on imports, held by reading the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: From the bottom up; a module may import from its own layer and those below. The longest prefix counts.
LAYERS = [
    ["cpd.tasks", "cpd.strict_load", "cpd.config", "cpd.files", "cpd.seeding", "cpd.runs", "cpd.lease"],
    ["cpd.interrupt", "cpd.provenance", "cpd.tables", "cpd.record", "cpd.comm", "cpd.ledger", "cpd.profile"],
    ["cpd.session", "cpd.submission", "cpd.checkpoint", "cpd.device", "cpd.metrics"],
    [
        *("cpd.envs", "cpd.shards", "cpd.student", "cpd.memory", "cpd.local_queue", "cpd.slurm"),
        *("cpd.results", "cpd.result_tables", "cpd.measures", "cpd.summary", "cpd.starts", "cpd.adoption"),
    ],
    ["cpd.teachers", "cpd.distill", "cpd.evaluate", "cpd.watch"],
    ["jobs", "analysis"],
]
PURE = ["torch", "mpi4py", "mujoco", "metaworld"]


def layer(module: str) -> int:
    found = [
        (len(prefix), i) for i, prefixes in enumerate(LAYERS) for prefix in prefixes if module.startswith(prefix)
    ]
    assert found, f"{module} belongs to no layer: give it one in tests/test_layers.py"
    return max(found)[1]


def modules() -> list[tuple[str, Path]]:
    files = [path for top in ("cpd", "jobs", "analysis") for path in (ROOT / top).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [(name.removesuffix(".__init__"), path) for name, path in zip(names, files, strict=True)]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return found | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_imports_point_down_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules()
        if name != "cpd"
        for target in imported(path)
        if target.partition(".")[0] in ("cpd", "jobs", "analysis") and target != "cpd"
        if layer(target) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_mpi_is_imported_in_one_place() -> None:
    assert [name for name, path in modules() if "mpi4py" in "".join(imported(path))] == ["cpd.comm"]


@pytest.mark.parametrize("module", ["jobs.launch", "jobs.status", "jobs.report", "analysis.build"])
def test_what_runs_on_a_login_node_stays_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {PURE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
