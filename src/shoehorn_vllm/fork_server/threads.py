"""Threads of a forked process: applies the variables of OpenMP, which reads them only when it is loaded.

vLLM sets the number of threads and, on a CPU, the cores of each worker by these variables. The threads of a worker
share its cores; OpenMP would bind each to one of them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

_CORES = ("GOMP_CPU_AFFINITY", "OMP_PLACES", "KMP_AFFINITY")


def bind(imported: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Apply the variables of OpenMP that differ from those of the import."""
    for name in _CORES:
        if environment.get(name, "") != imported.get(name, "") and (chosen := cores(environment.get(name, ""))):
            os.sched_setaffinity(0, chosen)
            break
    count = environment.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if torch is not None and count.isdecimal() and count != imported.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(count))


def cores(text: str) -> set[int]:
    """Return the CPUs in a value as vLLM writes it: `0 2 4`, `{0,2,4}` or `granularity=fine,proclist=[0,2]`."""
    listed = text.partition("proclist=")[2] or text
    return {int(number) for number in re.findall(r"\d+", listed)}
