"""The account of weights in host memory: their proof and one line in the log after the load, and what starts then.

vLLM reports its own offload by the same line, which telemetry/memory_log reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.offloader.base import get_offloader
from vllm.model_executor.offloader.uva import UVAOffloader

from shoehorn_vllm.hybrid import offload_proof
from shoehorn_vllm.patches.patch import Patch

log = logging.getLogger("vllm.shoehorn_vllm")
_sizes: list[int] = []
_waiting: list[Callable[[], None]] = []


def add(size: int) -> None:
    """Count bytes of weights in host memory."""
    _sizes.append(size)


def when_loaded(call: Callable[[], None]) -> None:
    """Call it once, when the model that is being loaded is complete."""
    _waiting.append(call)


def _load_model(original: Callable[..., nn.Module], loader: Any, vllm_config: Any, *arguments: Any,
                **named: Any) -> nn.Module:
    before = len(_sizes)
    model = original(loader, vllm_config, *arguments, **named)
    _prove(model, vllm_config.additional_config)
    while _waiting:
        _waiting.pop(0)()
    if len(_sizes) > before:
        log.info("Total CPU offloaded parameters: %s", f"{sum(_sizes) / (1 << 30):.2f}")
    return model


def _prove(model: nn.Module, additional: Any) -> None:
    """Check that what shall be in host memory is there."""
    own = additional.get("shoehorn") if isinstance(additional, dict) else None
    offload_proof.check_options(own if isinstance(own, dict) else {}, sum(_sizes))
    offloader = get_offloader()
    if isinstance(offloader, UVAOffloader) and offloader.cpu_offload_bytes:
        offload_proof.check(offloader.cpu_offload_bytes, offload_proof.host_bytes(model.modules()))


PATCH = Patch(BaseModelLoader, "load_model", _load_model)


def apply() -> None:
    """Patch this process."""
    PATCH.apply()
