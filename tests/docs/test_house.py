"""Hold the shape of the repository: folders and files of a size that one person reads, floors, and no circles."""

from __future__ import annotations

import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import grimp
import networkx as nx
import pytest

from tests.conftest import ROOT

MOST_FILES, MOST_LINES = 20, 350


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    """List every Python file that git knows or would take, relative to the top."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.fixture(scope="module")
def imports() -> nx.DiGraph:
    """Return the modules of the package with an edge from each to those that it imports, inside functions too."""
    built = grimp.build_graph("hecompile")
    graph = nx.DiGraph()
    graph.add_nodes_from(built.modules)
    for module in built.modules:
        graph.add_edges_from((module, imported) for imported in built.find_modules_directly_imported_by(module))
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def folder_of(module: str) -> str:
    """Return the folder that holds a module; a package's own `__init__` belongs to the package."""
    path = ROOT / module.replace(".", "/")
    return module if path.is_dir() else module.rpartition(".")[0]


def test_no_folder_has_more_files_than_one_looks_through(sources: list[Path]) -> None:
    counts = Counter(path.parent for path in sources if path.name != "__init__.py")
    assert len(counts) > 30
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_no_file_has_more_lines_than_one_reads_at_a_sitting(sources: list[Path]) -> None:
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_no_circle_between_modules(imports: nx.DiGraph) -> None:
    assert len(imports) > 200
    assert circles(imports) == []


def test_no_circle_between_folders(imports: nx.DiGraph) -> None:
    folders = nx.DiGraph((folder_of(a), folder_of(b)) for a, b in imports.edges if folder_of(a) != folder_of(b))
    assert len(folders) > 20
    assert circles(folders) == []


def test_circles_are_found() -> None:
    assert circles(nx.DiGraph([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")])) == [["a", "b", "c"]]


def test_every_room_stands_on_a_floor_of_the_contract_and_on_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (floors,) = [contract["layers"] for contract in settings["contracts"] if contract["id"] == "floors"]
    rooms = {room.strip() for floor in floors for room in floor.split("|")}
    package = ROOT / "hecompile"
    for parent in (package, package / "runtime", package / "models"):
        for entry in parent.iterdir():
            name = ".".join(entry.relative_to(ROOT).with_suffix("").parts)
            is_room = entry.is_dir() and any(entry.glob("*.py")) and entry.name not in ("runtime", "models")
            is_module = parent == package and entry.suffix == ".py" and entry.stem != "__init__"
            assert name in rooms or not (is_room or is_module), f"{name} stands on no floor; add it in pyproject.toml"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    below = -1
    for floor in floors:  # in the same order, top down
        for room in floor.split("|"):
            short = room.strip().removeprefix("hecompile.")
            assert f"`{short}`" in page, f"docs/architecture.md does not name {short}"
        row = page.find(f"\n| `{floor.split('|')[0].strip().removeprefix('hecompile.')}`")
        assert row > below, f"the row of {floor} is missing on the page, or not in this order"
        below = row
