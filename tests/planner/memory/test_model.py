"""The memory model against measurements on an H200 with vLLM 0.32.0, and formulas that no measurement covers yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fakes import captured as captured_models
from fakes.checkpoint_files import checkpoint, dense
from shoehorn.hardware.types import Gpu
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import Experts, ModelShape
from shoehorn.planner import throughput
from shoehorn.planner.memory.device import DeviceMemory
from shoehorn.planner.memory.model import CONTEXT_BYTES, MARGIN_BYTES, MemoryModel
from shoehorn.planner.serving_config import CacheOptions, PrefetchOffload, UvaOffload
from shoehorn.planner.throughput import moved_bytes
from support.plans import GIB, configured

H200 = Gpu(0, "", "NVIDIA H200", 140 * GIB, 140 * GIB, (9, 0), 5, 16, False)


@pytest.fixture(scope="module")
def shape_70b() -> ModelShape:
    return captured_models.shape("deepseek-r1-distill-llama-70b")


@pytest.fixture(scope="module")
def shape_8b() -> ModelShape:
    return checkpoints.read(dense(4096, 14336, 32, 32, 8, 128256))


def packed(hidden: int, intermediate: int, layers: int, key_value: int, vocab: int) -> ModelShape:
    """A compressed-tensors W4A16 checkpoint with groups of 128, whose embedding and head are bf16."""
    linears = {"q_proj": (hidden, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden),
               "o_proj": (hidden, hidden), "gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden),
               "down_proj": (hidden, intermediate)}
    tensors: dict[str, tuple[str, list[int]]] = {}
    for layer in range(layers):
        for name, (rows, columns) in linears.items():
            where = f"model.layers.{layer}.self_attn.{name}."
            tensors |= {f"{where}weight_packed": ("I32", [rows, columns // 8]), f"{where}weight_shape": ("I64", [2]),
                        f"{where}weight_scale": ("BF16", [rows, columns // 128])}
    tensors |= {"model.embed_tokens.weight": ("BF16", [vocab, hidden]), "lm_head.weight": ("BF16", [vocab, hidden])}
    return checkpoints.read(checkpoint({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": key_value // 128,
        "head_dim": 128, "vocab_size": vocab, "max_position_embeddings": 131072,
        "quantization_config": {"quant_method": "compressed-tensors"}}, tensors))

ALL_BY_UVA = UvaOffload(60 * GIB)


def model(shape: ModelShape, **changes: Any) -> MemoryModel:
    """A small load on a GPU of 140 GiB, with changes."""
    return MemoryModel(shape, configured(**changes))


def memory(shape: ModelShape, **changes: Any) -> DeviceMemory:
    """Memory of the first GPU."""
    return model(shape, **changes).gpus[0]


def model_gib(shape: ModelShape, **changes: Any) -> float:
    """Size that vLLM logs as `Model loading took`."""
    gpu = memory(shape, **changes)
    return (gpu.weights_bytes + gpu.quant_state_bytes + gpu.embeddings_bytes) / GIB


def tokens_per_second(shape: ModelShape, gpu: Gpu = H200, **changes: Any) -> tuple[float, float]:
    """Expected rates for one request and for eight."""
    rates = throughput.expected(model(shape, **changes), gpu)
    assert rates["batch_1"] is not None
    assert rates["batch_8"] is not None
    return rates["batch_1"], rates["batch_8"]


def test_stock_nf4_70b_with_offload_matches_the_measurement(shape_70b: ModelShape) -> None:
    assert model_gib(shape_70b, nf4=True, offload=ALL_BY_UVA) == pytest.approx(7.93, rel=0.005)


def test_resident_nf4_70b_matches_the_measurement(shape_70b: ModelShape) -> None:
    assert model_gib(shape_70b, nf4=True) == pytest.approx(39.8, rel=0.005)


def test_resident_int4_70b_matches_the_measurement() -> None:
    assert model_gib(packed(8192, 28672, 80, 1024, 128256)) == pytest.approx(36.8, rel=0.005)


def test_resident_8b_matches_the_measurements(shape_8b: ModelShape) -> None:
    assert model_gib(shape_8b) == pytest.approx(15.0, rel=0.005)
    assert model_gib(shape_8b, nf4=True) == pytest.approx(5.66, rel=0.005)


@pytest.mark.parametrize(("name", "measured_1", "measured_8"), [
    ("70b nf4 offloaded", 1.48, 6.5), ("70b nf4", 27, 73), ("70b int4", 50, 394), ("8b bf16", 204, 1690),
    ("8b nf4", 183, 668),
])
def test_expected_rates_are_near_the_measured_ones(shape_70b: ModelShape, shape_8b: ModelShape, name: str,
                                                   measured_1: float, measured_8: float) -> None:
    shape, changes = {"70b nf4 offloaded": (shape_70b, {"nf4": True, "offload": ALL_BY_UVA}),
                      "70b nf4": (shape_70b, {"nf4": True, "eager": False}),
                      "70b int4": (packed(8192, 28672, 80, 1024, 128256), {"eager": False}),
                      "8b bf16": (shape_8b, {"eager": False}),
                      "8b nf4": (shape_8b, {"nf4": True, "eager": False})}[name]
    one, eight = tokens_per_second(shape, **changes)
    assert one == pytest.approx(measured_1, rel=0.1)
    assert eight == pytest.approx(measured_8, rel=0.15 if name != "70b nf4 offloaded" else 0.18)


def test_forward_pass_is_never_faster_than_pcie(shape_70b: ModelShape) -> None:
    offloaded = model(shape_70b, nf4=True, offload=ALL_BY_UVA).offloaded.bytes
    assert tokens_per_second(shape_70b, nf4=True, offload=ALL_BY_UVA)[0] < 55.4e9 / offloaded


def test_unknown_gpu_has_no_expectation_unless_pcie_decides(shape_8b: ModelShape) -> None:
    gpu = replace(H200, name="Voodoo 2")
    assert throughput.expected(model(shape_8b), gpu) == {"batch_1": None, "batch_8": None}
    assert tokens_per_second(shape_8b, gpu, offload=ALL_BY_UVA)[0] < 55.4e9 / (13 * GIB)


def test_parts_add_up_and_the_cache_takes_what_is_left(shape_8b: ModelShape) -> None:
    gpu = memory(shape_8b, limit_bytes=24 * GIB)
    assert gpu.total_bytes == sum(size for key, size in gpu.to_json().items()
                                  if key not in ("total_bytes", "limit_bytes"))
    block = 16 * 131_072
    assert 0 <= gpu.limit_bytes - MARGIN_BYTES - gpu.total_bytes < block
    assert gpu.kv_cache_bytes % block == 0


def test_cache_is_empty_when_nothing_is_left(shape_8b: ModelShape) -> None:
    gpu = memory(shape_8b, limit_bytes=10 * GIB)
    assert gpu.kv_cache_bytes == 0
    assert gpu.total_bytes > gpu.limit_bytes


def test_cache_of_a_token_has_the_published_size(shape_70b: ModelShape) -> None:
    fp8 = CacheOptions(kv_dtype_bytes=1)
    for changes, per_token in (({}, 327_680), ({"cache": fp8}, 163_840), ({"tensor": 2}, 163_840),
                               ({"tensor": 16}, 40_960)):  # at 16 one head each, copied
        short = model(shape_70b, max_model_len=16, **changes)
        assert short.kv_bytes() == 2 * 16 * per_token, "one block that the engine never uses"
        assert short.kv_tokens(1000 * 16 * per_token) == 16_000
    assert model(shape_70b, max_model_len=17).kv_bytes() == 3 * 16 * 327_680


def test_two_gpus_halve_what_is_divided_and_copy_the_rest(shape_70b: ModelShape) -> None:
    one, two = (memory(shape_70b, nf4=True, tensor=count) for count in (1, 2))
    assert two.quant_state_bytes * 2 == one.quant_state_bytes
    assert two.embeddings_bytes * 2 == one.embeddings_bytes
    assert two.framework_bytes > one.framework_bytes
    assert two.weights_bytes > one.weights_bytes // 2  # norms and the rotary table are whole
    assert [gpu.device for gpu in model(shape_70b, tensor=2, pipeline=2).gpus] == ["gpu0", "gpu1", "gpu2", "gpu3"]


def test_offload_never_moves_more_than_there_is(shape_8b: ModelShape) -> None:
    assert model(shape_8b, offload=ALL_BY_UVA).offloaded.bytes == 32 * 218_103_808 * 2
    assert model(shape_8b, offload=UvaOffload(GIB)).offloaded.bytes == GIB


def test_uva_leaves_the_quantization_state_on_the_gpu(shape_70b: ModelShape) -> None:
    assert memory(shape_70b, nf4=True, offload=ALL_BY_UVA).quant_state_bytes == 4_278_190_080
    assert memory(shape_70b, nf4=True).quant_state_bytes == 4_278_190_080


def test_prefetch_has_buffers_and_offloads_the_last_layers_of_each_group(shape_70b: ModelShape) -> None:
    everything = model(shape_70b, nf4=True, offload=PrefetchOffload(1, 1, 2))
    codes, absmax = 68_451_041_280 // 2, 68_451_041_280 // 64 * 65 // 64
    assert everything.gpus[0].offload_buffer_bytes == 2 * ((codes + absmax) // 80)
    assert everything.gpus[0].quant_state_bytes == 0, "absmax stays nested and belongs to the weights"
    assert everything.offloaded.bytes == codes + absmax
    quarter = model(shape_70b, nf4=True, offload=PrefetchOffload(8, 2, 1))
    assert quarter.offloaded.bytes == (codes + absmax) // 4


def test_pinned_memory_equals_the_offloaded_weights(shape_70b: ModelShape) -> None:
    offloads: dict[str, Any] = {"nf4": True, "offload": ALL_BY_UVA}
    plain = model(shape_70b, **offloads)
    assert plain.offloaded.pinned_bytes == plain.offloaded.bytes == 68_451_041_280 // 2
    with_embedding = model(shape_70b, **offloads, embedding_on_host=True)
    assert with_embedding.offloaded.pinned_bytes == 68_451_041_280 // 2 + 128256 * 8192 * 2
    halves = model(shape_70b, **offloads, embedding_on_host=True, tensor=2)
    assert halves.offloaded.pinned_bytes == with_embedding.offloaded.pinned_bytes
    assert model(shape_70b, nf4=True).offloaded.pinned_bytes == 0
    assert plain.host_beside_gpus().total_bytes > plain.host_beside_gpus().pinned_bytes


def test_nf4_checkpoint_gets_its_state_as_fp32() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    shape = checkpoints.read(checkpoint({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "vocab_size": 64, "intermediate_size": 128, "max_position_embeddings": 64,
        "quantization_config": {"quant_method": "bitsandbytes"}},
        {name: ("U8", [4096, 1]), f"{name}.absmax": ("U8", [128]), f"{name}.nested_absmax": ("F32", [1])}))
    gpu = memory(shape)
    assert gpu.quant_state_bytes == 128 * 4
    assert gpu.weights_bytes == 4096 + 64 * 64 * 2


def test_unknown_architecture_is_counted_unquantized(shape_8b: ModelShape) -> None:
    gpu = memory(replace(shape_8b, architecture="StrangeForCausalLM"), nf4=True)
    assert gpu.quant_state_bytes == 0
    assert gpu.weights_bytes > 12 * GIB


def test_fp32_checkpoint_is_held_in_the_chosen_dtype() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 1, "vocab_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    sizes = [memory(checkpoints.read(checkpoint(config, {"model.layers.0.mlp.up_proj.weight": (dtype, [128, 64])}))
                    ).weights_bytes for dtype in ("F32", "BF16")]
    assert sizes[0] == sizes[1]


def test_cuda_graphs_cost_by_their_number(shape_8b: ModelShape) -> None:
    assert memory(shape_8b).cuda_graphs_bytes == 0
    few, many = (memory(shape_8b, eager=False, max_num_seqs=count).cuda_graphs_bytes for count in (2, 256))
    assert few == 3 * 32 * (192 << 10)  # 1, 2 and 4
    assert many == 51 * 32 * (192 << 10)
    divided = memory(shape_8b, eager=False, max_num_seqs=2, tensor=2)
    assert divided.cuda_graphs_bytes == 3 * 32 * (832 << 10), "NCCL keeps memory for each sum in a graph"


def test_compilation_needs_a_copy_of_the_embedding(shape_8b: ModelShape) -> None:
    assert model(shape_8b).activations.compiling_bytes == 0
    assert model(shape_8b, eager=False).activations.compiling_bytes == (128256 + 512) * 4096 * 2
    tight: dict[str, Any] = {"eager": False, "max_num_seqs": 1, "max_num_batched_tokens": 512}
    fits, lacks = (model(shape_8b, **tight, limit_bytes=limit) for limit in (17 * GIB, 16_900 << 20))
    assert fits.gpus[0].total_bytes <= 17 * GIB
    assert fits.missing_bytes() < 0 < lacks.missing_bytes()


def test_mixture_reads_only_the_experts_that_some_token_passes() -> None:
    shape = captured_models.shape("qwen3-30b-a3b")
    sizes = [moved_bytes(model(shape, eager=False), requests)[1] for requests in (1, 8, 256)]
    assert sizes[0] < 8 * GIB < sizes[1] < sizes[2] < shape.weights_bytes
    assert memory(shape, max_num_batched_tokens=2048).activations_bytes > 2048 * 8 * 768 * 2


def test_compressed_cache_is_small_and_its_projections_are_held_twice() -> None:
    shape = captured_models.shape("deepseek-v2-lite-chat")
    assert model(shape, max_model_len=16).kv_bytes() == 2 * 16 * 27 * 576 * 2
    assert shape.absorbed_parameters == 27 * 512 * 16 * 256
    assert model_gib(shape) == pytest.approx(29.32, rel=0.01)  # measured


def test_draft_model_takes_its_weights_and_its_cache(shape_70b: ModelShape, shape_8b: ModelShape) -> None:
    plain, drafted = model(shape_70b, nf4=True), model(shape_70b, nf4=True, draft=shape_8b)
    alone = model(shape_8b, nf4=True)
    assert drafted.gpus[0].weights_bytes - plain.gpus[0].weights_bytes == sum(
        (alone.gpus[0].weights_bytes, alone.gpus[0].quant_state_bytes, alone.gpus[0].embeddings_bytes)), \
        "in NF4, as the model is"
    assert drafted.kv_bytes() - plain.kv_bytes() == alone.kv_bytes()


def test_pipeline_stages_share_layers_and_the_ends_hold_the_embeddings(shape_70b: ModelShape) -> None:
    first, last = model(shape_70b, nf4=True, pipeline=2).gpus
    whole = memory(shape_70b, nf4=True)
    assert first.embeddings_bytes + last.embeddings_bytes == whole.embeddings_bytes
    assert first.quant_state_bytes + last.quant_state_bytes == whole.quant_state_bytes
    ten = model(replace(shape_70b, layers=10), pipeline=4).weights
    assert [ten.stage_layers(stage) for stage in range(4)] == [2, 3, 3, 2]


def test_activations_grow_with_batch_sequences_and_nf4(shape_8b: ModelShape) -> None:
    def activations(**changes: Any) -> int:
        return memory(shape_8b, **changes).activations_bytes

    assert activations(max_num_batched_tokens=8192) > 10 * activations()
    assert activations(max_num_batched_tokens=512, max_num_seqs=256) > activations()
    assert activations(nf4=True) > activations() + 4096 * 14336 * 2
    assert activations(tensor=2) < activations()


def test_framework_grows_with_the_samplers_counts_and_with_gpus(shape_8b: ModelShape) -> None:
    def framework(**changes: Any) -> int:
        return memory(shape_8b, **changes).framework_bytes

    assert framework() > CONTEXT_BYTES
    assert framework(max_num_seqs=256) - framework() == 248 * 128256 * 4
    assert framework(tensor=2) > framework() < framework(nf4=True)


def test_host_holds_everything_on_the_cpu(shape_8b: ModelShape) -> None:
    host = model(shape_8b, kv_cache_bytes=GIB).host_alone()
    assert host.device == "cpu"
    assert shape_8b.weights_bytes + GIB < host.total_bytes < shape_8b.weights_bytes + 4 * GIB
    assert host.kv_cache_bytes == GIB


def test_tensor_parallel_sums_take_their_time(shape_70b: ModelShape) -> None:
    one, two, four = (1 / tokens_per_second(shape_70b, eager=False, tensor=gpus)[0] for gpus in (1, 2, 4))
    assert one - two == pytest.approx(2 * (two - four) - 80 * 20e-6, rel=0.01), "the first step alone adds the sums"


def test_nf4_experts_are_unpacked_whole_in_every_pass() -> None:
    shape = captured_models.shape("qwen3-30b-a3b")
    nf4, plain = model(shape, nf4=True).activations, model(shape).activations
    layer = 128 * 3 * 2048 * 768 * 2
    assert nf4.unpacked_experts_bytes == 48 * layer
    assert plain.unpacked_experts_bytes == 0
    assert model(shape, nf4=True, tensor=2).activations.unpacked_experts_bytes == 24 * layer
    unpacked_linear = (512 + shape.hidden) * shape.intermediate * 2
    assert nf4.bytes(0) == plain.bytes(0) + unpacked_linear + layer
    assert tokens_per_second(shape, nf4=True)[0] < 4.38e12 / (48 * layer), "no faster than they can be written"


@pytest.mark.parametrize(("symmetric", "gpus", "further"), [(False, 2, 0), (False, 4, 300), (True, 4, 80)])
def test_experts_get_smaller_groups_where_gpus_divide_them_otherwise(symmetric: bool, gpus: int, further: int) -> None:
    shape = checkpoints.read(captured_models.files("qwen3-30b-a3b"))
    experts = Experts(128, 8, 768, group_size=128, scale_bytes=190 * GIB, zero_bytes=110 * GIB, symmetric=symmetric)
    plain, grouped = (model(replace(shape, quantization="awq", experts=each), tensor=gpus).weights.layers_bytes
                      for each in (shape.experts, experts))
    assert grouped - plain == pytest.approx(further * GIB / gpus, abs=GIB / 100)
