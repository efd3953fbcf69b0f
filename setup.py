"""The build step beyond pyproject.toml: the CPU kernel's library, next to its sources.

Without a C compiler the package is installed without it, and the engine says so when it starts.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNEL = Path("src/shoehorn_vllm/hybrid/kernel")
BUILD = runpy.run_path(str(KERNEL / "build.py"))


class BuildKernel(build_ext):
    """A plain shared library: it is loaded with ctypes, so it has no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            BUILD["build"](Path(self.get_ext_fullpath(ext.name)))
        except BUILD["BuildError"] as error:
            print(f"shoehorn: CPU kernel not built, torch's own INT4 kernel is used. {error}")


setup(
    cmdclass={"build_ext": BuildKernel},
    ext_modules=[Extension("shoehorn_vllm.hybrid.kernel.w4a16", optional=True,
                           sources=[str(path) for path in sorted(KERNEL.glob("source/*.c"))],
                           depends=[str(path) for path in sorted(KERNEL.glob("source/*.h"))])],
)
