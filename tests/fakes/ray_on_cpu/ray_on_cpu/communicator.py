"""vLLM's communicator of the CPU, over the network only."""

from __future__ import annotations

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class NetworkCommunicator(CpuCommunicator):
    """The name of the shared memory is a port with Ray, which can be the same on machines that share none."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
