"""The experts of a model in host memory, whatever their format: what the methods of INT4 and MXFP4 share.

With `--additional-config {"shoehorn": {"experts": {"slots": S, ...}}}` (`expert_cache.CacheOptions`) the experts of
every layer stay in pinned host memory, S of each layer have a copy on the GPU, and absent ones are copied there or
computed on the CPU. Without it vLLM's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.utils import replace_parameter

from shoehorn_vllm.hybrid import host_weights
from shoehorn_vllm.hybrid.expert_cache import CacheOptions, ExpertCache
from shoehorn_vllm.hybrid.expert_sharing import Sharing
from shoehorn_vllm.hybrid.expert_store import ExpertStore
from shoehorn_vllm.hybrid.expert_waves import Waves
from shoehorn_vllm.hybrid.kernel import products
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights
from shoehorn_vllm.telemetry.expert_lookups import Lookups

Kernel = Callable[[Mapping[str, torch.Tensor]], Any]
"""The engine's kernel for experts on the GPU, by their tensors' names."""


class UnsupportedExpertsError(RuntimeError):
    """The experts have a form that the cache does not serve."""


@dataclass(frozen=True)
class Names:
    """Parameters of the engine's layer.

    Attributes:
        up, down: codes and scales of both products; biases: of both, or nothing.
    """

    up: tuple[str, str]
    down: tuple[str, str]
    biases: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All names, in the order in which an expert has them in host memory."""
        return (*self.up, *self.down, *self.biases)


@dataclass
class _Model:
    """Parts that layers with the same shapes of experts share."""

    waves: Waves
    scratch_kernel: Any


_models: dict[tuple[tuple[int, ...], ...], _Model] = {}
_sharing: list[Sharing] = []
_lookups: list[Lookups] = []


def options() -> CacheOptions | None:
    """The cache's options of the model that is being built; None where it has none."""
    additional = get_current_vllm_config().additional_config
    own = additional.get("shoehorn") if isinstance(additional, dict) else None
    experts = own.get("experts") if isinstance(own, dict) else None
    if not isinstance(experts, dict):
        return None
    known = {field.name for field in fields(CacheOptions)}
    return CacheOptions(**{name: int(value) for name, value in experts.items() if name in known})


def refuse(what: str) -> UnsupportedExpertsError:
    """The error for experts that are not supported."""
    return UnsupportedExpertsError(f"{what}: not supported in host memory. Remove `experts` from --additional-config.")


class HostedExperts:
    """The experts of one layer.

    Args:
        layer: whose parameters exist on the meta device; they are replaced by views of host memory.
        activation: of the engine, by its name.
    """

    def __init__(self, layer: Any, names: Names, cache_options: CacheOptions, activation: str) -> None:
        self._names, self._options, self._activation = names, cache_options, activation
        if cache_options.computed and activation not in products.ACTIVATIONS:
            raise refuse(f"Experts with activation {activation} on the CPU")
        parameters = {name: layer.get_parameter(name) for name in names.all}
        self._store = ExpertStore(parameters)
        for name, old in parameters.items():
            new = torch.nn.Parameter(self._store.view(name), requires_grad=False)
            new.__dict__.update(old.__dict__)  # the engine's loader of this parameter
            layer.register_parameter(name, new)

    def finish(self, layer: Any, kernel: Kernel, top_k: int) -> None:
        """Fill the slots, once the weights are loaded.

        Args:
            kernel: makes the engine's kernel.
            top_k: experts that a token chooses.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        store, own = self._store, self._options
        host_weights.add(store.data.nbytes)
        key = tuple(part.shape for part in store.parts.values())
        if key not in _models:
            waves = Waves(store, own.scratch, device)
            _models[key] = _Model(waves, kernel(waves.scratch))
        self._model = _models[key]
        if own.computed and not _sharing:
            _sharing.append(Sharing(own.computed, top_k, own.fills, device))
            host_weights.when_loaded(_sharing[0].start)
        for sharing in _sharing:
            sharing.add_weights(self._host_weights())
        if not _lookups:
            _lookups.append(Lookups("cpu" if own.computed else "pcie"))
            host_weights.when_loaded(_lookups[0].start)
        self._cache = ExpertCache(store, own, _lookups[0].row(), self._model.waves, next(iter(_sharing), None), device)
        self._kernel = kernel(self._cache.tensors)
        for name in self._names.all:
            replace_parameter(layer, name, self._cache.tensors[name])

    def _host_weights(self) -> ExpertWeights:
        view, biases = self._store.view, self._names.biases
        up, down = (products.PackedWeights(*(view(name) for name in pair)) for pair in (
            self._names.up, self._names.down))
        up_bias, down_bias = (view(name) for name in biases) if biases else (None, None)
        return ExpertWeights(up, down, self._activation, up_bias, down_bias)

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
              shared_experts: Any, shared_experts_input: torch.Tensor | None) -> torch.Tensor:
        """The layer's output, from the GPU's experts, and those that are copied or computed on the CPU."""

        def run(tokens: slice, choices: torch.Tensor, mapping: torch.Tensor | None, experts: int,
                scratch: bool) -> torch.Tensor:
            kernel = self._model.scratch_kernel if scratch else self._kernel
            tensors = self._model.waves.scratch if scratch else self._cache.tensors
            shared = not scratch and shared_experts is not None
            result: torch.Tensor = kernel.apply(
                x[tokens], tensors[self._names.up[0]], tensors[self._names.down[0]],
                topk_weights=topk_weights[tokens], topk_ids=choices, activation=layer.activation,
                global_num_experts=experts, expert_map=mapping,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts if shared else None,
                shared_experts_input=shared_experts_input[tokens] if shared and shared_experts_input is not None
                else None)
            return result

        host_x, host_router = x, topk_weights
        if layer.apply_router_weight_on_input and self._options.computed:  # of one expert a token
            host_x, host_router = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return self._cache.run(host_x, topk_ids, host_router, run)
