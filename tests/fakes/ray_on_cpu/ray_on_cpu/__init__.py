"""Platform plugin of vLLM for tests: Ray's executor on the CPU, which vLLM 0.32.0 supports on GPUs only.

Ray counts a worker process as a GPU (`ray start --num-gpus=1`). It is active where this folder is on PYTHONPATH.
"""


def platform() -> str:
    """Return the class of the platform."""
    return "ray_on_cpu.platform.RayOnCpuPlatform"
