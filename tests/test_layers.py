"""Imports go down only: methods -> masks -> formats -> kernels -> runtime, as the README's picture says."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "sparsekit"

# A module may import those of its own row and of the rows above it.
ORDER = [
    {"errors", "version", "registry", "files", "progress", "interrupt"},
    {"report", "patterns"},
    {"masks"},
    {"plan"},
    {"formats"},
    {"ops"},
    {"backends"},
    {"nn"},
    {"hf"},
    {"targets"},
    {"pack"},
    {"archs", "snapshot", "check", "checkpoint"},
    {"calibration", "slicing", "residual", "knapsack", "shapes", "budgets"},
    {"surgery"},
    {"methods"},
    {"prune", "prune_structured", "reconstruct", "benchmarking", "evaluate", "shorten", "thin_stream", "width_solver"},
    {"train"},
    {"sparsify", "doctor"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
TRAINING = {"archs", "budgets", "calibration", "methods", "prune", "reconstruct", "shapes", "surgery"} | {
    "prune_structured",
    "residual",
    "shorten",
    "slicing",
    "thin_stream",
    "width_solver",
}
RUNTIME = {"formats", "ops", "backends", "nn", "hf", "pack", "checkpoint"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms imported when the module is; imports inside functions run later and are left out."""
    rooms = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparsekit":
            parts = node.module.split(".")[1:]
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {
                (alias.name.split(".") + ["__init__"])[1] for alias in node.names if alias.name.startswith("sparsekit")
            }
    return rooms - {"sparsekit_kernels"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = room(path)
    assert here in RANK, f"{here} is new: give it a row in ORDER"
    for other in imported_rooms(path):
        assert RANK[other] <= RANK[here], f"{path.name} imports {other}, which lies above it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_runtime_half_imports_no_training_code(path):
    if room(path) in RUNTIME:
        assert not imported_rooms(path) & TRAINING


def test_kernels_never_import_sparsekit():
    for path in (REPOSITORY / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any((name or "").split(".")[0] == "sparsekit" for name in names), path
