"""The walls between the rooms: a room imports only from the rooms that are listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "src"
_GROUND = {"common"}
_MACHINE = {"config", "hardware", "model"} | _GROUND
ALLOWED = {
    "common": set(), "config": _GROUND, "hardware": _GROUND, "model": _GROUND,
    "hub": {"config"} | _GROUND, "runtime": {"config"} | _GROUND, "planner": _MACHINE,
    "store": {"hub", "config", "model"} | _GROUND, "gateway": {"runtime", "config"} | _GROUND,
    "observability": {"front", "runtime", "config"} | _GROUND, "int4": {"store", "hub", "config", "model"} | _GROUND,
    "cluster": {"runtime"} | _MACHINE,
    "deployment": {"int4", "store", "planner"} | _MACHINE,
    "engine": {"deployment", "cluster", "runtime", "planner"} | _MACHINE,
    "front": {"runtime", "config"} | _GROUND,
    "commands": {"engine", "cluster", "front", "deployment", "int4", "gateway", "observability", "store", "runtime",
                 "planner"} | _MACHINE,
}
SHARED = ("shoehorn_vllm.protocol", "shoehorn_vllm.fork_server.messages")
"""Modules of `shoehorn_vllm` that `shoehorn` may import."""
IN_THE_FRONT = "shoehorn_vllm.api"
"""The admission middleware, which the front runs in a process of its own."""


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_room_imports_only_from_allowed_rooms(room: str) -> None:
    for path in sorted((SOURCES / "shoehorn" / room).rglob("*.py")):
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "shoehorn" and parts[1] in ALLOWED and parts[1] != room:
                assert parts[1] in ALLOWED[room], f"{path.name}: {room} may not import {parts[1]}"
            assert parts[0] not in {"vllm", "shoehorn_vllm"} or module.startswith(SHARED) or (
                room == "front" and module.startswith(IN_THE_FRONT)), \
                f"{path.name}: only code inside the engine may import {module}"


def test_every_room_is_listed_and_says_what_it_is_for() -> None:
    rooms = {path.parent.name: path for path in (SOURCES / "shoehorn").glob("*/__init__.py")}
    assert set(rooms) == set(ALLOWED)
    for path in (SOURCES / "shoehorn").rglob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, f"{path}: rooms re-export nothing"


def test_files_are_few_and_small() -> None:
    assert len(list((SOURCES / "shoehorn").glob("*.py"))) <= 6
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.rglob("*.py"))
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] <= 150
