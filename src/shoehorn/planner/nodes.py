"""Division of the model over the machines of a cluster: by layers across machines, by matrices within one.

Rules: a network between machines carries the activations of a few layers, not the sums of every matrix; vLLM numbers
its ranks machine by machine, so each machine lends the same number of GPUs, or every GPU of every machine is used.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Gpu, Hardware, largest_first
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MACHINE

TENSOR, PIPELINE = "tensor-parallel-size", "pipeline-parallel-size"


def over_nodes(options: OptionSet, nodes: int, tensor: int) -> OptionSet:
    """Divide by layers over machines and by matrices over `tensor` GPUs of each, unless the options say otherwise."""
    if {TENSOR, PIPELINE} & options.values.keys():
        return options
    options = options.set(PIPELINE, nodes, MACHINE, "over-nodes", nodes=nodes)
    return options.set(TENSOR, tensor, MACHINE, "within-nodes", gpus=tensor) if tensor > 1 else options


def ranks(hardware: Hardware, options: OptionSet) -> tuple[Gpu, ...]:
    """Return the GPUs in the order of the engine's ranks, machine by machine, the largest of each first.

    Raises:
        SettingsError: the options ask for another number of GPUs than the machines have together.
    """
    tensor, stages = options.integer(TENSOR, 1), options.integer(PIPELINE, 1)
    if tensor * stages == sum(hardware.nodes) and not any(count % tensor for count in hardware.nodes):
        return tuple(gpu for gpus in _by_node(hardware) for gpu in largest_first(gpus))
    each, rest = divmod(tensor * stages, len(hardware.nodes))
    if rest or each < 1 or each > min(hardware.nodes):
        raise SettingsError(
            f"tensor-parallel-size {tensor} x pipeline-parallel-size {stages}: the {len(hardware.nodes)} machines have "
            f"{', '.join(map(str, hardware.nodes))} GPUs, and each of them lends the same number.",
            f"Set VLLM_EXTRA_ARGS='--tensor-parallel-size {min(hardware.nodes)} --pipeline-parallel-size "
            f"{len(hardware.nodes)}'.", code="too_few_gpus")
    return tuple(gpu for gpus in _by_node(hardware) for gpu in largest_first(gpus)[:each])


def _by_node(hardware: Hardware) -> Iterator[tuple[Gpu, ...]]:
    first = 0
    for count in hardware.nodes:
        yield hardware.gpus[first:first + count]
        first += count
