"""Token sequences of equal length for a calibration, from the package's texts or the user's.

Rules:
- documents are tokenized by the model's own tokenizer; conversations get its chat template, and are left out if it has
  none;
- every sequence begins with the token that the model expects at the start of a text, if it has one;
- sequences alternate between the files, so that few sequences have every kind of text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from shoehorn.common.errors import SettingsError

PACKAGED = Path(__file__).parent / "texts"
"""English, Chinese, code, and conversations."""

_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Sequences:
    """Calibration sequences.

    Attributes:
        ids: int64 [sequences, length].
        sha256: of the texts.
    """

    ids: torch.Tensor
    sha256: str


def files(path: Path | None) -> list[Path]:
    """Return the files of a calibration text: of the package, of a folder, or one.

    Raises:
        SettingsError: no file has a text.
    """
    folder = path or PACKAGED
    paths = [folder] if folder.is_file() else sorted(each for each in folder.glob("*") if each.suffix in _SUFFIXES)
    if not paths:
        raise SettingsError(f"CALIBRATION={path}: no text found.",
                            "Set it to a .txt, .md or .jsonl file, or to a folder with such files.",
                            code="calibration_no_text")
    return paths


def read(model: Path, path: Path | None, sequences: int, length: int) -> Sequences:
    """Tokenize a calibration text for a model.

    Args:
        model: folder with the tokenizer.
        path: the user's text; None for the package's.
        sequences: number wanted; fewer if the text is short.

    Raises:
        SettingsError: the text is missing, invalid or shorter than one sequence, or the tokenizer cannot be loaded.
    """
    tokenizer = _tokenizer(model)
    digest = hashlib.sha256()
    streams = []
    for file in files(path):
        try:
            data = file.read_bytes()
            digest.update(data)
            documents = list(_documents(file, data.decode(), tokenizer))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"CALIBRATION: {file}: invalid text ({error}).",
                                "Use UTF-8 text, or JSON lines with `text` or `messages`.",
                                code="calibration_invalid_text") from error
        streams.append(_sequences(tokenizer, documents, length, sequences))
    mixed = [each for each in chain.from_iterable(zip_longest(*streams)) if each is not None][:sequences]
    if not mixed:
        raise SettingsError(f"CALIBRATION: the text has fewer than {length} tokens.", "Use a longer text.",
                            code="calibration_no_text")
    return Sequences(torch.tensor(mixed, dtype=torch.int64), digest.hexdigest())


def _tokenizer(model: Path) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # tokenizers raises it for an invalid file
        raise SettingsError(f"Calibration: the tokenizer cannot be loaded ({error}).", "Set CALIBRATION=off.",
                            code="calibration_unsupported_model") from error


def _documents(file: Path, text: str, tokenizer: Any) -> Iterator[str]:
    """Yield the documents of a file: blocks between lines of `---`, or one in each JSON line."""
    if file.suffix != ".jsonl":
        yield from (block.strip() for block in text.split("\n---\n") if block.strip())
        return
    for line in text.splitlines():
        document = json.loads(line)
        if "messages" not in document:
            yield document["text"]
        elif tokenizer.chat_template:
            yield _conversation(tokenizer, document["messages"])


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Apply the chat template; a system message joins the user's first one if the template rejects its role."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise ValueError("the model's chat template rejects a conversation") from None
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return _conversation(tokenizer, [merged, *messages[2:]])


def _sequences(tokenizer: Any, documents: list[str], length: int, most: int) -> list[list[int]]:
    start = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    stream: list[int] = []
    step = length - len(start)
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(stream) >= step * most:
            break
    return [start + stream[begin:begin + step] for begin in range(0, len(stream) - step + 1, step)][:most]


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
