"""The oracle's records are complete, agree with published checkpoints, and match the list of differences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from contract.oracle import compare, packing, patterns, report, store
from fakes import captured

GPUS = ("1", "2", "4")
ARCHITECTURES = 80


def complete() -> list[str]:
    """Models with headers and all records."""
    return [name for name, document in documents().items()
            if "tensors" in document and set(document["truth"]) >= set(GPUS)]


@cache
def documents() -> Mapping[str, dict[str, Any]]:
    return {name: store.load(name) for name in store.names()}


def headers(document: Mapping[str, Any]) -> packing.Headers:
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in patterns.expand_all(document["tensors"]).items()}


def test_enough_architectures_are_recorded() -> None:
    assert len({documents()[name]["config"]["architectures"][0] for name in complete()}) >= ARCHITECTURES


def test_absent_parts_have_a_reason() -> None:
    for name, document in documents().items():
        absent = {"tensors"} - document.keys() | {f"truth.{gpus}" for gpus in GPUS if gpus not in document["truth"]}
        assert absent == document.get("missing", {}).keys(), name


def test_headers_have_as_many_parameters_as_published() -> None:
    for name, document in documents().items():
        if "billions" in document and "tensors" in document and "quantization_config" not in document["config"]:
            parameters = sum(math.prod(shape) for _, shape in headers(document).values()) / 1e9
            assert parameters == pytest.approx(document["billions"], rel=0.005), name


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct", "qwen2.5-7b-instruct", "qwen3-8b", "qwen3-30b-a3b", "phi-4",
                                  "deepseek-v2-lite-chat", "gemma-3-12b-it", "gpt-oss-20b"])
def test_derived_headers_are_those_of_captured_checkpoints(name: str) -> None:
    published = {tensor.name: (tensor.dtype, tensor.shape) for tensor in captured.tensors(name)}
    assert headers(store.load(name)) == published


@pytest.mark.parametrize(("name", "base", "kind"), [
    ("llama-3.1-8b-instruct-gptq", "llama-3.1-8b-instruct", "gptq"),
    ("llama-3.1-8b-instruct-w4a16", "llama-3.1-8b-instruct", "w4a16"),
    ("llama-3.1-8b-instruct-fp8-dynamic", "llama-3.1-8b-instruct", "fp8-dynamic"),
    ("llama-3.1-8b-bnb-4bit", "llama-3.1-8b-instruct", "bnb"),
    ("qwen2.5-32b-instruct-awq", "qwen2.5-32b-instruct", "awq")])
def test_packed_headers_are_those_of_captured_checkpoints(name: str, base: str, kind: str) -> None:
    packed = packing.pack(headers(store.load(base)), kind)
    published = {tensor.name: (tensor.dtype, tensor.shape) for tensor in captured.tensors(name)}
    assert {key: value for key, value in packed.items() if _fixed(key)} == {
        key: value for key, value in published.items() if _fixed(key)}


def _fixed(name: str) -> bool:
    """Return whether the format fixes the tensor: old GPTQ tools add zero biases, the length of bnb's state varies."""
    return "quant_state." not in name and not name.endswith("_proj.bias")


def test_patterns_expand_to_every_name() -> None:
    names = ["a.0.b.1.c", "a.0.b.2.c", "a.1.b.1.c", "a.1.b.2.c", "a.3.b.7.c", "end"]
    compacted = patterns.compact((name, "x") for name in names)
    assert compacted == {"a.{0-1}.b.{1-2}.c": "x", "a.3.b.7.c": "x", "end": "x"}
    assert sorted(patterns.expand_all(compacted)) == sorted(names)


def test_listed_differences_belong_to_records() -> None:
    """Every entry names a record, and every figure in it differs from what the record holds now."""
    for key, entry in json.loads(report.DIFFERENCES.read_text(encoding="utf-8")).items():
        name, _, gpus = key.rpartition(" on ")
        truth = documents()[name]["truth"].get(gpus)
        if entry == "oracle":
            assert truth is None or "tensors" not in documents()[name], key
        elif entry != "planner":
            true = compare.figures(truth)
            assert entry, key
            for figure, (planned, recorded) in entry.items():
                assert recorded == true[figure], (key, figure)
                assert figure == "windows" or compare.differs(planned, recorded), (key, figure)
