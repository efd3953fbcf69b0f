"""Files of a checkpoint: access, and classification by suffix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from shoehorn.common.errors import ModelUnavailableError

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt")
"""Weights in formats that can execute code when they are loaded."""

WEIGHTS_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES, ".gguf", ".onnx", ".h5", ".msgpack")
"""Weights in any format; only safetensors are loaded."""

_MAX_JSON_BYTES = 64 << 20


class Files(Protocol):
    """The files of a checkpoint in a folder or on a hub."""

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by file name."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read up to `length` bytes from `start`; all if None."""


class LocalFiles:
    """The files of a folder, without subfolders."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by file name.

        Raises:
            ModelUnavailableError: the folder cannot be listed.
        """
        try:
            return {path.name: path.stat().st_size for path in sorted(self._directory.iterdir()) if path.is_file()}
        except OSError as error:
            raise ModelUnavailableError(f"Model folder {self._directory}: cannot be read: {error.strerror}.",
                                        "Set MODEL_ID to a folder with config.json and *.safetensors.",
                                        code="unreadable_model_folder") from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read up to `length` bytes from `start`; all if None.

        Raises:
            ModelUnavailableError: the file cannot be read.
        """
        try:
            with (self._directory / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise invalid_file(name, f"cannot be read ({error.strerror})") from error


def read_json(files: Files, names: Mapping[str, int], name: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        names: `files.names()`.

    Raises:
        ModelUnavailableError: missing, too large, or not a JSON object.
    """
    if name not in names:
        raise invalid_file(name, "not found")
    if names[name] > _MAX_JSON_BYTES:
        raise invalid_file(name, f"too large ({names[name]} bytes)")
    try:
        document = json.loads(files.read(name).decode())
    except (ValueError, RecursionError) as error:
        raise invalid_file(name, f"invalid JSON ({error})") from error
    if not isinstance(document, dict):
        raise invalid_file(name, "not a JSON object")
    return document


def invalid_file(name: str, problem: str) -> ModelUnavailableError:
    """Return the error for a missing or damaged file."""
    return ModelUnavailableError(f"Model file {name}: {problem}.",
                                 "Get the file again, by `shoehorn pull` or by another copy of a local folder, or set "
                                 "another MODEL_ID or MODEL_REVISION.",
                                 code="invalid_model_file")


def not_understood(problem: str) -> ModelUnavailableError:
    """Return the error for an intact config.json that does not describe a model in a known way."""
    return ModelUnavailableError(f"Model file config.json: architecture not understood: {problem}.",
                                 "Choose another MODEL_ID, or add the key with --hf-overrides in VLLM_EXTRA_ARGS.",
                                 code="architecture_not_understood")
