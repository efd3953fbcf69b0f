"""Selection of the files of a repository that serving requires."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.model import safetensors
from shoehorn.model.files import PICKLED_SUFFIXES, Files

_PATTERNS = ("*.json", "*.jinja", "*.tiktoken", "*.model", "tokenizer.model.*", "vocab*.txt", "merges*.txt")


def select_files(files: Files, listing: Iterable[ModelFile], settings: Settings) -> list[ModelFile]:
    """Select weights that the engine loads, configuration and tokenizer.

    Raises:
        ModelUnavailableError: no config.json, or no safetensors weights.
    """
    names = files.names()
    if "config.json" not in names:
        raise ModelUnavailableError(f"{settings.model_id}: config.json not found.",
                                    "Choose another MODEL_ID: one with config.json and *.safetensors.",
                                    code="no_config")
    pickled = [name for name in names if name.endswith(PICKLED_SUFFIXES)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ModelUnavailableError(f"{settings.model_id}: unsupported weights {PurePosixPath(pickled[0]).name}; "
                                    "pickled files can execute code.",
                                    "Choose another MODEL_ID: one whose files end in .safetensors.",
                                    code="pickled_weights")
    shards = set(safetensors.shards(files, names))
    patterns = (*_PATTERNS, "*.py") if settings.trust_remote_code else _PATTERNS
    return [file for file in listing if file.path in shards or _matches(file.path, patterns)]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in patterns)
