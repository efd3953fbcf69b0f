"""Access to a checkpoint's files, wherever they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from shoehorn.common.errors import ModelUnavailableError

_MOST_JSON_BYTES = 64 << 20


class Files(Protocol):
    """A checkpoint's files, wherever they lie."""

    def names(self) -> Mapping[str, int]:
        """Size in bytes by file name."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `start`; all when None."""


class LocalFiles:
    """The files of a folder, without its subfolders."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> Mapping[str, int]:
        """Size in bytes by file name.

        Raises:
            ModelUnavailableError: the folder cannot be listed.
        """
        try:
            return {path.name: path.stat().st_size for path in sorted(self._directory.iterdir()) if path.is_file()}
        except OSError as error:
            raise ModelUnavailableError(f"The model's folder {self._directory} cannot be read: {error.strerror}.",
                                        "Set MODEL_ID to a folder with config.json and *.safetensors.") from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `start`; all when None.

        Raises:
            ModelUnavailableError: the file cannot be read.
        """
        try:
            with (self._directory / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise damaged(name, f"cannot be read ({error.strerror})") from error


def read_json(files: Files, names: Mapping[str, int], name: str) -> dict[str, Any]:
    if name not in names:
        raise damaged(name, "is not there")
    if names[name] > _MOST_JSON_BYTES:
        raise damaged(name, f"has {names[name]} bytes, too many for what it should be")
    try:
        document = json.loads(files.read(name).decode())
    except (ValueError, RecursionError) as error:
        raise damaged(name, f"is no JSON ({error})") from error
    if not isinstance(document, dict):
        raise damaged(name, "holds no JSON object")
    return document


def damaged(name: str, what: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"The model's file {name} {what}.",
                                 "Run `shoehorn pull` again, or choose another MODEL_ID or MODEL_REVISION.")
