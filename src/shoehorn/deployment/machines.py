"""Hardware of several machines as one, for a plan of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoehorn.hardware.types import Hardware


def merged(machines: Sequence[Hardware]) -> Hardware:
    """Return the GPUs of all machines, and of host memory and CPUs what each of them has at least.

    Args:
        machines: the head's first.
    """
    head = machines[0]
    computes = [each.host_compute for each in machines]
    return replace(
        head, gpus=tuple(gpu for machine in machines for gpu in machine.gpus),
        gpu_remarks=tuple(remark for machine in machines for remark in machine.gpu_remarks),
        host_memory_bytes=min(each.host_memory_bytes for each in machines),
        host_available_bytes=min(each.host_available_bytes for each in machines),
        cpus=min(each.cpus for each in machines), cpu_kernel=all(each.cpu_kernel for each in machines),
        host_compute=head.host_compute if None not in computes else None,
        nodes=tuple(len(machine.gpus) for machine in machines))
