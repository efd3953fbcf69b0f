"""Plan for several machines: which of them serve one model, and how it is divided over them.

Rules: a machine that holds the model alone serves it alone; otherwise the fewest machines that hold it without offload
compete with one machine and offload, and the faster wins; matrices are divided over machines only where that is faster
for one request and adds less than two seconds to a long prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import format_size
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.deployment.machines import merged
from shoehorn.deployment.plan import plan_deployment
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner import network, nodes
from shoehorn.planner.network import Crossing, Link
from shoehorn.planner.plan import Plan, Refusal

_MOST_MACHINES = 8
"""Machines of one group, at most: each of them ends it when it is lost."""


@dataclass(frozen=True)
class Alternative:
    """A way to serve the model.

    Attributes:
        machines: numbers of the machines in use, from 1, the head first.
        division: `one machine`, `layers` or `matrices`: what is divided over machines.
        prefill_seconds: that the network adds to a prompt of 8,192 tokens.
    """

    machines: tuple[int, ...]
    division: str
    plan: Plan | Refusal
    prefill_seconds: float = 0.0

    @property
    def offloads(self) -> bool:
        """Return whether layers are in host memory."""
        return isinstance(self.plan, Plan) and bool(self.plan.offloaded_bytes)

    @property
    def speed(self) -> float:
        """Expected tokens per second of one request; 0 where it does not fit, or nothing is known."""
        return (self.plan.expected_tokens_per_second["batch_1"] or 0.0) if isinstance(self.plan, Plan) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return an entry of `cluster.alternatives` in `plan --json`."""
        return {"machines": list(self.machines), "division": self.division, "fits": isinstance(self.plan, Plan),
                "offloaded_bytes": self.plan.offloaded_bytes if isinstance(self.plan, Plan) else None,
                "tokens_per_second": self.speed or None, "prefill_network_seconds": round(self.prefill_seconds, 3)}


@dataclass(frozen=True)
class ClusterPlan:
    """The chosen alternative, the reason for it, and all that were compared."""

    chosen: Alternative
    reason: str
    alternatives: tuple[Alternative, ...]
    link: Link

    def to_json(self) -> dict[str, Any]:
        """Return `cluster` of `plan --json`."""
        return {"machines": list(self.chosen.machines), "division": self.chosen.division, "reason": self.reason,
                "link": {"bits_per_second": self.link.bits_per_second,
                         "round_trip_seconds": self.link.round_trip_seconds},
                "alternatives": [each.to_json() for each in self.alternatives]}


def plan_cluster(settings: Settings, machines: Sequence[Hardware], link: Link) -> ClusterPlan:
    """Choose machines and division.

    Args:
        machines: in the order in which they are numbered.

    Raises:
        SettingsError: the settings contradict each other, the model or the machines.
        ModelUnavailableError: config and headers cannot be read.
    """
    shapes = ShapeReader(settings)
    order = sorted(range(len(machines)), key=lambda number: -sum(gpu.total_bytes for gpu in machines[number].gpus))
    alternatives = [_alone(settings, machines[order[0]], order[0] + 1, shapes)]
    alone = alternatives[0]
    if isinstance(alone.plan, Plan) and not alone.offloads:
        return ClusterPlan(alone, "one machine holds the model", tuple(alternatives), link)
    for count in range(2, min(len(machines), _MOST_MACHINES) + 1):
        numbers = tuple(number + 1 for number in order[:count])
        group = _group(settings, [machines[number] for number in order[:count]], numbers, link, shapes)
        alternatives += group
        if any(isinstance(each.plan, Plan) and not each.offloads for each in group):
            break
    best = max(alternatives, key=lambda each: each.speed)  # the first of equal ones
    if not best.speed:
        best = next((each for each in alternatives if isinstance(each.plan, Plan)), alternatives[-1])
    if isinstance(best.plan, Refusal):
        return ClusterPlan(best, _one_more(settings, [machines[number] for number in order], link, shapes),
                           tuple(alternatives), link)
    return ClusterPlan(best, _reason(best, alone), tuple(alternatives), link)


def _reason(best: Alternative, alone: Alternative) -> str:
    """Return why an alternative is the best."""
    if best is alone:
        return f"faster than any group of these machines, with {_offload(alone)}"
    count = len(best.machines)
    fewest = f"{count} machines hold the model" + (f", with {_offload(best)}" if best.offloads else " without offload")
    if isinstance(alone.plan, Refusal):
        return f"{fewest}; one does not"
    return f"{fewest}: {best.speed:g} tokens/s, one machine with {_offload(alone)} {alone.speed:g}"


def _offload(alternative: Alternative) -> str:
    offloaded = alternative.plan.offloaded_bytes if isinstance(alternative.plan, Plan) else 0
    return f"{format_size(offloaded)} in host memory"


def _alone(settings: Settings, machine: Hardware, number: int, shapes: ShapeReader) -> Alternative:
    deployment = inputs.gather(settings, machine, here=False, shapes=shapes)
    return Alternative((number,), "one machine", plan_deployment(settings, deployment))


def _group(settings: Settings, machines: Sequence[Hardware], numbers: tuple[int, ...], link: Link, shapes: ShapeReader
           ) -> list[Alternative]:
    """Return the plan by layers, and the one by matrices if it is faster and prompts do not wait for the network."""
    hardware = merged(machines)
    deployment = inputs.gather(settings, hardware, here=False, shapes=shapes)
    shape = deployment.inputs.shape
    layers = _on_network(plan_deployment(settings, deployment), hardware, shape, link, numbers, across=False)
    tensor = sum(hardware.nodes)
    if len(set(hardware.nodes)) > 1 or {nodes.TENSOR, nodes.PIPELINE} & _named_options(settings):
        return [layers]
    words = (f"--{nodes.TENSOR}", str(tensor), f"--{nodes.PIPELINE}", "1")
    try:
        across = replace(settings, vllm_extra_args=(*settings.vllm_extra_args, *words))
        plan = plan_deployment(across, inputs.gather(across, hardware, here=False, shapes=shapes))
    except SettingsError:  # the matrices cannot be divided over so many GPUs
        return [layers]
    matrices = _on_network(plan, hardware, shape, link, numbers, across=True)
    useful = matrices.speed > layers.speed and matrices.prefill_seconds < network.PREFILL_SECONDS
    return [layers, matrices] if useful else [layers]


def _named_options(settings: Settings) -> set[str]:
    return {word.partition("=")[0].removeprefix("--") for word in settings.vllm_extra_args}


def _on_network(plan: Plan | Refusal, hardware: Hardware, shape: ModelShape, link: Link, numbers: tuple[int, ...], *,
                across: bool) -> Alternative:
    """Add the time on the network to a plan."""
    crossing = Crossing(len(hardware.nodes) - 1, len(hardware.nodes) if across else 1)
    prefill = network.seconds(link, shape, crossing, network.PREFILL_TOKENS)
    if isinstance(plan, Plan):
        rates = network.with_network(plan.expected_tokens_per_second, link, shape, crossing)
        plan = replace(plan, expected_tokens_per_second=rates)
    return Alternative(numbers, "matrices" if across else "layers", plan, prefill)


def _one_more(settings: Settings, machines: list[Hardware], link: Link, shapes: ShapeReader) -> str:
    """Return how many machines like the largest one are missing."""
    largest = machines[0]
    sizes = ", ".join(gpu.name or format_size(gpu.total_bytes) for gpu in largest.gpus)
    for more in range(1, _MOST_MACHINES - len(machines) + 1):
        group = [*machines, *[largest] * more]
        alternative = _group(settings, group, tuple(range(1, len(group) + 1)), link, shapes)[0]
        if isinstance(alternative.plan, Plan):
            return f"{more} more machine{'s' * (more > 1)} like the largest ({sizes}) would hold the model"
    return f"no group of up to {_MOST_MACHINES} machines like these holds the model"
