"""vLLM's CPU platform with what Ray's executor needs."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayOnCpuPlatform(CpuPlatform):
    """The CPU as one of Ray's GPUs."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Return the class that never uses shared memory."""
        return "ray_on_cpu.communicator.NetworkCommunicator"
