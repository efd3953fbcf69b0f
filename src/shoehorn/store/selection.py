"""Selection of the files of a repository that a model needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.model import safetensors
from shoehorn.model.files import Files

_WANTED = ("*.json", "*.jinja", "*.tiktoken", "*.model", "tokenizer.model.*", "vocab*.txt", "merges*.txt")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pickle", "*.pkl", "*.ckpt")


def choose(files: Files, listing: Iterable[ModelFile], settings: Settings) -> list[ModelFile]:
    """The files of a listing that serving needs: the weights that the engine would load, configuration, tokenizer.

    Raises:
        ModelUnavailableError: no config.json, or no safetensors weights.
    """
    names = files.names()
    if "config.json" not in names:
        raise ModelUnavailableError(f"{settings.model_id} has no config.json, so it is no model that can be served.",
                                    "Choose another MODEL_ID: one with config.json and *.safetensors.")
    pickled = [name for name in names if _fits(name, _PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ModelUnavailableError(f"{settings.model_id} has its weights only as {PurePosixPath(pickled[0]).name}; "
                                    "pickled files can run code and are not loaded.",
                                    "Choose another MODEL_ID: one whose files end in .safetensors.")
    shards = set(safetensors.shards(files, names))
    wanted = (*_WANTED, "*.py") if settings.trust_remote_code else _WANTED
    return [file for file in listing if file.path in shards or _fits(file.path, wanted)]


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in patterns)
