"""Selection of the files that serving requires."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config import settings
from shoehorn.hub.files import ModelFile
from shoehorn.store import selection
from support.pulling import MODEL, WEIGHTS


class Listing:
    """Files with names, sizes and an index."""

    def __init__(self, *names: str, index: Sequence[str] = ()) -> None:
        self.files = tuple(ModelFile(name, 100, "") for name in names)
        self.index = json.dumps({"weight_map": {name: name for name in index}}).encode()

    def names(self) -> dict[str, int]:
        return {file.path: file.size_bytes for file in self.files}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        assert (name, start, length) == ("model.safetensors.index.json", 0, None)
        return self.index


def select(listing: Listing, **environment: str) -> list[str]:
    selected = selection.select_files(listing, listing.files, settings.load({"MODEL_ID": MODEL, **environment}))
    return [file.path for file in selected]


def test_only_weights_that_the_engine_loads_are_selected() -> None:
    index, shards = "model.safetensors.index.json", ["a.safetensors", "b.safetensors"]
    others = ["c.safetensors", "onnx/model.safetensors", "original/consolidated.00.pth", "model.gguf"]
    assert select(Listing("config.json", index, *shards, *others, index=shards)) == ["config.json", index, *shards]
    assert select(Listing("config.json", "model.safetensors", "consolidated.safetensors", "fp8/model.safetensors")) == [
        "config.json", "model.safetensors"]
    with pytest.raises(ModelUnavailableError, match=r"b\.safetensors.*index\.json"):
        select(Listing("config.json", index, "a.safetensors", index=shards))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja",
                                  "tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "vocab.txt", "merges.txt",
                                  "1_Pooling/config.json"])
def test_configuration_and_tokenizer_are_selected(name: str) -> None:
    assert name in select(Listing("config.json", WEIGHTS, name))


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "x.pt", "x.pth", "x.pickle", "modeling.py", "x.sh",
                                  "requirements.txt", "model.safetensors.py", "LICENSE", ".gitattributes"])
def test_other_files_are_not_selected(name: str) -> None:
    assert name not in select(Listing("config.json", WEIGHTS, name))
    trusted = select(Listing("config.json", WEIGHTS, name), TRUST_REMOTE_CODE="yes")
    assert (name in trusted) == name.endswith(".py")


@pytest.mark.parametrize(("names", "code"), [
    (["pytorch_model.bin", "config.json"], "pickled_weights"), (["config.json", "model.gguf"], "no_safetensors"),
    ([WEIGHTS], "no_config")])
@pytest.mark.fault("Only `.bin`, `.pt`, GGUF or no weights",
                   "An error with the reason: pickled weights are never loaded.")
def test_repository_without_safetensors_is_an_error(names: list[str], code: str) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        select(Listing(*names))
    assert caught.value.code == code
