"""A 70B in little VRAM: memory over the whole life of the process and passes per second, against the link's limit.

Every row of tests/gpu/low_vram.json is planned for its budget and started once on cards of which another process
holds the rest, so that anything above the budget would fail; weights are zeros of the true shapes. A pass cannot be
faster than the offloaded bytes over the link: `limit`. Where tokens are guessed a pass yields several, and is not
compared with it. Writes bench/results/low-vram.json; a row that was not measured anew stays there, with its own card,
link and date.
usage: bench/low_vram.py [--records FILE...]      on a machine with an NVIDIA GPU, vLLM, and host memory of 48 GB
--records: what `tests/gpu/measure_plans.py` wrote, instead of measuring; with --link, --gpu and --driver
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests")]

from fakes import captured  # noqa: E402  # the path is set just above
from shoehorn.config import settings  # noqa: E402  # likewise
from shoehorn.deployment import inputs  # noqa: E402  # likewise
from shoehorn.hardware import bandwidth_probe, detect  # noqa: E402  # likewise
from shoehorn.model import checkpoint  # noqa: E402  # likewise
from shoehorn.planner.build import make_plan  # noqa: E402  # likewise
from shoehorn.planner.inputs import PlanInputs, PlanSettings  # noqa: E402  # likewise
from shoehorn.planner.plan import Plan  # noqa: E402  # likewise

CASES = HOME / "tests" / "gpu" / "low_vram.json"
BUDGETS = (3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48)
RESULT = HOME / "bench" / "results" / "low-vram.json"


def row(case: dict[str, Any], record: dict[str, Any], link: float) -> dict[str, Any]:
    """One row: what was measured, the limit, and whether the goals were met."""
    cards, report = record["nvml"], record.get("report")
    found: dict[str, Any] = {"name": case["name"], "started": record["status"] == 0 and report is not None}
    if not found["started"]:
        return found
    plan = record.get("plan")
    budget = plan["vram"][0]["limit_bytes"] if plan else case["room_bytes"]
    peaks = {stage: max(card[f"{stage}_peak_bytes"] for card in cards) for stage in ("load", "start", "run")}
    peak = max(peaks.values())
    speed = {batch: float(figure) for batch, figure in report["speed"].items()}
    found |= {"budget_bytes": budget, "peak_bytes": peak, "loading_peak_bytes": peaks["load"],
              "serving_peak_bytes": peaks["run"], "kv_cache_tokens": report["kv_cache_tokens"],
              "host_pinned_bytes": report["workers"][0]["pinned_bytes"], "start_seconds": report["start_seconds"],
              "tokens_per_second": speed}
    met = {"memory": peak <= budget}
    goal = case["goal"]
    if plan:
        expected = plan["vram"][0]
        found |= {"expected_bytes": expected["total_bytes"], "offloaded_bytes": plan["offloaded_bytes"],
                  "expected_tokens_per_second": plan["expected_tokens_per_second"]}
    if "kernels" in report:
        found["kernels"] = report["kernels"]
    if plan and plan["offloaded_bytes"] and "speculative-config" not in plan["engine_args"]:
        limit = link / plan["offloaded_bytes"]
        found["limit_passes_per_second"] = round(limit, 4)
        found["share_of_limit"] = {batch: round(figure / int(batch) / limit, 4) for batch, figure in speed.items()}
        met |= {f"passes {batch}": found["share_of_limit"][batch] >= least
                for batch, least in goal.get("passes", {}).items()}
    if "kv_cache_tokens" in goal:
        met["kv_cache_tokens"] = report["kv_cache_tokens"] >= goal["kv_cache_tokens"]
    met |= {f"tokens {batch}": speed[batch] >= least for batch, least in goal.get("tokens_per_second", {}).items()}
    return found | {"goal": goal, "met": met}


def expected(links: dict[str, float]) -> dict[str, dict[str, float]]:
    """Tokens a second for one user that the plan expects of the 70B in INT4, by link and VRAM budget in GiB.

    The card is an H200 made smaller, the context 2,048 tokens, one request at a time.
    """
    shape = checkpoint.read(captured.converted("deepseek-r1-distill-llama-70b"))
    found: dict[str, dict[str, float]] = {}
    for name, link in links.items():
        for budget in BUDGETS:
            wish = settings.load({"VRAM_LIMIT": f"{budget}GiB", "MAX_MODEL_LEN": "2048", "MAX_NUM_SEQS": "1"})
            machine = captured.machine("h200-141-ram192")
            machine = replace(machine, gpus=(replace(machine.gpus[0], link_bytes_per_second=link),))
            plan = make_plan(PlanInputs(PlanSettings.of(wish), machine, inputs.select_profile(wish, machine), shape))
            if isinstance(plan, Plan):
                found.setdefault(name, {})[str(budget)] = float(plan.expected_tokens_per_second["batch_1"] or 0)
    return found


def versions() -> dict[str, str]:
    """Of what was measured, without the builds' names."""
    import bitsandbytes  # heavy, and only here
    import torch
    import vllm

    found = {module.__name__: str(module.__version__).split("+")[0] for module in (vllm, torch, bitsandbytes)}
    return found | {"vllm-bnb-plugin": version("vllm-bnb-plugin")}


def main() -> None:
    """Measure, or take what was measured, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=Path, nargs="+")
    parser.add_argument("--link", type=float, help="bytes a second from pinned host memory to the card")
    parser.add_argument("--gpu")
    parser.add_argument("--driver")
    parser.add_argument("--answers", type=Path, help="what tests/gpu/same_answers.py wrote")
    arguments = parser.parse_args()
    records: dict[str, Any] = {}
    files = arguments.records
    with tempfile.TemporaryDirectory() as work:
        if not files:
            subprocess.run([sys.executable, HOME / "tests" / "gpu" / "measure_plans.py", CASES, work], check=True)
            files = [Path(work) / "records.json"]
        for file in files:
            records |= {record["name"]: record for record in json.loads(file.read_text()) if "status" in record}
    gpu, driver, link = arguments.gpu, arguments.driver, arguments.link
    if not link:
        machine = bandwidth_probe.with_measured_bandwidths(
            detect.detect(), Path(tempfile.gettempdir()) / "speed.json")
        gpu, driver, link = machine.gpus[0].name, machine.driver_version, machine.gpus[0].link_bytes_per_second
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "answers": None}
    answers = json.loads(arguments.answers.read_text()) if arguments.answers else before["answers"]
    rows = {found["name"]: found for found in before["rows"]}
    measured = {"date": datetime.now(UTC).date().isoformat(), "driver": driver, "link_bytes_per_second": round(link)}
    cases = json.loads(CASES.read_text())
    for case in cases:
        if case["name"] in records:
            cards = f"{case['gpus']} x {gpu}" if "gpus" in case else gpu
            rows[case["name"]] = row(case, records[case["name"]], link) | measured | {"gpu": cards}
    RESULT.write_text(json.dumps({
        "versions": versions(), "rows": [rows[case["name"]] for case in cases if case["name"] in rows],
        "answers": answers, "expected": expected({"PCIe 5, 55.4 GB/s": 55.4e9, "PCIe 4, 25 GB/s": 25e9})},
        indent=1) + "\n")
    for found in rows.values():
        print(found["name"], found.get("met", "did not start"))


if __name__ == "__main__":
    main()
