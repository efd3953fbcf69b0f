"""The documents: links resolve, named files and commands exist, the diagrams of docs/architecture.md match the code."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoehorn import cli
from shoehorn.common.paths import HOME
from shoehorn.runtime.state import Phase

DOCUMENTS = sorted(path for path in HOME.rglob("*.md")
                   if not {".venv", "node_modules"} & set(path.relative_to(HOME).parts)
                   and not any(part.startswith(".") for part in path.relative_to(HOME).parts))
NAMES = [str(path.relative_to(HOME)) for path in DOCUMENTS]
ARCHITECTURE = (HOME / "docs" / "architecture.md").read_text(encoding="utf-8")
_PATH = re.compile(r"`((?:src|tests|docs|tools|bench|demo|gateway|profiles|requirements|monitoring|healthcheck)/"
                   r"[\w./*-]+)`")


def allowed() -> dict[str, set[str]]:
    """Read the rooms and what each may import from tests/project/test_rooms.py."""
    specification = importlib.util.spec_from_file_location("rooms", HOME / "tests" / "project" / "test_rooms.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    rooms: dict[str, set[str]] = module.ALLOWED
    return rooms


def diagrams() -> list[str]:
    """Return the Mermaid diagrams of docs/architecture.md."""
    return re.findall(r"```mermaid\n(.*?)```", ARCHITECTURE, re.DOTALL)


def broken_links(path: Path) -> list[str]:
    """Return the relative links of a document whose target or heading is missing."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        lines = file.read_text(encoding="utf-8").splitlines() if heading and file.is_file() else []
        headings = {re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
                    for line in lines if line.startswith("#")}
        if not file.exists() or (heading and heading not in headings):
            broken.append(target)
    return broken


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield (command, subcommand) for `shoehorn X`, `shoehorn X Y` and `make X` in code spans and code blocks."""
    for code in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text):
        code = re.sub(r"docker compose exec \S+ |\s#.*", "", code)
        code = re.sub(r"docker compose run --rm shoehorn (?=\S)", "shoehorn ", code)
        words = re.findall(r"(?:^|[\s/])shoehorn (?!import)([a-z]+(?: [a-z]+)?)", code)
        yield from (("shoehorn", word) for word in words)
        yield from (("make", word) for word in re.findall(r"^(?:\$ )?make ([a-z-]+)", code, re.MULTILINE))


def is_shoehorn_command(words: str) -> bool:
    """Check the words against the real parser, with a nested subcommand where the parser has one."""
    names = words.split()
    parser: argparse.ArgumentParser = cli.parser()
    for name in names:
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:
            return True
        if name not in nested[0].choices:
            return not nested[0].required
        parser = nested[0].choices[name]
    return True


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    assert broken_links(HOME / name) == []


def test_broken_link_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# Title here\n[a](b.md) [c](#title-here) [d](#missing) [e](https://example.com)\n")
    assert broken_links(path) == ["b.md", "#missing"]


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    paths = _PATH.findall((HOME / name).read_text(encoding="utf-8"))
    assert [path for path in paths if not list(HOME.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", NAMES)
def test_named_commands_exist(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (HOME / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, words in commands((HOME / name).read_text(encoding="utf-8")):
        assert words in targets if program == "make" else is_shoehorn_command(words), f"{program} {words}"


@pytest.mark.parametrize(("text", "expected"), [
    ("`docker compose run --rm shoehorn shoehorn convert X`", False),
    ("`docker compose run --rm shoehorn convert X`", True),
    ("`docker compose exec shoehorn shoehorn keys add NAME`", True), ("`shoehorn keys remove x`", False)])
def test_wrong_command_is_found(text: str, expected: bool) -> None:
    assert all(is_shoehorn_command(words) for _, words in commands(text)) is expected


def test_both_readmes_link_to_each_other_and_show_the_same_figures() -> None:
    english, chinese = ((HOME / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert "(README.zh-CN.md)" in english.splitlines()[0]
    assert "(README.md)" in chinese.splitlines()[0]
    figure = re.compile(r"\d+(?:[.,]\d+)+")
    assert sorted(figure.findall(english)) == sorted(figure.findall(chinese))
    assert re.findall(r"```.*?```", english, re.DOTALL)[3:] == re.findall(r"```.*?```", chinese, re.DOTALL)[3:]


def test_diagram_of_rooms_is_the_transitive_reduction_of_the_allowed_imports() -> None:
    rooms = allowed()
    reduced = {(room, other) for room, others in rooms.items() for other in others
               if not any(other in rooms[between] for between in others)}
    drawn = re.findall(r"^\s+(\w+) --> (\w+)$", diagrams()[1], re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == reduced


def test_table_of_rooms_lists_all_allowed_imports() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", ARCHITECTURE, re.MULTILINE)
    assert {room: set(re.findall(r"\w+", others)) for room, others in rows} == allowed()


def test_state_diagram_has_every_phase() -> None:
    edges = re.findall(r"^\s+(\w+|\[\*\]) --> (\w+|\[\*\])", diagrams()[2], re.MULTILINE)
    assert {name for edge in edges for name in edge} - {"[*]"} == {phase.value for phase in Phase}


def test_document_of_the_state_names_the_marks_that_the_code_writes(tmp_path: Path) -> None:
    from shoehorn.runtime.state import StateFile

    StateFile(tmp_path).update(phase=Phase.FAILED)
    marks = {path.name for path in tmp_path.iterdir()}
    StateFile(tmp_path).update(phase=Phase.READY)
    marks |= {path.name for path in tmp_path.iterdir()}
    section = ARCHITECTURE[ARCHITECTURE.index("\n## State"):]
    assert {mark for mark in marks if f"`{mark}`" not in section and not mark.startswith(".")} == set()
    assert "`failed`" not in section
