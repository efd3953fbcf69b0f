"""Stand-ins for libraries that models import and that this environment lacks: names only, none of their code.

Rules: they serve module imports, default values, decorators and base classes, and no result of one may reach a record:
torchvision processes images, and the others compile kernels, of which nothing runs here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARIES = ("torchvision", "cuda", "cutlass", "quack", "tilelang", "vllm.vllm_flash_attn.cute")


class _Anything(type):
    """A class every attribute of which is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        """A decorator leaves what it is given; all else gives such a class."""
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) and not options else cls

    def __getitem__(cls, key: object) -> Any:
        return cls


class _Module(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0.28.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder:
    """Imports a stand-in for each of the libraries and their submodules."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        known = any(name == library or name.startswith(f"{library}.") for library in LIBRARIES)
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: attributes are made when asked for."""


def install() -> None:
    """Let the libraries be imported."""
    sys.meta_path.append(_Finder())
