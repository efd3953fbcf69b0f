"""Engine upgrade report: compares another vLLM's sources with the installed one, without importing the new one.

Sections: imported and patched names, source files that the code cites, texts read from the engine's output, routes,
and, where the sources can be imported, the options of the argument parser. Exit code 1 if something is missing.
usage: python tools/compare_engine.py FOLDER      FOLDER contains `vllm/`, for example an unpacked wheel
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
PLUGIN = HOME / "src" / "shoehorn_vllm"
PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")
READERS = ("src/shoehorn/engine", "src/shoehorn/observability", "src/shoehorn_vllm/telemetry", "src/shoehorn_vllm/api")
CITATION = re.compile(r"(?:vllm/)?((?:v1|config|model_executor|distributed|entrypoints|platforms)/[\w/]+\.py)")
LEAST_TEXT = 12


@cache
def tree(path: Path) -> ast.Module | None:
    """Parse a file; None where it is missing."""
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def module_file(root: Path, module: str) -> Path:
    """Return the file of a module below the folder that contains `vllm/`."""
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def definition(root: Path, module: str, name: str, depth: int = 4) -> ast.AST | None:
    """Find a top-level name (or `Class.method`) of a module, through re-exports; None where it is missing."""
    if (root.joinpath(*module.split("."), name)).is_dir() or module_file(root, f"{module}.{name}").is_file():
        return ast.Module([], [])
    body: list[ast.stmt] = getattr(tree(module_file(root, module)), "body", [])
    outer, _, inner = name.partition(".")
    for node in ast.walk(ast.Module(body, [])):
        aliases = {} if not isinstance(node, ast.ImportFrom) else {each.asname or each.name: each.name
                                                                   for each in node.names}
        if isinstance(node, ast.ImportFrom) and depth and outer in aliases:
            original = aliases[outer]
            target = node.module or ""
            if node.level:
                target = ".".join(module.split(".")[: 1 - node.level or None] + ([target] if target else []))
            if reached := definition(root, target, f"{original}.{inner}" if inner else original, depth - 1):
                return reached
            if not target.startswith("vllm"):
                return node
        names = {getattr(node, "name", None), *(getattr(each, "id", None) for each in getattr(node, "targets", ()))}
        names.add(getattr(getattr(node, "target", None), "id", None))
        if outer in names and isinstance(node, ast.stmt):
            if not inner:
                return node
            members = {getattr(each, "name", ""): each for each in getattr(node, "body", ())}
            if inner in members:
                return members[inner]
            bases = (definition(root, module, f"{ast.unparse(base)}.{inner}", depth - 1)
                     for base in getattr(node, "bases", ()) if depth)
            return next((base for base in bases if base), None)
    return None


def used_names() -> Iterator[tuple[str, str, str]]:
    """Yield (our file, module, name) for what our code imports from vLLM, replaces in it or names in a string."""
    paths = sorted(path for folder in ("src", "tools", "tests") for path in (HOME / folder).rglob("*.py"))
    for path in paths:
        text = path.read_text(encoding="utf-8")
        parsed = ast.parse(text)
        for dotted in (*re.findall(r"\b(vllm(?:\.\w+)+)", text), *re.findall(r"\b(vllm(?:\.\w+)+) import \w+", text)):
            yield str(path.relative_to(HOME)), *dotted.rpartition(".")[::2]
        imported = {alias.asname or alias.name: (node.module, alias.name) for node in ast.walk(parsed)
                    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
                    for alias in node.names}
        for module, name in imported.values():
            yield str(path.relative_to(HOME)), str(module), name
        for node in ast.walk(parsed):
            owner, attribute = None, None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner, attribute = node.value.id, node.attr
            parts = node.elts if isinstance(node, ast.Tuple) else node.args if isinstance(node, ast.Call) else []
            if len(parts) > 1 and isinstance(parts[0], ast.Name) and isinstance(parts[1], ast.Constant):
                owner, attribute = parts[0].id, str(parts[1].value)
            if owner in imported and attribute:
                module, name = imported[owner]
                is_module = module_file(Path(installed()), f"{module}.{name}").is_file()
                yield (str(path.relative_to(HOME)), *((f"{module}.{name}", attribute) if is_module
                                                      else (str(module), f"{name}.{attribute}")))


@cache
def installed() -> str:
    """Return the folder that contains the installed `vllm/`."""
    specification = importlib.util.find_spec("vllm")
    if specification is None or specification.origin is None:
        raise SystemExit("vLLM: not installed. Run `make setup`.")
    return str(Path(specification.origin).parents[1])


def signature(node: ast.AST) -> str:
    """Write down the parameters of a function; empty for anything else."""
    return ast.unparse(node.args) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""


def compare_names(new: Path) -> Iterator[str]:
    """Yield a line for each name that is missing, or whose parameters or body changed."""
    old, same = Path(installed()), 0
    for path, module, name in sorted(set(used_names())):
        before, after = definition(old, module, name), definition(new, module, name)
        if before is None or path == "tools/compare_engine.py":
            continue
        if after is None:
            yield f"MISSING    {module}.{name} ({path})"
        elif signature(before) != signature(after):
            yield f"PARAMETERS {module}.{name}: ({signature(before)}) -> ({signature(after)}) ({path})"
        elif ast.dump(before) != ast.dump(after):
            yield f"changed    {module}.{name} ({path})"
        else:
            same += 1
    yield f"{same} unchanged"


def compare_citations(new: Path) -> Iterator[str]:
    """Yield a line for each source file that the code or the documents cite and that changed."""
    cited: dict[str, set[str]] = {}
    for path in [*(HOME / "src").rglob("*.py"), *(HOME / "docs").glob("*.md"), HOME / "SECURITY.md"]:
        for name in CITATION.findall(path.read_text(encoding="utf-8")):
            cited.setdefault(name, set()).add(str(path.relative_to(HOME)))
    for name, users in sorted(cited.items()):
        before, after = (root / "vllm" / name for root in (Path(installed()), new))
        if before.is_file() and not after.is_file():
            yield f"MISSING    {name} ({', '.join(sorted(users))})"
        elif before.is_file() and before.read_bytes() != after.read_bytes():
            yield f"changed    {name} ({', '.join(sorted(users))})"


def compare_texts(new: Path) -> Iterator[str]:
    """Yield a line for each string of our readers that occurs in the installed sources and not in the new ones."""
    texts = {node.value for folder in READERS for path in (HOME / folder).rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= LEAST_TEXT
             and "\n" not in node.value}
    before, after = ("\n".join(path.read_text(encoding="utf-8", errors="replace")
                               for path in (root / "vllm").rglob("*.py")) for root in (Path(installed()), new))
    joined = re.compile(r'"\s*\n\s*f?"')  # a text that is written in several literals
    before, after = before + joined.sub("", before), after + joined.sub("", after)
    known = sorted(text for text in texts if text in before)
    yield from (f"MISSING    {text!r}" for text in known if text not in after)
    yield f"{sum(text in after for text in known)} unchanged"


def run(new: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the new sources first on its path, without plugins."""
    environment = {**os.environ, "PYTHONPATH": str(new), "VLLM_PLUGINS": ""}
    return subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True, timeout=600,
                          check=False)


def compare_options(new: Path) -> Iterator[str]:
    """Yield a line for each option that was added, removed or changed, or one that the parser cannot be imported."""
    code = (f"import sys, json, importlib; sys.path.insert(0, {str(HOME / 'tools')!r})\n"
            f"import record_engine_options as r\n"
            f"import vllm.platforms; from vllm.platforms.cpu import CpuPlatform\n"
            f"vllm.platforms._current_platform = CpuPlatform()\n"
            f"from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
            f"for name in {PARSERS!r}:\n"
            f"    if importlib.util.find_spec(name):\n"
            f"        parser = importlib.import_module(name).make_arg_parser(FlexibleArgumentParser())\n"
            f"        print('RESULT' + json.dumps(r.record(parser)))\n")
    done = run(new, "-c", code)
    recorded = [line.removeprefix("RESULT") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not recorded:
        yield f"NOT IMPORTED: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        return
    after = json.loads(recorded[0])
    before = json.loads((HOME / "src/shoehorn/config/vllm_options.json").read_text(encoding="utf-8"))["options"]
    yield from (f"MISSING    --{name}" for name in sorted(before.keys() - after.keys()))
    yield from (f"added      --{name}" for name in sorted(after.keys() - before.keys()))
    yield from (f"changed    --{name}: {before[name]} -> {after[name]}"
                for name in sorted(before.keys() & after.keys()) if before[name] != after[name])


def compare_routes(new: Path) -> Iterator[str]:
    """Yield a line for each literal route that was added to or removed from the engine's sources."""
    sys.path.insert(0, str(HOME / "tools"))
    import engine_routes

    before, after = (set(engine_routes.in_sources(root / "vllm" / "entrypoints")) for root in (Path(installed()), new))
    yield from (f"MISSING    {route}" for route in sorted(before - after))
    yield from (f"added      {route}" for route in sorted(after - before))


def main(folder: str) -> int:
    """Print all sections."""
    new, is_missing = Path(folder), False
    for title, compare in (("Names that the plugin imports or patches", compare_names),
                           ("Cited source files", compare_citations), ("Texts read from the engine", compare_texts),
                           ("Routes in the sources", compare_routes), ("Options", compare_options)):
        print(f"\n{title}")
        for line in compare(new):
            is_missing |= line.startswith(("MISSING", "PARAMETERS", "NOT IMPORTED"))
            print(f"  {line}")
    return int(is_missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
