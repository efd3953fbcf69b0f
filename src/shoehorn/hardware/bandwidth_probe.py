"""How fast the link and the cards are: measured once in about a second, kept in the volume.

Rules: it runs in a process of its own, so that no CUDA context is left on the card; whatever fails, the figure is
unknown and the plan uses the table's; a result holds for this card, driver and slot.

`python -m shoehorn.hardware.bandwidth_probe INDEX` prints one JSON object: `link` and `device`, bytes per second.
Source of the calls: NVIDIA's CUDA driver API, through the cuda-bindings that torch brings.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.units import MIB
from shoehorn.hardware.types import Gpu, Hardware

log = logging.getLogger("engine")

_BUFFER_BYTES = 128 * MIB
_FREE_BYTES = 1024 * MIB
"""Less than this free, and the card is left alone: context and buffers need most of it."""

_SECONDS = 0.4
_TIMEOUT_SECONDS = 30.0


def probed(hardware: Hardware, models_dir: Path) -> Hardware:
    """The machine with measured speeds where they can be had."""
    if not hardware.gpus or importlib.util.find_spec("cuda") is None:
        return hardware
    path = models_dir / ".shoehorn" / "speed.json"
    known = _read(path)
    gpus, measured = [], False
    for gpu in hardware.gpus:
        key = f"{gpu.uuid} {hardware.driver_version} {gpu.pcie_generation}x{gpu.pcie_width}"
        if key not in known and gpu.free_bytes >= _FREE_BYTES:
            found = _measure(gpu)
            if found:
                known[key], measured = found, True
        speeds = known.get(key, {})
        gpus.append(replace(gpu, link_bytes_per_second=float(speeds.get("link", 0)),
                            device_bytes_per_second=float(speeds.get("device", 0))))
    if measured:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(known, indent=1) + "\n")
        except OSError as error:
            log.warning("the measured speeds cannot be kept in %s: %s", path, error)
    return replace(hardware, gpus=tuple(gpus))


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {name: float(speed) for name, speed in speeds.items()} for key, speeds in document.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measure(gpu: Gpu) -> dict[str, float]:
    """What the child process found; empty when it failed, which it says on its own standard error."""
    try:
        done = subprocess.run([sys.executable, "-m", "shoehorn.hardware.bandwidth_probe", str(gpu.index)],
                              capture_output=True,
                              text=True, timeout=_TIMEOUT_SECONDS, check=True)
        found = json.loads(done.stdout)
        return {"link": float(found["link"]), "device": float(found["device"])}
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        log.warning("the speed of GPU %d could not be measured (%s); the plan uses usual figures", gpu.index, error)
        return {}


def main(index: int) -> None:
    """Measure one card and print."""
    from cuda.bindings import driver

    def call(result: tuple[Any, ...]) -> Any:
        """A driver call's value. Raises RuntimeError on its error."""
        if result[0] != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA: {result[0]}")
        return result[1] if len(result) > 1 else None

    call(driver.cuInit(0))
    device = call(driver.cuDeviceGet(index))
    context = call(driver.cuDevicePrimaryCtxRetain(device))
    call(driver.cuCtxSetCurrent(context))
    host = call(driver.cuMemAllocHost(_BUFFER_BYTES))
    source, target = call(driver.cuMemAlloc(_BUFFER_BYTES)), call(driver.cuMemAlloc(_BUFFER_BYTES))

    def rate(copy: Any, moved: int) -> float:
        call(copy())
        call(driver.cuCtxSynchronize())
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < _SECONDS:
            for _ in range(4):
                call(copy())
            call(driver.cuCtxSynchronize())
            count += 4
        return moved * count / (time.perf_counter() - begin)

    link = rate(lambda: driver.cuMemcpyHtoDAsync(target, host, _BUFFER_BYTES, 0), _BUFFER_BYTES)
    memory = rate(lambda: driver.cuMemcpyDtoDAsync(target, source, _BUFFER_BYTES, 0), 2 * _BUFFER_BYTES)
    print(json.dumps({"link": round(link), "device": round(memory)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
