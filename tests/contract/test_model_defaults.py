"""The recordings of what vLLM and transformers know of models are those of the installed versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn.model import task

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.contract


def test_recording_is_that_of_the_installed_classes() -> None:
    printed = subprocess.run([sys.executable, str(ROOT / "tools" / "record_model_defaults.py"), "--print"], check=True,
                             capture_output=True, text=True).stdout
    for name, text in json.loads(printed).items():
        assert text == (ROOT / "src" / "shoehorn" / "model" / name).read_text(encoding="utf-8"), name


def test_task_is_that_of_the_registry() -> None:
    from vllm.model_executor.models import registry

    generating = {*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS,
                  *registry._TRANSFORMERS_SUPPORTED_MODELS}
    pooling = {*registry._EMBEDDING_MODELS, *registry._SEQUENCE_CLASSIFICATION_MODELS} - generating
    assert generating
    assert pooling
    assert [name for name in generating if task.of_architecture(name).is_pooling] == []
    assert [name for name in pooling if not task.of_architecture(name).is_pooling] == ["Terratorch"]
