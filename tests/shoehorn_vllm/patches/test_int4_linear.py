"""Choice of the INT4 kernel: which layers, which batches, and vLLM's kernel where ours cannot be compiled."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the engine imports calls some of it deprecated
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from shoehorn_vllm.int4 import decode, linear

pytestmark = [pytest.mark.contract,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # torch and vLLM


def layer(k: int = 8192, n: int = 10240, group: int = 128, **changed: object) -> MPLinearLayerConfig:
    fields = {"weight_type": scalar_types.uint4b8, "act_type": torch.bfloat16, "zero_points": False, **changed}
    return MPLinearLayerConfig((k, n), (k, n), group_size=group, **fields)  # type: ignore[arg-type]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Let vLLM's kernel fit; return the kernels that are compiled."""
    compiled: list[tuple[object, ...]] = []
    monkeypatch.setattr(MacheteLinearKernel, "can_implement", classmethod(lambda cls, c: (True, None)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(decode, "kernel", lambda *properties: compiled.append(properties))
    return compiled


def test_layers_of_other_formats_and_shapes_are_left_to_vllm(gpu: list[tuple[object, ...]]) -> None:
    for other in (layer(zero_points=True), layer(weight_type=scalar_types.uint8b128), layer(group=256), layer(group=-1),
                  layer(act_type=torch.float8_e4m3fn), layer(k=8192 + 64), layer(n=10240 + 32)):
        assert linear.MacheteDecodeLinearKernel.can_implement(other)[0] is False, other
    assert gpu == []
    for own in (layer(), layer(group=64), layer(group=32, k=192), layer(act_type=torch.float16), layer(n=128256)):
        assert linear.MacheteDecodeLinearKernel.can_implement(own) == (True, None), own
    assert {properties[0] for properties in gpu} == {decode.Layout.MACHETE}


@pytest.mark.parametrize("error", [OSError("Could not find any NVRTC library"), RuntimeError("NVRTC: failed")])
def test_vllms_kernel_is_used_where_ours_cannot_be_compiled(
        gpu: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(decode, "kernel", fail)
    assert linear.MacheteDecodeLinearKernel.can_implement(layer()) == (False, str(error))


@pytest.mark.parametrize(("rows", "own"), [(1, True), (8, True), (9, False), (512, False)])
def test_only_few_rows_take_our_kernel(monkeypatch: pytest.MonkeyPatch, rows: int, own: bool) -> None:
    called: list[str] = []

    def result(name: str, x: torch.Tensor) -> torch.Tensor:
        called.append(name)
        return torch.zeros(len(x), 64)

    kernel = SimpleNamespace(multiply=lambda x, *others: result("ours", x))
    monkeypatch.setattr(decode, "kernel", lambda *properties: kernel)
    monkeypatch.setattr(linear.operators, "machete_mm", lambda a, **others: result("machete", a), raising=False)
    monkeypatch.setattr(linear, "apply_gptq_marlin_linear", lambda input, **others: result("marlin", input))
    nothing, bias = torch.empty(0), torch.ones(64)
    for layout in decode.Layout:
        y = linear._multiply(torch.zeros(rows, 128), nothing, nothing, nothing, bias, 64, 128, layout.value)
        assert called[-1] == ("ours" if own else layout.value)
        assert bool(y.all()) == (not own and layout is decode.Layout.MACHETE), "only Machete adds no bias itself"


def test_work_is_divided_into_whole_blocks_where_few_are_idle() -> None:
    assert decode.blocks_of(264, 128, 128) == 256, "two for each of 128 times 64 columns"
    assert decode.blocks_of(264, 160, 128) == 264
    assert decode.blocks_of(264, 896, 128) == 264
    assert decode.blocks_of(264, 1, 2) == 2, "no block is without work"
