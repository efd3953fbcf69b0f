"""Golden plans: captured models on captured machines.

After an intended change, regenerate the goldens with UPDATE_GOLDENS=1 and review the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fakes import captured as captured_models
from shoehorn.planner.plan import Plan, Refusal
from support.plans import CPU_ONLY, plan_for, tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

GOLDEN_MODELS = ("deepseek-r1-distill-llama-70b", "llama-3.1-8b-instruct", "qwen3-30b-a3b")
OTHERS = {
    "70b-int4": ("deepseek-r1-distill-llama-70b@int4",
                 ("rtx4060-8-ram64", "rtx3080-20-ram64", "2xrtx3080-20-ram64", "rtx4090-24-ram32", "a100-40-ram85")),
    "70b-w4a16": ("llama-3.3-70b-instruct-w4a16@unordered",
                  ("rtx4060-8-ram64", "rtx4090-24-ram128", "2xrtx3080-20-ram64")),
    "gemma-3-12b": ("gemma-3-12b-it", ("rtx4070ti-12-ram32", "l4-24-ram64")),
    "deepseek-v2-lite": ("deepseek-v2-lite-chat", ("rtx3060-12-ram64", "a10-24-ram200")),
    "qwen3-30b-int4": ("qwen3-30b-a3b@int4", ("rtx4060-8-ram64", "rtx3060-12-ram64", "rtx4090-24-ram32")),
    "mixtral-int4": ("mixtral-8x7b-instruct-v0.1@int4", ("rtx3060-12-ram64",)),
    "deepseek-v3": ("deepseek-v3", ("h200-141-ram192",)), "gpt-oss-20b": ("gpt-oss-20b", ("rtx4060-8-ram16",)),
    "qwen2.5-32b-awq": ("qwen2.5-32b-instruct-awq", ("rtx3080-20-ram32", "rtx4090-24-ram32")),
    "mixtral": ("mixtral-8x7b-instruct-v0.1", ("rtx4090-24-ram128", "4xrtx4090-24-ram256")),
    "8b-bnb": ("llama-3.1-8b-bnb-4bit", ("rtx4060-8-ram16", "2xrtx3080-20-ram24")),
    "phi-4": ("phi-4", ("a100-40-ram85",))}
PAIRS = [*((model, model, machine) for model in GOLDEN_MODELS for machine in captured_models.machines()),
         *((short, model, machine) for short, (model, machines) in OTHERS.items() for machine in machines)]


def document(plan: Plan | Refusal) -> dict[str, Any]:
    """A plan or refusal without prose, and without what `vram` holds already."""
    whole = plan.to_json()
    for key in ("cause", "remedies", "devices"):
        whole.pop(key, None)
    return {**whole, "reasons": [{key: value for key, value in reason.items() if key != "text"}
                                 for reason in whole["reasons"]]}


def check(plan: Plan | Refusal, name: str) -> None:
    """Compare a plan with its golden, or write it."""
    current, path = document(plan), GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(json.dumps(current, indent=1) + "\n")
    assert json.loads(json.dumps(current)) == json.loads(path.read_text())


@pytest.mark.parametrize(("short", "model", "machine"), PAIRS, ids=str)
def test_golden_plan_is_unchanged(short: str, model: str, machine: str) -> None:
    name, converted = model.removesuffix("@int4"), model.endswith("@int4")
    shape = captured_models.shape(f"{name}@int4" if converted else name)
    check(plan_for(captured_models.machine(machine), shape), f"{short}-on-{machine}")


def test_golden_plan_without_a_gpu_is_unchanged() -> None:
    check(plan_for(CPU_ONLY, tiny(), VRAM_PROFILE="cpu"), "tiny-cpu")


def test_no_golden_is_stale() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == {
        "tiny-cpu", *(f"{short}-on-{machine}" for short, _, machine in PAIRS)}


def test_every_golden_plan_keeps_within_its_machine() -> None:
    outcomes = set()
    for short, _, name in PAIRS:
        golden = json.loads((GOLDEN / f"{short}-on-{name}.json").read_text())
        hardware = captured_models.machine(name)
        outcomes.add(golden["fits"])
        if not golden["fits"]:
            assert golden["remedy_codes"]
            continue
        assert golden["host_bytes"] <= hardware.host_memory_bytes
        assert golden["kv_cache_tokens"] >= golden["engine_args"]["max-model-len"]
        largest_first = sorted(hardware.gpus, key=lambda gpu: -gpu.total_bytes)
        for parts, gpu in zip(golden["vram"], largest_first, strict=False):
            assert parts["total_bytes"] <= parts["limit_bytes"] <= gpu.free_bytes
    assert outcomes == {True, False}
