"""`shoehorn plan`: the plan for this machine or a described one, from the model's config and headers alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from shoehorn.commands.target import add_target, is_this_machine, read_machine, read_nodes, read_settings
from shoehorn.common.errors import EXIT_DOES_NOT_FIT, EXIT_DONE, SettingsError
from shoehorn.common.units import format_size
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.deployment.cluster_plan import ClusterPlan, plan_cluster
from shoehorn.deployment.plan import plan_deployment
from shoehorn.hardware import requirements
from shoehorn.planner.memory.device import PARTS, DeviceMemory
from shoehorn.planner.network import parse_link
from shoehorn.planner.plan import Plan, Refusal, SequenceStates

_ROWS = {**PARTS, "total_bytes": "total", "limit_bytes": "limit"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the machine, and settings that replace environment variables."""
    add_target(parser)
    parser.add_argument("--node", metavar="GPU[,GPU]", action="append", default=[],
                        help="plan for several machines: the GPUs of one, as in --gpu; repeat the option for each "
                             "machine. --ram is the host memory of each")
    parser.add_argument("--link", metavar="RATE[:ROUND_TRIP]", default="1Gbit",
                        help="network between the machines, for example 10Gbit or 25Gbit:35us; default 1Gbit")
    parser.add_argument("--profile", metavar="P", help="VRAM_PROFILE")
    parser.add_argument("--json", action="store_true", help="print the plan or the refusal as JSON")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print a plan (exit code 0) or a refusal (exit code 3)."""
    settings = settings_module.load(read_settings(arguments, environment))
    if arguments.node:
        return _plan_nodes(arguments, settings, environment)
    machine = read_machine(arguments, settings, environment)
    deployment = inputs.gather(settings, machine, here=is_this_machine(arguments))
    if is_this_machine(arguments) and deployment.inputs.profile.match.device == "cuda":
        requirements.check_kind(machine)
    plan = plan_deployment(settings, deployment)
    if arguments.json:
        print(json.dumps(plan.to_json(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(_text(plan, settings)))
    return EXIT_DONE if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def _plan_nodes(arguments: argparse.Namespace, settings: Settings, environment: Mapping[str, str]) -> int:
    """Print the plan for several machines."""
    if arguments.gpu:
        raise SettingsError("--gpu and --node: both given.", "Type --node for each machine, and no --gpu.",
                            code="conflicting_options")
    try:
        link = parse_link(arguments.link)
    except ValueError as error:
        raise SettingsError(f"--link: {error}.", "Type, for example: --link 10Gbit", code="invalid_link") from error
    result = plan_cluster(settings, read_nodes(arguments, settings, environment), link)
    plan = result.chosen.plan
    if arguments.json:
        print(json.dumps({**plan.to_json(), "cluster": result.to_json()}, indent=1, ensure_ascii=False))
    else:
        print("\n".join([*_cluster(result, len(arguments.node)), "", *_text(plan, settings)]))
    return EXIT_DONE if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def _cluster(result: ClusterPlan, machines: int) -> list[str]:
    """Format the choice of machines, and what was compared with it."""
    numbers = ", ".join(map(str, result.chosen.machines))
    lines = [f"machines {numbers} of {machines}, {result.link.text}: {result.reason}"]
    for each in result.alternatives:
        used = f"  {'+'.join(map(str, each.machines))} by {each.division}:"
        if isinstance(each.plan, Plan):
            waiting = f"; the network adds {each.prefill_seconds:.2g} s to a prompt of 8,192 tokens" if len(
                each.machines) > 1 else ""
            lines.append(f"{used} {each.speed:g} tokens/s for one request, "
                         f"{format_size(each.plan.offloaded_bytes)} in host memory{waiting}")
        else:
            lines.append(f"{used} does not fit")
    return lines


def _text(plan: Plan | Refusal, settings: Settings) -> list[str]:
    """Format a plan, line by line."""
    lines = [f"{settings.model_id} with profile {plan.profile}", ""]
    if plan.vram:
        lines += [*_table(plan.vram), ""]
    if isinstance(plan, Plan):
        rates = [f"{plan.expected_tokens_per_second[key]} tokens/s for {users}"
                 for key, users in (("batch_1", "one request"), ("batch_8", "eight concurrent requests"))
                 if plan.expected_tokens_per_second[key] is not None]
        cache = f"{plan.kv_cache_tokens} tokens of KV cache for all requests" if plan.kv_cache_tokens else "no KV cache"
        lines += [f"fits: {cache}" + (f"; about {', '.join(rates)}" if rates else ""), *_states(plan.states),
                  f"host memory {format_size(plan.host_bytes)}, of which {format_size(plan.host_pinned_bytes)} pinned; "
                  f"disk {format_size(plan.disk_bytes)}"]
    else:
        lines += [f"does not fit: {plan.cause}", *(f"  -> {remedy.text}" for remedy in plan.remedies)]
    width = max((len(reason.option) for reason in plan.reasons), default=0)
    return [*lines, "", *(f"{reason.option:{width}}  {_format_value(reason.value):>12}  {reason.source}: {reason.text}"
                          for reason in plan.reasons)]


def _states(states: SequenceStates | None) -> list[str]:
    """Format the states of a sequence; nothing for a model without."""
    if states is None:
        return []
    return [f"states: {format_size(states.bytes_per_sequence)} of the KV cache for each sequence ({states.layers} "
            f"layers, {states.per_layer} each); for {states.sequences} sequences at a time"]


def _table(gpus: Sequence[DeviceMemory]) -> list[str]:
    """Format one column for all GPUs, or one for each if their limits differ."""
    columns = gpus if len({gpu.limit_bytes for gpu in gpus}) > 1 else gpus[:1]
    sizes = [gpu.to_json() for gpu in columns]
    rows = [f"  {name:20}" + "".join(f"{format_size(column[key]):>12}" for column in sizes)
            for key, name in _ROWS.items()]
    if len(gpus) == 1:
        return ["memory of the GPU", *rows]
    return [f"memory of each of {len(gpus)} GPUs", *rows]


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
