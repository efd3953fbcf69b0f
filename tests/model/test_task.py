"""Task of a model, and the limit of a sentence encoder."""

from __future__ import annotations

import json

import pytest

from fakes.chat_templates import MemoryFiles
from shoehorn.model import task
from shoehorn.model.task import Task

POOLING = json.dumps([{"type": "sentence_transformers.models.Transformer", "path": ""},
                      {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}])


@pytest.mark.parametrize(("architecture", "expected"), [
    ("LlamaForCausalLM", Task.GENERATE), ("Gemma3ForConditionalGeneration", Task.GENERATE), ("unknown", Task.GENERATE),
    ("BertModel", Task.EMBED), ("XLMRobertaForSequenceClassification", Task.CLASSIFY),
    ("Qwen2ForRewardModel", Task.REWARD), ("ModernBertForTokenClassification", Task.CLASSIFY)])
def test_architecture_decides(architecture: str, expected: Task) -> None:
    assert task.read(MemoryFiles(config__json="{}"), architecture) is expected


def test_modules_of_a_sentence_encoder_decide_first() -> None:
    assert task.read(MemoryFiles(modules__json=POOLING), "Qwen3ForCausalLM") is Task.EMBED
    assert task.read(MemoryFiles(modules__json="[]"), "Qwen3ForCausalLM") is Task.GENERATE
    assert task.read(MemoryFiles(modules__json="{broken"), "Qwen3ForCausalLM") is Task.GENERATE


@pytest.mark.parametrize(("files", "limit"), [
    ({"sentence_bert_config__json": '{"max_seq_length": 256}'}, 256), ({}, 0),
    ({"sentence_xlm-roberta_config__json": '{"max_seq_length": 514}'}, 514),
    ({"sentence_bert_config__json": '{"max_seq_length": null}'}, 0), ({"sentence_bert_config__json": "x"}, 0)])
def test_limit_is_the_sentence_encoder_s(files: dict[str, str], limit: int) -> None:
    read = MemoryFiles(**files)
    assert task.sentence_limit(read, read.names()) == limit
