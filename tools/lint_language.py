"""Language lint: rejects the words of tools/language.yaml in prose, docstrings, messages and identifiers.

Rules: Python files are checked in comments, docstrings, strings that contain a space, and names of tests; other files
line by line, without code spans. A line that quotes another program carries `language: quoted` in a comment.
tools/language_allowed.yaml holds the number of findings still permitted per file; the numbers may only fall.
usage: python tools/lint_language.py [--shrink] [--list] [PATH...]
"""

from __future__ import annotations

import argparse
import ast
import collections
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HOME = Path(__file__).resolve().parents[1]
RULES = HOME / "tools" / "language.yaml"
ALLOWED = HOME / "tools" / "language_allowed.yaml"
SUFFIXES = {".py", ".md", ".js", ".html", ".css", ".j2", ".yaml", ".yml", ".toml", ".in", ""}
SKIPPED = re.compile(r"(^|/)(demo/(text|model)|golden|captures|bench/results)/|LICENSE|marked\.esm\.js|words\.js$"
                     r"|tools/language|\.zh-CN\.md$|tests/project/test_language\.py$|\.gitignore$")
WAIVER = "language: quoted"


@cache
def rules() -> dict[str, Any]:
    """Read the rules."""
    loaded: dict[str, Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return loaded


@cache
def _compiled() -> list[tuple[re.Pattern[str], re.Pattern[str] | None, str]]:
    return [(re.compile(rule["pattern"], re.IGNORECASE), re.compile(rule["unless"]) if "unless" in rule else None,
             rule["say"]) for rule in rules()["prose"]]


def check_prose(text: str) -> list[str]:
    """Return one message per rejected construction in a piece of prose."""
    text = re.sub(r"`[^`]*`|{{.*?}}|{%.*?%}", "`code`", text)
    return [f"{match[0].lower()!r}: use {say}" for pattern, unless, say in _compiled()
            for match in pattern.finditer(text)
            if not (unless and any(permitted.start() <= match.start() < permitted.end()
                                   for permitted in unless.finditer(text)))]


def check_opening(docstring: str) -> list[str]:
    """Return a message if a docstring opens with a question word instead of a verb or a noun."""
    first = re.match(r"\w*", docstring.strip())
    word = first[0] if first else ""
    return [f"docstring opens with {word!r}: use a verb or a noun"] if word in rules()["openings"] else []


def check_python(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, message) for every finding in a Python file."""
    quoted = {number for number, line in enumerate(source.splitlines(), 1) if WAIVER in line}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[0] not in quoted:
            yield from ((token.start[0], message) for message in check_prose(token.string))
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value and line not in quoted:
            yield from ((line, message) for message in check_prose(node.value))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from ((line, message) for message in check_opening(ast.get_docstring(node) or ""))
        yield from ((line, message) for message in _check_name(node))


def _check_name(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
        return check_prose(node.name.replace("_", " "))
    name = {ast.Name: "id", ast.arg: "arg", ast.FunctionDef: "name", ast.ClassDef: "name"}.get(type(node), "")
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
        return []
    identifier = str(getattr(node, name, "")).strip("_")
    return [f"identifier {identifier!r}: use a noun"] if identifier.lower() in rules()["identifiers"] else []


def check_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, message) for every finding in a file that is not Python."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        is_code ^= line.lstrip().startswith("```")
        if not is_code and WAIVER not in line:
            yield from ((number, message) for message in check_prose(line))


def check_file(path: Path) -> list[tuple[int, str]]:
    """Return the findings of one file in order of lines."""
    text = path.read_text(encoding="utf-8")
    return sorted(check_python(text) if path.suffix == ".py" else check_lines(text))


def files() -> list[str]:
    """List the files under version control that the lint covers."""
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=HOME, check=True,
                             capture_output=True, text=True).stdout
    return [name for name in listing.splitlines() if Path(name).suffix in SUFFIXES and not SKIPPED.search(name)
            and (HOME / name).is_file()]


def room_of(name: str) -> str:
    """Name the part of the tree that a file belongs to."""
    parts = Path(name).parts[:-1]
    return "/".join(parts[:3 if parts[:1] == ("src",) else 2]) or "."


def main() -> int:
    """Check all files; return 1 if one has more findings than permitted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print every finding")
    parser.add_argument("--shrink", action="store_true", help="lower the permitted numbers to the present ones")
    parser.add_argument("paths", nargs="*", help="print the findings of these files and folders only")
    arguments = parser.parse_args()
    permitted: dict[str, int] = yaml.safe_load(ALLOWED.read_text(encoding="utf-8")) or {}
    findings = {name: check_file(HOME / name) for name in files()}
    rooms: collections.Counter[str] = collections.Counter()
    failed = False
    for name, messages in findings.items():
        rooms[room_of(name)] += len(messages)
        is_selected = name.startswith(tuple(arguments.paths)) if arguments.paths else arguments.list
        is_over = len(messages) > permitted.get(name, 0)
        failed |= is_over and not arguments.paths
        if is_selected or (is_over and not arguments.paths):
            print("".join(f"{name}:{line}: {message}\n" for line, message in messages), end="")
    if arguments.shrink:
        smaller = {name: min(count, len(findings.get(name, ()))) for name, count in sorted(permitted.items())}
        ALLOWED.write_text(yaml.safe_dump({name: count for name, count in smaller.items() if count}), encoding="utf-8")
    if not arguments.paths:
        print(f"language: {sum(rooms.values())} findings"
              + "".join(f"\n  {count:5} {room}" for room, count in rooms.most_common() if count))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
