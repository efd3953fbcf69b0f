"""Invalid model folders: the reason and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.reference import ModelRef
from shoehorn.store.local_folder import require_local_folder


def _local(path: Path) -> ModelRef:
    return ModelRef(str(path), "local", "")


@pytest.mark.parametrize(("files", "words", "remedy"), [
    (("model-Q4_K_M.gguf",), "GGUF files are unsupported (model-Q4_K_M.gguf)", "made from"),
    (("config.json", "model.gguf"), "GGUF", "made from"),
    (("adapter_config.json", "adapter_model.safetensors"), "it is a LoRA adapter", "--lora-modules"),
    (("config.json", "pytorch_model.bin"), "pickled (pytorch_model.bin)", "safetensors"),
    (("config.json", "consolidated.00.pth"), "pickled (consolidated.00.pth)", "safetensors"),
    (("config.json",), "config.json or *.safetensors missing", "path of the model's folder"),
    ((), "config.json or *.safetensors missing", "path of the model's folder")])
def test_folder_of_another_format_is_named(tmp_path: Path, files: tuple[str, ...], words: str, remedy: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelUnavailableError) as raised:
        require_local_folder(_local(tmp_path))
    assert words in raised.value.cause
    assert remedy in raised.value.remedy
    assert "pull" not in raised.value.remedy


def test_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "llama.gguf"
    file.touch()
    with pytest.raises(ModelUnavailableError, match="GGUF"):
        require_local_folder(_local(file))


def test_folder_with_safetensors_is_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "original.bin"):
        (tmp_path / name).touch()
    assert require_local_folder(_local(tmp_path)) == tmp_path.resolve()
