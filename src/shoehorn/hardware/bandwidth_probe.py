"""Measurement of host-to-device and memory bandwidth: about one second for each GPU, cached in a file.

Rules: a separate process measures, so that no CUDA context remains on the GPU; after any failure the bandwidth is
unknown and the plan uses the table in `gpu_specs`; a result is valid for one GPU, driver and PCIe link.

`python -m shoehorn.hardware.bandwidth_probe` prints one JSON object: `link` (host to device) and `device`, in
bytes a second. API: NVIDIA's CUDA driver API through cuda-bindings, a dependency of torch.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoehorn.common.units import MIB
from shoehorn.hardware import probe_cache, visible_gpus
from shoehorn.hardware.types import Gpu, Hardware

log = logging.getLogger("engine")

_BUFFER_BYTES = 128 * MIB
_FREE_BYTES = 1024 * MIB
"""Minimum free memory for a measurement: CUDA context and buffers."""

_SECONDS = 0.4
_TIMEOUT_SECONDS = 30.0


def with_measured_bandwidths(hardware: Hardware, cache: Path, *, measure: bool = True) -> Hardware:
    """Return the machine with measured bandwidths, read from the file `cache` or measured now.

    Args:
        measure: False only reads the cache; bandwidths that it lacks stay unknown.
    """
    if not hardware.gpus or importlib.util.find_spec("cuda") is None:
        return hardware
    bandwidths = probe_cache.read(cache)
    gpus, changed = [], False
    for gpu in hardware.gpus:
        key = f"{gpu.uuid} {hardware.driver_version} {gpu.pcie_generation}x{gpu.pcie_width}"
        if measure and key not in bandwidths and gpu.free_bytes >= _FREE_BYTES:
            measurement = _measure(gpu)
            if measurement:
                bandwidths[key], changed = measurement, True
        values = bandwidths.get(key, {})
        gpus.append(replace(gpu, link_bytes_per_second=float(values.get("link", 0)),
                            device_bytes_per_second=float(values.get("device", 0))))
    if changed:
        probe_cache.save(cache, bandwidths)
    return replace(hardware, gpus=tuple(gpus))


def _measure(gpu: Gpu) -> dict[str, float]:
    """Measure one GPU in a child process; empty after a failure."""
    try:
        visible = visible_gpus.environment_of((gpu,))  # CUDA's numbers are not NVML's
        child = subprocess.run([sys.executable, "-m", "shoehorn.hardware.bandwidth_probe"], env=os.environ | visible,
                               capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
        result = json.loads(child.stdout)
        return {"link": float(result["link"]), "device": float(result["device"])}
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        log.warning("Cannot measure bandwidth, using datasheet values gpu=%d error=%s", gpu.index, error)
        return {}


def main() -> None:
    """Measure the first GPU that CUDA shows, and print the result."""
    from cuda.bindings import driver

    def call(result: tuple[Any, ...]) -> Any:
        """Return the value of a driver call. Raises RuntimeError after an error."""
        if result[0] != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA: {result[0]}")
        return result[1] if len(result) > 1 else None

    call(driver.cuInit(0))
    device = call(driver.cuDeviceGet(0))
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
    main()
