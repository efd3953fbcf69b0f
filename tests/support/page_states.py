"""States for the console page: a plan, a load, a pull, the start of a conversation, and parts of a stream."""

from __future__ import annotations

import json
from dataclasses import asdict

from playwright.sync_api import expect

from fakes import captured
from fakes.engine import Answer, FakeEngine
from shoehorn.common.units import GIB
from shoehorn.config.settings import load
from shoehorn.deployment import inputs
from shoehorn.engine import memory_report
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan
from shoehorn.runtime.state import Phase
from support.browser import Visit, Visits
from support.gateway_process import KEY, MODEL, Gateway

SERVED = Answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]})


def plan_of_the_70b() -> Plan:
    """Plan a 70B model for two GPUs of 20 GB, with a part of its weights in host memory."""
    cards = tuple(Gpu(number, f"GPU-{number}", "NVIDIA RTX 4000 Ada", 20 * GIB, 20 * GIB, (8, 9), 4, 16, False)
                  for number in range(2))
    machine = Hardware(cards, "580.95.05", 96 * GIB, 96 * GIB, 16.0)
    settings = load({})
    plan = make_plan(PlanInputs(PlanSettings.of(settings), machine, inputs.select_profile(settings, machine),
                                captured.shape("deepseek-r1-distill-llama-70b")))
    assert isinstance(plan, Plan), plan
    return plan


def loaded(plan: Plan) -> tuple[dict[str, object], ...]:
    """Return the rows that the engine writes after a load, with slightly more memory of each part than expected."""
    figures = {number: {"weights_bytes": parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes
                        + parts.offload_buffer_bytes + (64 << 20), "kv_cache_bytes": parts.kv_cache_bytes}
               for number, parts in enumerate(plan.vram)}
    return tuple(asdict(row) for row in memory_report.compare(plan.vram, figures, [17 * GIB, 17 * GIB]))


def pull(gate: Gateway, done: int) -> None:
    gate.states.update(phase=Phase.PULLING, detail=MODEL, progress=done / (140 * GIB), bytes_done=done,
                       bytes_total=140 * GIB, rate_bytes_per_second=float(100 << 20), model=MODEL,
                       plan=plan_of_the_70b().public_summary())


def say(*pieces: str, field: str = "content") -> list[str]:
    return [json.dumps({"choices": [{"delta": {field: piece}}]}) for piece in pieces]


def usage(prompt: int, completion: int) -> str:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
                                                "total_tokens": prompt + completion}})


def chatting(gate: Gateway, engine: FakeEngine, visit: Visits, **how: object) -> Visit:
    """Open the page with an accepted key."""
    engine.answers["/v1/models"] = SERVED
    opened = visit(gate.url, **how)
    opened.page.locator("#key").fill(KEY)
    opened.page.locator("#key-form button").click()
    expect(opened.page.locator("#message")).to_be_focused()
    return opened
