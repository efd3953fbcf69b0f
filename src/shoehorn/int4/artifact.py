"""INT4 conversion of a model in the volume: its folder, and whether it and its original are complete.

Rules:
- the conversion is a separate model in the volume, `OWNER/NAME.int4`, with a manifest that is completed last;
- the journal in its folder, `conversion.json`, records the source, the bit widths and each converted shard with its
  error; it is kept after completion.
"""

from __future__ import annotations

import logging
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.file_stamp import stamp
from shoehorn.int4.journal import Journal, read_journal
from shoehorn.model.files import LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.model.safetensors import shards
from shoehorn.store import manifest, pull

log = logging.getLogger("convert")


def folder(models_dir: Path, ref: ModelRef) -> Path:
    """Return the folder of the conversion, which need not exist."""
    return ref.converted.directory(models_dir)


def locate(models_dir: Path, ref: ModelRef) -> Path | None:
    """Return the folder of the complete conversion, or None."""
    directory = pull.locate(models_dir, ref.converted)
    if directory is None:
        return None
    journal = read_journal(directory)
    if journal is None or journal.source["model"] != ref.id:
        return None
    if has_changed(journal, ref):
        log.warning("Model changed since its conversion, converting again model=%s", ref.id)
        return None
    return directory


def summary(directory: Path) -> str:
    """Describe a complete conversion: bits, groups, calibration, and measured loss; "" if its journal is missing."""
    journal = read_journal(directory)
    if journal is None:
        return ""
    text = f"INT4 in groups of {journal.group}"
    if journal.calibration is None:
        return f"{text}, converted without calibration"
    tokens = journal.calibration["sequences"] * journal.calibration["length"]
    text += f", calibrated with {tokens:,} tokens"
    loss = journal.calibration.get("loss")
    if not loss:
        return text
    return (f"{text}; measured loss: KL divergence {loss['kl_mean']:.3f} nats, the same likeliest token at "
            f"{100 * loss['same_top1']:.0f} % of positions")


def stamps(directory: Path) -> dict[str, str]:
    """Return size and time of each shard of a local folder, by name."""
    files = LocalFiles(directory)
    current = {name: stamp(directory / name) for name in shards(files, files.names())}
    return {name: f"{each.size_bytes} bytes, {each.mtime_ns}" if each else "missing" for name, each in current.items()}


def has_changed(journal: Journal, ref: ModelRef) -> bool:
    """Return whether the weights of a local folder changed; those of a hub have a revision."""
    if ref.source != "local" or not any(journal.source["shards"].values()):
        return False
    try:
        return stamps(Path(ref.id)) != dict(journal.source["shards"])
    except ModelUnavailableError:
        return False  # deleted; its conversion remains valid


def source(models_dir: Path, ref: ModelRef) -> Path | None:
    """Return the folder of the original if every shard that is not converted yet is unchanged; else None."""
    original = ref.original
    complete = pull.locate(models_dir, original)
    if complete or original.is_local:
        return complete
    known, journal = manifest.read(models_dir, original), read_journal(folder(models_dir, ref))
    if not known or not known.matches(original) or not journal or not _is_journal_of(journal, original, known.commit):
        return None
    directory = original.directory(models_dir)
    remaining = [file for file in known.files if file.path not in journal.shards]
    return directory if all(manifest.is_unchanged(directory, file) for file in remaining) else None


def _is_journal_of(journal: Journal, ref: ModelRef, commit: str) -> bool:
    source = journal.source
    return bool((source["model"], source["revision"], source["commit"]) == (ref.id, ref.revision, commit))
