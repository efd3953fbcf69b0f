"""Mends of the engine's offload: weights lie once in host memory, with all that belongs to them, and a draft stays.

Four defects of vLLM 0.32.0 (model_executor/offloader/, model_loader/utils.py) and vllm-bnb-plugin 0.0.3:
- until the load is over, prefetch keeps the memory that each weight was read into beside the memory that it was
  repacked into: 79 GB of host memory were pinned for a model of 35 GB. A repacked weight goes back to where it lay;
  and with UVA too it lies in memory that is no larger than the weight (`host_memory`);
- bitsandbytes' absmax is no parameter, so it stays on the card when its weights do not, and the loader unpacks it there
  from 8 to 32 bits, although bitsandbytes 0.50 works with the packed one: 4 GB for a 70B. With prefetch it stays packed
  and travels;
- a draft model is built by the same code as the model, so that UVA spends what is left of its bytes on the draft and
  prefetch fails ("wrap_modules should only be called once"). The draft stays on the card;
- the embedding is never offloaded, whatever the options say. With `--additional-config {"shoehorn": {"embedding":
  "host"}}` it lies in host memory, and the card reads the rows of the tokens at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from shoehorn_vllm.telemetry import quant_state


def apply() -> None:
    """Mend the offload of this process: functions of the engine are replaced."""
    for owner, name, mended in _MENDS:
        setattr(owner, name, mended)


def _move_out(offloader: Any) -> None:
    parameter = offloader._param
    parameter.data = pinned_memory.copied(parameter.data)
    offloader.offloaded_bytes = parameter.data.nbytes  # the parameter holds it, until it is repacked


@contextmanager
def _on_card(module: nn.Module, target: torch.device) -> Iterator[nn.Module]:
    places = {} if target.type == "cpu" else {
        name: parameter.data for name, parameter in module.named_parameters() if parameter.device.type == "cpu"}
    for name, parameter in module.named_parameters():
        if name in places:
            parameter.data = parameter.data.to(target)
    with engines_own[_on_card](module, target):
        yield module
    for name, parameter in module.named_parameters():
        if name in places:
            parameter.data = pinned_memory.copied(parameter.data, places.pop(name))


def _view(data: torch.Tensor) -> torch.Tensor:
    view: torch.Tensor = engines_own[_view](pinned_memory.copied(data))
    return view


def _update(offloader: Any) -> None:
    data = offloader._param.data
    if offloader._cpu_storage is None and data.device.type != "cpu":
        offloader._cpu_storage = pinned_memory.like(data)
    engines_own[_update](offloader)


def _end(offloader: Any) -> None:
    for layer in offloader.module_offloaders:
        present = dict(layer.module.named_parameters())  # some that were there at first are gone after the load
        for name, parameter in present.items():
            states = getattr(parameter, "bnb_quant_state", None)
            for number, state in states.items() if isinstance(states, dict) else ():  # experts have one, unpacked
                owner, own = name.rpartition(".")[0], f"absmax_{number}"
                state.absmax = nn.Parameter(state.absmax, requires_grad=False)
                layer.module.get_submodule(owner).register_parameter(own, state.absmax)
                path = f"{owner}.{own}".lstrip(".")
                layer._param_offloaders[path] = _CpuParamOffloader(layer.module, path)
    engines_own[_end](offloader)


def _unpack(loader: Any, states: Any) -> Any:
    """Experts, which come one by one, are unpacked as before: their states are put together."""
    if isinstance(states, dict) and isinstance(get_offloader(), PrefetchOffloader):
        return states
    return engines_own[_unpack](loader, states)


def _load(loader: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
    model: nn.Module = engines_own[_load](loader, vllm_config, model_config, prefix)
    own = vllm_config.additional_config.get("shoehorn") if isinstance(vllm_config.additional_config, dict) else None
    if own and own.get("embedding") == "host" and not isinstance(get_offloader(), NoopOffloader):
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
                _to_host(module)
        torch.accelerator.empty_cache()
    if isinstance(get_offloader(), UVAOffloader):
        torch.accelerator.empty_host_cache()  # what weights were in on their way
    quant_state.say(model)
    return model


def _to_host(embedding: nn.Module) -> None:
    for parameter in embedding.parameters(recurse=False):
        if parameter.dim() == 2:
            parameter.data = _view(parameter.data)


def _load_draft(speculator: Any, target: nn.Module) -> None:
    offloader = get_offloader()
    set_offloader(None)
    try:
        engines_own[_load_draft](speculator, target)
    finally:
        set_offloader(offloader)


_MENDS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (_CpuParamOffloader, "_offload_to_cpu_internal", _move_out), (loading, "device_loading_context", _on_card),
    (uva, "get_accelerator_view_from_cpu_tensor", _view), (loading, "get_accelerator_view_from_cpu_tensor", _view),
    (_CpuParamOffloader, "_update_cpu_storage_from_param", _update), (PrefetchOffloader, "post_init", _end),
    (BitsAndBytesModelLoader, "_dequantize_dq", _unpack), (BaseModelLoader, "load_model", _load),
    (DraftModelSpeculator, "load_model", _load_draft))
engines_own: dict[Callable[..., Any], Callable[..., Any]] = {
    mended: getattr(owner, name) for owner, name, mended in _MENDS}  # by what stands in for it
