"""Patches of offload, each compared with the unpatched engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the engine imports calls some of it deprecated
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader import utils as loading
    from vllm.model_executor.offloader import uva
    from vllm.model_executor.offloader.base import BaseOffloader, NoopOffloader, get_offloader, set_offloader
    from vllm.model_executor.offloader.prefetch import PrefetchOffloader, _CpuParamOffloader
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
    from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

    from shoehorn_vllm.hybrid import host_weights
    from shoehorn_vllm.hybrid.offload_proof import OffloadUndoneError
    from shoehorn_vllm.patches import offload, pinned_memory

pytestmark = [pytest.mark.contract,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]




@pytest.fixture
def apply(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Apply the patches to an unpatched engine, whatever ran before in this process; undone after the test."""
    for patch in offload.PATCHES:
        patch.revert()
        monkeypatch.setattr(patch.owner, patch.name, getattr(patch.owner, patch.name))
    return offload.apply


@pytest.fixture
def offloading() -> Iterator[BaseOffloader]:
    """An offload by prefetch is on."""
    offloader = PrefetchOffloader.__new__(PrefetchOffloader)
    offloader.module_offloaders = []
    set_offloader(offloader)
    yield offloader
    set_offloader(None)


def layer() -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.arange(8.0), requires_grad=False))
    return module


@pytest.mark.parametrize("patched", [True, False])
def test_repacked_weight_is_in_memory_once(apply: Callable[[], None], patched: bool) -> None:
    if patched:
        apply()
    module = layer()
    own = _CpuParamOffloader(module, "weight")
    before = module.weight.data.data_ptr()
    module.weight.data = module.weight.data.flip(0).clone()  # as the engine's repacking does
    is_referenced = own._cpu_storage is not None and own._cpu_storage.data_ptr() == before
    assert is_referenced is not patched, "the engine frees it without the patch: remove the patch"
    own.sync_cpu_storage()
    assert own._cpu_storage is not None
    assert own._cpu_storage.tolist() == list(range(7, -1, -1))


class Repacking(QuantizeMethodBase):
    """Repacks a weight as kernels do: another tensor, of the same size."""

    def create_weights(self, *arguments: Any, **named: Any) -> None: ...

    def apply(self, *arguments: Any, **named: Any) -> Any: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(torch.arange(7.0, -1, -1), requires_grad=False)


@pytest.mark.parametrize("patched", [True, False])
def test_repacked_weight_replaces_the_original_in_place(apply: Callable[[], None], patched: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda data, target: data.clone())  # the test has no GPU
    if patched:
        apply()
    module = layer()
    module.quant_method = Repacking()
    place = module.weight.data
    model = SimpleNamespace(word_embeddings_untied_by_checkpoint=False, quantization=None)
    loading.process_weights_after_loading(module, model, SimpleNamespace(type="gpu"))
    assert module.weight.tolist() == list(range(7, -1, -1))
    assert (place.tolist() == list(range(7, -1, -1))) is patched, "the engine reuses the memory: remove the patch"


@pytest.mark.parametrize("owner", [uva, loading])
def test_view_from_the_gpu_has_memory_of_exact_size(apply: Callable[[], None], owner: Any,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    copies, viewed = [], []

    def allocate_like(data: torch.Tensor) -> torch.Tensor:
        copies.append(torch.empty_like(data))
        return copies[0]

    monkeypatch.setattr(pinned_memory, "allocate_like", allocate_like)
    monkeypatch.setattr(owner, "get_accelerator_view_from_cpu_tensor", lambda data: viewed.append(data) or "view")
    apply()
    assert owner.get_accelerator_view_from_cpu_tensor(torch.arange(5)) == "view"
    assert viewed[0] is copies[0]
    assert viewed[0].tolist() == list(range(5))


@pytest.mark.parametrize(("kind", "emptied"), [(uva.UVAOffloader, True), (PrefetchOffloader, False)])
def test_memory_of_the_load_is_freed(apply: Callable[[], None], kind: type[BaseOffloader],
                                                                emptied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[bool] = []
    monkeypatch.setattr(offload.BaseModelLoader, "load_model", lambda *arguments: nn.Module())
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: results.append(True))
    apply()
    set_offloader(kind.__new__(kind))
    try:
        offload.BaseModelLoader.load_model(SimpleNamespace(), SimpleNamespace(additional_config={}), None)
    finally:
        set_offloader(None)
    assert bool(results) is emptied


def test_removed_weight_is_ignored(apply: Callable[[], None]) -> None:
    apply()
    module = layer()
    own = _CpuParamOffloader(module, "weight")
    del module.weight
    own.sync_cpu_storage()
    assert own._param_deleted


def nested() -> Any:
    from bitsandbytes import functional

    _, state = functional.quantize_4bit(torch.randn(64, 64), blocksize=64, quant_type="nf4", compress_statistics=True)
    return state


@pytest.mark.parametrize("patched", [True, False])
def test_absmax_stays_quantized_with_offload(apply: Callable[[], None], offloading: BaseOffloader,
                                                        patched: bool) -> None:
    if patched:
        apply()
    states = {0: nested()}
    BitsAndBytesModelLoader._dequantize_dq(SimpleNamespace(), states)
    assert states[0].nested is patched, "the loader keeps it nested: remove the patch"
    single = nested()
    BitsAndBytesModelLoader._dequantize_dq(SimpleNamespace(), single)
    assert not single.nested, "experts are stacked, which requires dequantized states"


def test_absmax_is_dequantized_without_offload(apply: Callable[[], None]) -> None:
    apply()
    states = {0: nested()}
    BitsAndBytesModelLoader._dequantize_dq(SimpleNamespace(), states)
    assert not states[0].nested


def test_absmax_is_offloaded_with_its_weight(apply: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefetchOffloader, "post_init", lambda offloader: None)
    apply()
    module, linear, state = nn.Module(), layer(), nested()
    module.add_module("proj", linear)
    linear.weight.bnb_quant_state = {0: state}  # type: ignore[assignment]  # as the loader binds it
    experts = layer()
    module.add_module("experts", experts)
    experts.weight.bnb_quant_state = nested()  # type: ignore[assignment]  # likewise
    moved = SimpleNamespace(module=module, _param_offloaders={"proj.weight": _CpuParamOffloader(module, "proj.weight"),
                                                              "proj.k_scale": None})
    PrefetchOffloader.post_init(SimpleNamespace(module_offloaders=[moved]))
    assert set(moved._param_offloaders) == {"proj.weight", "proj.k_scale", "proj.absmax_0"}
    assert state.absmax is linear.absmax_0
    replacement = torch.zeros_like(state.absmax)
    linear.absmax_0.data = replacement  # as a static buffer of the GPU does
    assert state.absmax.data_ptr() == replacement.data_ptr(), "the kernel reads the copy"


@pytest.mark.parametrize("patched", [True, False])
def test_draft_model_is_loaded_without_offload(apply: Callable[[], None], offloading: BaseOffloader, patched: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(speculator: object, target: object) -> None:
        seen.append(get_offloader())
        raise RuntimeError("the draft cannot be loaded")

    monkeypatch.setattr(DraftModelSpeculator, "load_model", load)
    if patched:
        apply()
    with pytest.raises(RuntimeError):
        DraftModelSpeculator.load_model(SimpleNamespace(), nn.Module())
    assert isinstance(seen[0], NoopOffloader) is patched
    assert get_offloader() is offloading, "a failed draft model does not change the model's offload"


@pytest.mark.parametrize(("config", "moved"), [({"shoehorn": {"embedding": "host"}}, True), ({}, False),
                                             ({"shoehorn": {}}, False)])
def test_embedding_is_offloaded_on_request(apply: Callable[[], None], offloading: BaseOffloader,
                                                     monkeypatch: pytest.MonkeyPatch, config: dict[str, Any],
                                                     moved: bool) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    class Head(Embedding):
        pass

    views: list[torch.Tensor] = []

    def view(data: torch.Tensor) -> torch.Tensor:
        views.append(data)
        return data * 2

    model = nn.ModuleList([Embedding(), Head()])
    monkeypatch.setattr(offload, "VocabParallelEmbedding", Embedding)
    monkeypatch.setattr(offload, "ParallelLMHead", Head)
    monkeypatch.setattr(loading, "get_accelerator_view_from_cpu_tensor", view)
    monkeypatch.setattr(offload.BaseModelLoader, "load_model", lambda *arguments: model)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply()
    loaded = offload.BaseModelLoader.load_model(SimpleNamespace(), SimpleNamespace(additional_config=config), None)
    assert loaded is model
    assert len(views) == moved
    assert float(model[0].weight[0, 0]) == (2 if moved else 1)
    assert float(model[1].weight[0, 0]) == 1, "the head is read whole in every pass, and stays"


def test_load_that_leaves_offloaded_weights_on_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(additional_config={"shoehorn": {"experts": {"slots": 4}}})
    model, started = nn.Linear(2, 2), []
    with pytest.raises(OffloadUndoneError, match="option `experts`"):
        host_weights.PATCH.function(lambda loader, config: model, None, config)

    def load_into_host_memory(loader: object, config: object) -> nn.Module:
        host_weights.add(100)
        host_weights.when_loaded(lambda: started.append(1))
        return model

    monkeypatch.setattr(host_weights, "_sizes", [])
    assert host_weights.PATCH.function(load_into_host_memory, None, config) is model
    assert started == [1], "what waits for the load starts after it, once"

    offloader = uva.UVAOffloader(cpu_offload_max_bytes=1 << 30)
    offloader.cpu_offload_bytes = 1 << 20  # as vLLM counts them before the Humming backend repacks
    set_offloader(offloader)
    plain = SimpleNamespace(additional_config={})
    with pytest.raises(OffloadUndoneError, match="the engine's kernels moved them"):
        host_weights.PATCH.function(lambda loader, config: model, None, plain)
    offloader.cpu_offload_bytes = 24  # the model's own weights, which are in host memory here
    assert host_weights.PATCH.function(lambda loader, config: model, None, plain) is model
    set_offloader(NoopOffloader())
