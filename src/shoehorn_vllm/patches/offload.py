"""Patches of the engine's offload: weights are in host memory once, quantization state and embedding included.

Four defects of vLLM 0.32.0 (model_executor/offloader/, model_loader/utils.py) and vllm-bnb-plugin 0.0.3:
- until the load is over, prefetch keeps the memory that each weight was read into as well as the memory that it was
  repacked into: 79 GB of host memory were pinned for a model of 35 GB. A repacked weight now replaces the original in
  place; with UVA too its memory is no larger than the weight (`pinned_memory`);
- bitsandbytes' absmax is not a parameter, so it stays on the GPU when its weights are offloaded, and the loader
  dequantizes it there from 8 to 32 bits, although bitsandbytes 0.50 works with the quantized one: 4 GB for a 70B. With
  prefetch it stays quantized and is offloaded with its weights;
- a draft model is built by the same code as the model: UVA spends the rest of its byte budget on the draft, and
  prefetch fails ("wrap_modules should only be called once"). The draft model stays on the GPU;
- the embedding is never offloaded, whatever the options say. With `--additional-config {"shoehorn": {"embedding":
  "host"}}` it is offloaded to host memory, and the GPU reads the rows of the current tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import utils as loading
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.offloader import uva
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader
from vllm.model_executor.offloader.prefetch import PrefetchOffloader, _CpuParamOffloader
from vllm.model_executor.offloader.uva import UVAOffloader
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

from shoehorn_vllm.patches import pinned_memory
from shoehorn_vllm.patches.patch import Patch
from shoehorn_vllm.telemetry import quant_state


def apply() -> None:
    """Patch the offload of this process."""
    for patch in PATCHES:
        patch.apply()


def _offload_parameter(_original: Callable[[Any], None], offloader: Any) -> None:
    """Copy a parameter to exact memory, and keep no second reference to it until it is repacked."""
    parameter = offloader._param
    parameter.data = pinned_memory.copy_to_host(parameter.data)
    offloader.offloaded_bytes = parameter.data.nbytes


@contextmanager
def _repack_in_place(original: Callable[..., AbstractContextManager[nn.Module]], module: nn.Module,
                     target: torch.device) -> Iterator[nn.Module]:
    """Repack a module's weights on the GPU, and copy them back into the host memory that they came from."""
    places = {} if target.type == "cpu" else {
        name: parameter.data for name, parameter in module.named_parameters() if parameter.device.type == "cpu"}
    for name, parameter in module.named_parameters():
        if name in places:
            parameter.data = parameter.data.to(target)
    with original(module, target):
        yield module
    for name, parameter in module.named_parameters():
        if name in places:
            parameter.data = pinned_memory.copy_to_host(parameter.data, places.pop(name))


def _view_exact_copy(original: Callable[[torch.Tensor], torch.Tensor], data: torch.Tensor) -> torch.Tensor:
    """View memory of exactly the tensor's size from the GPU."""
    return original(pinned_memory.copy_to_host(data))


def _allocate_exact_storage(original: Callable[[Any], None], offloader: Any) -> None:
    """Allocate exact memory for a parameter whose data is on the GPU."""
    data = offloader._param.data
    if offloader._cpu_storage is None and data.device.type != "cpu":
        offloader._cpu_storage = pinned_memory.allocate_like(data)
    original(offloader)


def _offload_absmax(original: Callable[[Any], None], offloader: Any) -> None:
    """Register absmax as a parameter, so that prefetch offloads it with its weight."""
    for layer in offloader.module_offloaders:
        present = dict(layer.module.named_parameters())  # the load removed some
        for name, parameter in present.items():
            states = getattr(parameter, "bnb_quant_state", None)
            for number, state in states.items() if isinstance(states, dict) else ():  # experts have one, dequantized
                owner, absmax = name.rpartition(".")[0], f"absmax_{number}"
                state.absmax = nn.Parameter(state.absmax, requires_grad=False)
                layer.module.get_submodule(owner).register_parameter(absmax, state.absmax)
                path = f"{owner}.{absmax}".lstrip(".")
                layer._param_offloaders[path] = _CpuParamOffloader(layer.module, path)
    original(offloader)


def _keep_absmax_quantized(original: Callable[[Any, Any], Any], loader: Any, states: Any) -> Any:
    """Keep absmax quantized with prefetch; that of experts, whose states are stacked, is dequantized as before."""
    if isinstance(states, dict) and isinstance(get_offloader(), PrefetchOffloader):
        return states
    return original(loader, states)


def _load_model(original: Callable[..., nn.Module], loader: Any, vllm_config: Any, model_config: Any,
                prefix: str = "") -> nn.Module:
    """Offload the embedding of a loaded model on request, free unused host memory, and report quantization state."""
    model = original(loader, vllm_config, model_config, prefix)
    config = vllm_config.additional_config.get("shoehorn") if isinstance(vllm_config.additional_config, dict) else None
    if config and config.get("embedding") == "host" and (
            config.keys() & {"experts", "hybrid"} or not isinstance(get_offloader(), NoopOffloader)):
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
                _offload_embedding(module)
        torch.accelerator.empty_cache()
    if isinstance(get_offloader(), UVAOffloader):
        torch.accelerator.empty_host_cache()  # memory that weights were read into
    quant_state.report(model)
    return model


def _offload_embedding(embedding: nn.Module) -> None:
    for parameter in embedding.parameters(recurse=False):
        if parameter.dim() == 2:
            view = loading.get_accelerator_view_from_cpu_tensor  # type: ignore[attr-defined]  # the patched one
            parameter.data = view(parameter.data)


def _load_draft_without_offload(original: Callable[[Any, nn.Module], None], speculator: Any, target: nn.Module) -> None:
    offloader = get_offloader()
    set_offloader(None)
    try:
        original(speculator, target)
    finally:
        set_offloader(offloader)


PATCHES = (
    Patch(_CpuParamOffloader, "_offload_to_cpu_internal", _offload_parameter),
    Patch(loading, "device_loading_context", _repack_in_place),
    Patch(uva, "get_accelerator_view_from_cpu_tensor", _view_exact_copy),
    Patch(loading, "get_accelerator_view_from_cpu_tensor", _view_exact_copy),
    Patch(_CpuParamOffloader, "_update_cpu_storage_from_param", _allocate_exact_storage),
    Patch(PrefetchOffloader, "post_init", _offload_absmax),
    Patch(BitsAndBytesModelLoader, "_dequantize_dq", _keep_absmax_quantized),
    Patch(BaseModelLoader, "load_model", _load_model),
    Patch(DraftModelSpeculator, "load_model", _load_draft_without_offload),
)
