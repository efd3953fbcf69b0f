"""The stored models: one file of tests/captures/oracle each, by name.

A file holds `source`, `billions` (parameters as published), `config` (config.json), `files` (other JSON files that vLLM
reads), `options` (vLLM's options that belong to the variant), `capability` (of the GPU, where not the usual one),
`remote_code` (vLLM 0.32 starts it with the checkpoint's own configuration code only, which derives from that of this
model type), `headers` (how `tensors` came
about, see headers.py), `tensors` (the checkpoint's headers: pattern -> [dtype, shape]), `truth` (by the number of GPUs)
and `missing`: why a part is not there, by part.

Configurations: the hubs were out of reach, so those without `headers: published` are written from knowledge of the
public config.json named in `source`, reduced to keys that shapes and limits depend on; `billions` checks them (a test
compares it with the headers, within 0.5 %). Long RoPE factors are placeholders of the right length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "captures" / "oracle"


def names() -> list[str]:
    """All stored models, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> dict[str, Any]:
    """A stored model."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def save(name: str, document: dict[str, Any]) -> None:
    """Write a model, with short values on one line."""
    (FOLDER / f"{name}.json").write_text("".join(_lines(document, 0)) + "\n", encoding="utf-8")


def write_folder(document: dict[str, Any], folder: Path) -> Path:
    """The folder that vLLM is given: config.json and the other files, no weights."""
    folder.mkdir(parents=True)
    for name, content in {"config.json": document["config"], **document.get("files", {})}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def _lines(value: Any, depth: int) -> Iterator[str]:
    """JSON with one space a level, where what fits in a line of 160 characters stays on it."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or (len(flat) <= 160 and depth > 1):
        yield flat
        return
    for number, (key, inner) in enumerate(value.items()):
        yield f"{'{' if number == 0 else ','}\n{' ' * (depth + 1)}{json.dumps(key)}: "
        yield from _lines(inner, depth + 1)
    yield f"\n{' ' * depth}}}" if value else "{}"
