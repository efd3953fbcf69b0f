"""A 70B in little VRAM: peak memory over the life of the process, and forward passes per second against the PCIe limit.

Every row of tests/gpu/low_vram.json is planned for its budget and started once on GPUs whose remaining memory another
process occupies, so any allocation above the budget would fail; weights are zeros of the true shapes. The offloaded
bytes and the host-to-device bandwidth give the highest possible rate of forward passes: `limit`. With speculative
decoding a forward pass yields several tokens, so it is not compared with the limit. Writes
bench/results/low-vram.json; rows that were not measured again keep their GPU, bandwidth and date.
usage: bench/low_vram.py [--records FILE...]      on a machine with an NVIDIA GPU, vLLM, and host memory of 48 GB
--records: output of `tests/gpu/measure_plans.py`, instead of measuring; with --link, --gpu and --driver
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


def row(case: dict[str, Any], record: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """Return one row: measurements, the limit, and whether the goals were met."""
    gpus, report = record["nvml"], record.get("report")
    result: dict[str, Any] = {"name": case["name"], "started": record["status"] == 0 and report is not None}
    if not result["started"]:
        return result
    plan = record.get("plan")
    budget = plan["vram"][0]["limit_bytes"] if plan else case["room_bytes"]
    peaks = {stage: max(gpu[f"{stage}_peak_bytes"] for gpu in gpus) for stage in ("load", "start", "run")}
    peak = max(peaks.values())
    speed = {batch: float(figure) for batch, figure in report["speed"].items()}
    result |= {"budget_bytes": budget, "peak_bytes": peak, "loading_peak_bytes": peaks["load"],
              "serving_peak_bytes": peaks["run"], "kv_cache_tokens": report["kv_cache_tokens"],
              "host_pinned_bytes": report["workers"][0]["pinned_bytes"], "start_seconds": report["start_seconds"],
              "tokens_per_second": speed}
    met = {"memory": peak <= budget}
    goal = case["goal"]
    if plan:
        expected = plan["vram"][0]
        result |= {"expected_bytes": expected["total_bytes"], "offloaded_bytes": plan["offloaded_bytes"],
                  "expected_tokens_per_second": plan["expected_tokens_per_second"]}
    if "kernels" in report:
        result["kernels"] = report["kernels"]
    if plan and plan["offloaded_bytes"] and "speculative-config" not in plan["engine_args"]:
        limit = bandwidth / plan["offloaded_bytes"]
        result["limit_passes_per_second"] = round(limit, 4)
        result["share_of_limit"] = {batch: round(figure / int(batch) / limit, 4) for batch, figure in speed.items()}
        met |= {f"passes {batch}": result["share_of_limit"][batch] >= least
                for batch, least in goal.get("passes", {}).items()}
    if "kv_cache_tokens" in goal:
        met["kv_cache_tokens"] = report["kv_cache_tokens"] >= goal["kv_cache_tokens"]
    met |= {f"tokens {batch}": speed[batch] >= least for batch, least in goal.get("tokens_per_second", {}).items()}
    return result | {"goal": goal, "met": met}


def expected(bandwidths: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the planned tokens per second of the 70B in INT4 for one user, by bandwidth and VRAM budget in GiB.

    The GPU is an H200 with a limited budget, the context 2,048 tokens, one request at a time.
    """
    shape = checkpoint.read(captured.converted("deepseek-r1-distill-llama-70b"))
    speeds: dict[str, dict[str, float]] = {}
    for name, bandwidth in bandwidths.items():
        for budget in BUDGETS:
            chosen = settings.load({"VRAM_LIMIT": f"{budget}GiB", "MAX_MODEL_LEN": "2048", "MAX_NUM_SEQS": "1"})
            machine = captured.machine("h200-141-ram192")
            machine = replace(machine, gpus=(replace(machine.gpus[0], link_bytes_per_second=bandwidth),))
            profile = inputs.select_profile(chosen, machine)
            plan = make_plan(PlanInputs(PlanSettings.of(chosen), machine, profile, shape))
            if isinstance(plan, Plan):
                speeds.setdefault(name, {})[str(budget)] = float(plan.expected_tokens_per_second["batch_1"] or 0)
    return speeds


def versions() -> dict[str, str]:
    """Of what was measured, without the builds' names."""
    import bitsandbytes  # heavy, and only here
    import torch
    import vllm

    releases = {module.__name__: str(module.__version__).split("+")[0] for module in (vllm, torch, bitsandbytes)}
    return releases | {"vllm-bnb-plugin": version("vllm-bnb-plugin")}


def main() -> None:
    """Measure, or read records, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=Path, nargs="+")
    parser.add_argument("--link", type=float, help="bytes per second from pinned host memory to the GPU")
    parser.add_argument("--gpu")
    parser.add_argument("--driver")
    parser.add_argument("--answers", type=Path, help="output of tests/gpu/same_answers.py")
    arguments = parser.parse_args()
    records: dict[str, Any] = {}
    files = arguments.records
    with tempfile.TemporaryDirectory() as work:
        if not files:
            subprocess.run([sys.executable, HOME / "tests" / "gpu" / "measure_plans.py", CASES, work], check=True)
            files = [Path(work) / "records.json"]
        for file in files:
            records |= {record["name"]: record for record in json.loads(file.read_text()) if "status" in record}
    gpu, driver, bandwidth = arguments.gpu, arguments.driver, arguments.link
    if not bandwidth:
        machine = bandwidth_probe.with_measured_bandwidths(
            detect.detect(), Path(tempfile.gettempdir()) / "speed.json")
        gpu, driver, bandwidth = machine.gpus[0].name, machine.driver_version, machine.gpus[0].link_bytes_per_second
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "answers": None}
    answers = json.loads(arguments.answers.read_text()) if arguments.answers else before["answers"]
    rows = {each["name"]: each for each in before["rows"]}
    measured = {"date": datetime.now(UTC).date().isoformat(), "driver": driver,
                "link_bytes_per_second": round(bandwidth)}
    cases = json.loads(CASES.read_text())
    for case in cases:
        if case["name"] in records:
            gpus = f"{case['gpus']} x {gpu}" if "gpus" in case else gpu
            rows[case["name"]] = row(case, records[case["name"]], bandwidth) | measured | {"gpu": gpus}
    RESULT.write_text(json.dumps({
        "versions": versions(), "rows": [rows[case["name"]] for case in cases if case["name"] in rows],
        "answers": answers, "expected": expected({"PCIe 5, 55.4 GB/s": 55.4e9, "PCIe 4, 25 GB/s": 25e9})},
        indent=1) + "\n")
    for each in rows.values():
        print(each["name"], each.get("met", "did not start"))


if __name__ == "__main__":
    main()
