"""Layout of MODELS_DIR: every path that Shoehorn reads or writes there.

    OWNER/NAME/                            files of a model
    OWNER/NAME.int4/                       its INT4 conversion
    .shoehorn/manifests/OWNER--NAME.json   manifest of a model
    .shoehorn/locks/OWNER--NAME.lock       lock of the process that writes a model
    .shoehorn/locks/OWNER--NAME.use        lock of the processes that serve a model
    .shoehorn/worked/DIGEST.json           known-good options of a start
    .shoehorn/speed.json                   measured bandwidths, and rates of the CPU kernel
    .shoehorn/keys.json                    hashes of API keys
    .shoehorn/collected.json               figures of the replicas' engines that the usage files of a front include
    .shoehorn/usage/2026-11.json           tokens by day, key and model in one month (UTC)

Rules: these names are an on-disk format; a volume of an older version stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelsDir:
    """Paths in the models volume; `model` is OWNER/NAME."""

    root: Path

    @property
    def state(self) -> Path:
        """Folder of everything but the models."""
        return self.root / ".shoehorn"

    @property
    def manifests(self) -> Path:
        """Folder of the manifests."""
        return self.state / "manifests"

    @property
    def known_good(self) -> Path:
        """Folder of known-good options."""
        return self.state / "worked"

    @property
    def bandwidths(self) -> Path:
        """File of measured bandwidths."""
        return self.state / "speed.json"

    @property
    def keys(self) -> Path:
        """File of the hashes of API keys."""
        return self.state / "keys.json"

    @property
    def usage(self) -> Path:
        """Folder of the used tokens, one file for each month."""
        return self.state / "usage"

    @property
    def collected_usage(self) -> Path:
        """File of the figures of replicas' engines that are part of the usage files of a front."""
        return self.state / "collected.json"

    def model(self, model: str) -> Path:
        """Return the folder of a model's files."""
        return self.root / model

    def manifest(self, model: str) -> Path:
        """Return the manifest of a model."""
        return self.manifests / f"{_flat(model)}.json"

    def writer_lock(self, model: str) -> Path:
        """Return the lock of the process that writes a model."""
        return self.state / "locks" / f"{_flat(model)}.lock"

    def use_lock(self, model: str) -> Path:
        """Return the lock of the processes that serve a model."""
        return self.state / "locks" / f"{_flat(model)}.use"


def _flat(model: str) -> str:
    return model.replace("/", "--")
