"""The engine plugin's mends of offload, each beside what the engine does without it."""

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
def test_a_weight_that_was_repacked_is_held_once(apply: Callable[[], None], patched: bool) -> None:
    if patched:
        apply()
    module = layer()
    own = _CpuParamOffloader(module, "weight")
    before = module.weight.data.data_ptr()
    module.weight.data = module.weight.data.flip(0).clone()  # what the engine's repacking does
    held = own._cpu_storage is not None and own._cpu_storage.data_ptr() == before
    assert held is not patched, "the engine lets go of it by itself: remove the patch"
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
def test_a_repacked_weight_goes_back_to_where_it_lay(apply: Callable[[], None], patched: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda data, target: data.clone())  # there is no card to move it to
    if patched:
        apply()
    module = layer()
    module.quant_method = Repacking()
    place = module.weight.data
    model = SimpleNamespace(word_embeddings_untied_by_checkpoint=False, quantization=None)
    loading.process_weights_after_loading(module, model, SimpleNamespace(type="card"))
    assert module.weight.tolist() == list(range(7, -1, -1))
    assert (place.tolist() == list(range(7, -1, -1))) is patched, "the engine uses the memory again: remove the patch"


@pytest.mark.parametrize("owner", [uva, loading])
def test_what_the_card_reads_in_place_lies_in_memory_of_its_size(apply: Callable[[], None], owner: Any,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    held, viewed = [], []

    def allocate_like(data: torch.Tensor) -> torch.Tensor:
        held.append(torch.empty_like(data))
        return held[0]

    monkeypatch.setattr(pinned_memory, "allocate_like", allocate_like)
    monkeypatch.setattr(owner, "get_accelerator_view_from_cpu_tensor", lambda data: viewed.append(data) or "view")
    apply()
    assert owner.get_accelerator_view_from_cpu_tensor(torch.arange(5)) == "view"
    assert viewed[0] is held[0]
    assert viewed[0].tolist() == list(range(5))


@pytest.mark.parametrize(("kind", "emptied"), [(uva.UVAOffloader, True), (PrefetchOffloader, False)])
def test_what_weights_were_pinned_in_on_their_way_is_given_back(apply: Callable[[], None], kind: type[BaseOffloader],
                                                                emptied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    monkeypatch.setattr(offload.BaseModelLoader, "load_model", lambda *arguments: nn.Module())
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: found.append(True))
    apply()
    set_offloader(kind.__new__(kind))
    try:
        offload.BaseModelLoader.load_model(SimpleNamespace(), SimpleNamespace(additional_config={}), None)
    finally:
        set_offloader(None)
    assert bool(found) is emptied


def test_a_weight_that_is_gone_after_the_load_is_left_out(apply: Callable[[], None]) -> None:
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
def test_absmax_stays_nested_where_layers_are_offloaded(apply: Callable[[], None], offloading: BaseOffloader,
                                                        patched: bool) -> None:
    if patched:
        apply()
    states = {0: nested()}
    BitsAndBytesModelLoader._dequantize_dq(SimpleNamespace(), states)
    assert states[0].nested is patched, "the loader leaves it nested by itself: remove the patch"
    single = nested()
    BitsAndBytesModelLoader._dequantize_dq(SimpleNamespace(), single)
    assert not single.nested, "experts are put together, which needs them unpacked"


def test_absmax_is_unpacked_where_nothing_is_offloaded(apply: Callable[[], None]) -> None:
    apply()
    states = {0: nested()}
    BitsAndBytesModelLoader._dequantize_dq(SimpleNamespace(), states)
    assert not states[0].nested


def test_absmax_travels_with_its_weight(apply: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
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
    linear.absmax_0.data = replacement  # what a static buffer of the card does
    assert state.absmax.data_ptr() == replacement.data_ptr(), "the kernel reads what was copied"


@pytest.mark.parametrize("patched", [True, False])
def test_a_draft_is_loaded_without_offload(apply: Callable[[], None], offloading: BaseOffloader, patched: bool,
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
    assert get_offloader() is offloading, "a draft that fails leaves the model's offload as it was"


@pytest.mark.parametrize(("wish", "moved"), [({"shoehorn": {"embedding": "host"}}, True), ({}, False),
                                             ({"shoehorn": {}}, False)])
def test_the_embedding_moves_where_that_is_asked_for(apply: Callable[[], None], offloading: BaseOffloader,
                                                     monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any],
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
    found = offload.BaseModelLoader.load_model(SimpleNamespace(), SimpleNamespace(additional_config=wish), None)
    assert found is model
    assert len(views) == moved
    assert float(model[0].weight[0, 0]) == (2 if moved else 1)
    assert float(model[1].weight[0, 0]) == 1, "the head is read whole in every pass, and stays"
