"""The oracle's records are complete and true to published checkpoints; where the planner differs is listed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
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


def test_a_part_that_is_not_there_has_its_reason() -> None:
    for name, document in documents().items():
        absent = {"tensors"} - document.keys() | {f"truth.{gpus}" for gpus in GPUS if gpus not in document["truth"]}
        assert absent == document.get("missing", {}).keys(), name


def test_headers_have_as_many_parameters_as_published() -> None:
    for name, document in documents().items():
        if "billions" in document and "tensors" in document and "quantization_config" not in document["config"]:
            found = sum(math.prod(shape) for _, shape in headers(document).values()) / 1e9
            assert found == pytest.approx(document["billions"], rel=0.005), name


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
    """Whether the format fixes the tensor: old GPTQ tools add biases of zero, a quantization state's length varies."""
    return "quant_state." not in name and not name.endswith("_proj.bias")


def test_the_planner_differs_where_it_is_known_to() -> None:
    rows = (row for name, document in documents().items() for row in compare.compare(name, document, (1, 2, 4)))
    assert report.differences(rows) == json.loads(report.DIFFERENCES.read_text(encoding="utf-8"))


@pytest.mark.e2e
def test_the_engine_still_says_what_is_recorded(tmp_path: Path) -> None:
    name = "qwen3-embedding-0.6b"
    program = ("import sys; from pathlib import Path; from contract.oracle import __main__, store; "
               "store.FOLDER = Path(sys.argv.pop()); sys.exit(__main__.main())")
    document = store.load(name)
    (tmp_path / f"{name}.json").write_text(
        json.dumps({key: value for key, value in document.items() if key not in ("tensors", "truth")}))
    subprocess.run([sys.executable, "-c", program, name, "--log", str(tmp_path / "log"), str(tmp_path)], check=True,
                   cwd=Path(__file__).parents[1], env={"PYTHONPATH": str(Path(__file__).parents[1])})
    assert json.loads((tmp_path / f"{name}.json").read_text()) == document


def test_patterns_stand_for_every_name() -> None:
    names = ["a.0.b.1.c", "a.0.b.2.c", "a.1.b.1.c", "a.1.b.2.c", "a.3.b.7.c", "end"]
    found = patterns.compact((name, "x") for name in names)
    assert found == {"a.{0-1}.b.{1-2}.c": "x", "a.3.b.7.c": "x", "end": "x"}
    assert sorted(patterns.expand_all(found)) == sorted(names)
