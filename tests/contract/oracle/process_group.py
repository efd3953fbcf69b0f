"""Tensor parallel groups of any size in one process: rank 0 of a group whose other ranks do not exist.

Rules: PyTorch's own fake process group takes the place of NCCL and gloo, and vLLM's own code builds its groups on it;
nothing is sent, so a collective would return wrong values, but no shape depends on one.
"""

from __future__ import annotations

from typing import Any


def initialize(tensor_parallel: int) -> None:
    """Make this process rank 0 of a tensor parallel group; the vLLM configuration is set as current."""
    import torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    new_group = torch.distributed.new_group

    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        return new_group(ranks, backend="fake")

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor_parallel)
    torch.distributed.new_group = fake_group
    MessageQueue.create_from_process_group = staticmethod(lambda *arguments, **options: None)
    parallel_state.in_the_same_node_as = lambda group, source_rank=0: [True] * tensor_parallel
    parallel_state.init_distributed_environment(tensor_parallel, 0, "env://", 0, "fake")
    parallel_state.initialize_model_parallel(tensor_parallel, 1)
