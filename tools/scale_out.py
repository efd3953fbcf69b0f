"""Seeded simulation of 100 machines that serve one model, from the planner's own figures.

The size of a group and its speed come from `plan_cluster`, as `shoehorn plan --node` prints them, for the recorded
headers of a 70B in INT4; nothing is measured here. Events: each machine is lost after an exponential time and returns
after `repair_seconds`. A group serves only while it has all its machines, and after a return loads the model for
`load_seconds`. Requests of a lost group that had begun count as broken; the front sends the others elsewhere.

Writes bench/results/scale-out.json and the table in docs/scale-out.md.
usage: python tools/scale_out.py [--seed N] [--days N]
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoehorn.config import settings as settings_module
from shoehorn.deployment.cluster_plan import plan_cluster
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.planner.network import parse_link
from shoehorn.planner.plan import Plan
from shoehorn.store import pull

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "scale-out.json"
DOCUMENT = HOME / "docs" / "scale-out.md"
BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"
MODEL = "llama-3.3-70b-instruct-w4a16@unordered"
MACHINES, STREAMS = 100, 8
KINDS = (("RTX 3060", 12, 1), ("RTX 3060", 12, 2), ("RTX 4090", 24, 1), ("RTX 4090", 24, 2), ("L40S", 48, 1))
"""GPU, its size as sold in GB, and number of GPUs in a machine, which has 64 GB of host memory."""
DAY = 86_400.0


@dataclass(frozen=True)
class Fleet:
    """Machines in groups of equal size.

    Attributes:
        machines, group: number of machines, and of machines in one group.
        mtbf_days: mean time between losses of one machine.
        repair_seconds: until a lost machine is back.
        notice_seconds: until a loss is noticed; load_seconds: until a complete group serves.
    """

    machines: int
    group: int
    mtbf_days: float = 30.0
    repair_seconds: float = 600.0
    notice_seconds: float = 20.0
    load_seconds: float = 120.0

    @property
    def groups(self) -> int:
        """Complete groups; remaining machines are spare and not used."""
        return self.machines // self.group


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation.

    Attributes:
        losses_per_day: of machines.
        capacity: mean share of the groups that serve.
        least_capacity: the smallest share at any time.
        full_share: share of the time in which all groups serve.
    """

    losses_per_day: float
    capacity: float
    least_capacity: float
    full_share: float


def simulate(fleet: Fleet, days: float, seed: int) -> Outcome:
    """Simulate a fleet for a number of days."""
    chance = random.Random(seed)  # noqa: S311  # a simulation
    missing = [0] * fleet.groups
    serves_at = [0.0] * fleet.groups
    events: list[tuple[float, int, str]] = []
    for machine in range(fleet.groups * fleet.group):
        heapq.heappush(events, (chance.expovariate(1 / (fleet.mtbf_days * DAY)), machine, "lost"))
    end, now, served, full, losses = days * DAY, 0.0, 0.0, 0.0, 0
    serving, least = fleet.groups, fleet.groups
    while events:
        moment, machine, kind = heapq.heappop(events)
        moment = min(moment, end)
        served += serving * (moment - now)
        full += (serving == fleet.groups) * (moment - now)
        now = moment
        if now >= end:
            break
        group = machine // fleet.group
        if kind == "lost":
            losses += 1
            missing[group] += 1
            heapq.heappush(events, (now + max(fleet.repair_seconds, fleet.notice_seconds), machine, "back"))
        elif kind == "back":
            missing[group] -= 1
            serves_at[group] = now + fleet.load_seconds
            heapq.heappush(events, (now + chance.expovariate(1 / (fleet.mtbf_days * DAY)), machine, "lost"))
            heapq.heappush(events, (serves_at[group], machine, "loaded"))
        serving = sum(not lost and ready <= now for lost, ready in zip(missing, serves_at, strict=True))
        least = min(least, serving)
    return Outcome(losses / days, served / (end * fleet.groups), least / fleet.groups, full / end)


def expected_capacity(fleet: Fleet) -> float:
    """Return the capacity without overlapping losses: the share of the time in which a group serves."""
    outage = max(fleet.repair_seconds, fleet.notice_seconds) + fleet.load_seconds
    return 1 / (1 + fleet.group * outage / (fleet.mtbf_days * DAY))


def plan_group(name: str, size_gb: int, gpus: int) -> tuple[int, Plan] | None:
    """Plan the model for machines of one kind; return the machines of a group and the plan, None if it does not fit."""
    size = gpu_specs.usable_bytes(size_gb, name)
    card = tuple(Gpu(number, "", name, size, size, (8, 9), 4, 16, False, ordinal=number) for number in range(gpus))
    machine = Hardware(card, "", 64 << 30, 64 << 30, 8.0)
    settings = settings_module.load({"MODEL_ID": "a/b", "QUANTIZATION": "none"})
    chosen = plan_cluster(settings, [machine] * 8, parse_link("1Gbit")).chosen
    return (len(chosen.machines), chosen.plan) if isinstance(chosen.plan, Plan) else None


def row(kind: tuple[str, int, int], days: float, seed: int) -> dict[str, Any] | None:
    """Plan and simulate 100 machines of a kind."""
    planned = plan_group(*kind)
    if planned is None:
        return None
    group, plan = planned
    fleet = Fleet(MACHINES, group)
    outcome = simulate(fleet, days, seed)
    speeds = plan.expected_tokens_per_second
    together = speeds["batch_8"] or 0.0
    return {"machine": f"{kind[2]} x {kind[0]} {kind[1]} GB", "offloaded": plan.offloaded_bytes > 0,
            **asdict(fleet), "groups": fleet.groups, **asdict(outcome),
            "tokens_per_second": {"batch_1": speeds["batch_1"], "batch_8": together},
            "fleet_tokens_per_second": round(together * fleet.groups * outcome.capacity),
            "gain_of_a_machine": round(together / group, 2),
            "broken_answers_per_day": round(outcome.losses_per_day * STREAMS, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Format the table of the document."""
    lines = ["| machine | machines in a group | tokens/s of a group: 1 request, 8 together | groups of 100 machines "
             "| capacity with losses | least | tokens/s of all, 8 requests a group "
             "| gain of one more machine, tokens/s |",
             "|---|---|---|---|---|---|---|---|"]
    for each in rows:
        speeds = each["tokens_per_second"]
        name = each["machine"] + (", offloaded" if each["offloaded"] else "")
        lines.append(f"| {name} | {each['group']} | {speeds['batch_1']:g}, {speeds['batch_8']:g} | {each['groups']} "
                     f"| {each['capacity']:.2%} | {each['least_capacity']:.0%} | {each['fleet_tokens_per_second']:,} "
                     f"| {each['gain_of_a_machine']:g} |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, and write result and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=float, default=3650.0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(HOME / "tests"))
    from fakes import captured

    pull.hub_files = lambda *_: captured.files(MODEL)  # type: ignore[assignment]  # recorded headers
    rows = [each for kind in KINDS if (each := row(kind, arguments.days, arguments.seed))]
    result = {"seed": arguments.seed, "days": arguments.days, "model": MODEL, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
