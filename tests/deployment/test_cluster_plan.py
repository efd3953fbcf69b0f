"""Choice of machines for one model."""

from __future__ import annotations

import pytest

from fakes import captured
from shoehorn.config import settings as settings_module
from shoehorn.deployment.cluster_plan import ClusterPlan, plan_cluster
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.planner.network import parse_link
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.store import pull

GIB = 1 << 30
MODEL = "llama-3.3-70b-instruct-w4a16@unordered"


def machine(*gigabytes: int, name: str = "RTX 4090") -> Hardware:
    sizes = [gpu_specs.usable_bytes(each, name) for each in gigabytes]
    gpus = tuple(Gpu(number, "", name, size, size, (8, 9), 4, 16, False, ordinal=number)
                 for number, size in enumerate(sizes))
    return Hardware(gpus, "", 64 * GIB, 64 * GIB, 8.0)


def choice(monkeypatch: pytest.MonkeyPatch, model: str, *machines: Hardware, link: str = "1Gbit") -> ClusterPlan:
    monkeypatch.setattr(pull, "hub_files", lambda *_: captured.files(model))
    settings = settings_module.load({"MODEL_ID": "a/b", "QUANTIZATION": "none"})
    return plan_cluster(settings, machines, parse_link(link))


def test_two_machines_hold_a_70b_that_one_offloads(monkeypatch: pytest.MonkeyPatch) -> None:
    result = choice(monkeypatch, MODEL, machine(24), machine(24))
    assert (result.chosen.machines, result.chosen.division) == ((1, 2), "layers")
    assert not result.chosen.offloads
    alone = result.alternatives[0]
    assert alone.offloads
    assert result.chosen.speed > 10 * alone.speed
    assert "2 machines hold the model without offload" in result.reason


def test_matrices_are_divided_over_machines_only_with_a_fast_network(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = machine(24), machine(24)
    slow, fast = (choice(monkeypatch, MODEL, *machines, link=link)
                  for link in ("25Gbit", "100Gbit"))
    assert (slow.chosen.division, fast.chosen.division) == ("layers", "matrices")
    assert fast.chosen.speed > slow.chosen.speed
    assert fast.chosen.prefill_seconds < 2


def test_unequal_machines_get_layers_by_their_memory_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = choice(monkeypatch, MODEL, machine(12, 12), machine(24)).chosen.plan
    assert isinstance(plan, Plan)
    assert plan.engine_args["pipeline-parallel-size"] == 3
    layers = [int(word) for word in plan.engine_environment["VLLM_PP_LAYER_PARTITION"].split(",")]
    assert sum(layers) == 80
    assert len(plan.gpus) == 3
    for device in plan.vram:
        assert device.total_bytes <= device.limit_bytes


def test_machine_that_holds_the_model_serves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    result = choice(monkeypatch, "qwen3-8b", machine(8), machine(24))
    assert result.chosen.machines == (2,)
    assert result.reason == "one machine holds the model"
    assert len(result.alternatives) == 1


def test_refusal_names_the_machines_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [Hardware(each.gpus, "", 16 * GIB, 16 * GIB, 8.0) for each in (machine(16), machine(16))]
    result = choice(monkeypatch, MODEL, *machines)
    assert isinstance(result.chosen.plan, Refusal)
    assert result.reason == "2 more machines like the largest (RTX 4090) would hold the model"
    assert result.to_json()["alternatives"][0]["fits"] is False
