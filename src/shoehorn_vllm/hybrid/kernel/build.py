"""The build of the CPU kernel: C sources to one shared library for every processor of this architecture.

Rules:
- imports the standard library only: `setup.py` loads this file by its path, without the package;
- the instruction sets are attributes of functions, so no option names the machine that builds;
- the same compiler writes the same bytes, wherever the sources are.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent / "source"
LIBRARY = "w4a16.so"
OPTIONS = ("-std=c11", "-O3", "-g0", "-fPIC", "-fvisibility=default", "-pthread", "-Wall", "-Wextra",
           "-ffp-contract=off")


class BuildError(Exception):
    """The library was not built; the message has the reason."""


def find_compiler() -> list[str]:
    """Return the C compiler's command: CC from the environment, else gcc, cc or clang.

    Raises:
        BuildError: no compiler found.
    """
    if command := os.environ.get("CC"):
        return shlex.split(command)
    for name in ("gcc", "cc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("C compiler: not found. Install gcc.")


def build(output: Path, compiler: Sequence[str] | None = None) -> None:
    """Compile the sources side by side and write the library to `output`.

    Raises:
        BuildError: no compiler found, or it failed.
    """
    command = list(compiler or find_compiler())
    with TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(SOURCES.glob("*.c"))
        objects = [str(Path(directory) / f"{source.stem}.o") for source in sources]
        list(pool.map(lambda pair: _run([*command, *OPTIONS, "-c", pair[0].name, "-o", pair[1]]),
                      zip(sources, objects, strict=True)))
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        _run([*command, "-shared", "-pthread", "-Wl,--build-id=none", *objects, "-lm", "-o", str(partial.absolute())])
        partial.replace(output)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=SOURCES, text=True, capture_output=True, check=False)
    except OSError as error:
        raise BuildError(f"C compiler {command[0]}: unavailable ({error.strerror}). Set CC to another one.") from error
    if done.returncode:
        raise BuildError(f"C compiler {command[0]}: failed with exit code {done.returncode}.\n{done.stderr[-2000:]}")
