"""The estimate against what was measured on an H200 with vLLM 0.32.0, and the rules that no measurement covers yet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured as captured_models
from fakes.checkpoint_files import checkpoint, dense
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Gpu
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import ModelShape
from shoehorn.planner import throughput
from shoehorn.planner.memory.activations import activations_bytes, compiling_bytes, unpacked_bytes
from shoehorn.planner.memory.estimate import CONTEXT_BYTES, MARGIN_BYTES, estimate, host_bytes, kv_bytes, kv_tokens
from shoehorn.planner.memory.fit import missing_bytes
from shoehorn.planner.memory.offload import offloaded_bytes, pinned_bytes
from shoehorn.planner.memory.weights import stage_share
from shoehorn.planner.serving_config import Choices
from shoehorn.planner.throughput import moved_bytes

GIB = 1 << 30
H200 = Gpu(0, "", "NVIDIA H200", 140 * GIB, 140 * GIB, (9, 0), 5, 16, False)


@pytest.fixture(scope="module")
def shape_70b() -> ModelShape:
    return checkpoints.read(captured_models.files("deepseek-r1-distill-llama-70b"))


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


def choices(**changes: object) -> Choices:
    """A small start on a card of 140 GiB."""
    plain = Choices(limit_bytes=140 * GIB, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512, eager=True)
    return replace(plain, **changes)


def model_gib(shape: ModelShape, chosen: Choices) -> float:
    """What vLLM logs as `Model loading took`."""
    [parts] = estimate(shape, chosen)
    return (parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes) / GIB


def test_nf4_70b_offloaded_by_the_stock_plugin_matches_the_measurement(shape_70b: ModelShape) -> None:
    chosen = choices(quantization="bitsandbytes", offload_bytes=60 * GIB)
    assert model_gib(shape_70b, chosen) == pytest.approx(7.93, rel=0.005)


def test_nf4_70b_resident_matches_the_measurement(shape_70b: ModelShape) -> None:
    assert model_gib(shape_70b, choices(quantization="bitsandbytes")) == pytest.approx(39.8, rel=0.005)


def test_int4_70b_resident_matches_the_measurement() -> None:
    assert model_gib(packed(8192, 28672, 80, 1024, 128256), choices()) == pytest.approx(36.8, rel=0.005)


def test_8b_resident_matches_the_measurements(shape_8b: ModelShape) -> None:
    assert model_gib(shape_8b, choices()) == pytest.approx(15.0, rel=0.005)
    assert model_gib(shape_8b, choices(quantization="bitsandbytes")) == pytest.approx(5.66, rel=0.005)


@pytest.mark.parametrize(("name", "measured_1", "measured_8"), [
    ("70b nf4 offloaded", 1.48, 6.5), ("70b nf4", 27, 73), ("70b int4", 50, 394), ("8b bf16", 204, 1690),
    ("8b nf4", 183, 668),
])
def test_expected_speed_is_near_the_measured(shape_70b: ModelShape, shape_8b: ModelShape, name: str, measured_1: float,
                                             measured_8: float) -> None:
    shape, chosen = {"70b nf4 offloaded": (shape_70b, choices(quantization="bitsandbytes", offload_bytes=60 * GIB)),
                     "70b nf4": (shape_70b, choices(quantization="bitsandbytes", eager=False)),
                     "70b int4": (packed(8192, 28672, 80, 1024, 128256), choices(eager=False)),
                     "8b bf16": (shape_8b, choices(eager=False)),
                     "8b nf4": (shape_8b, choices(quantization="bitsandbytes", eager=False))}[name]
    found = throughput.expected(shape, chosen, H200)
    assert found["batch_1"] == pytest.approx(measured_1, rel=0.1)
    assert found["batch_8"] == pytest.approx(measured_8, rel=0.15 if name != "70b nf4 offloaded" else 0.18)


def test_a_pass_is_never_faster_than_the_link(shape_70b: ModelShape) -> None:
    chosen = choices(quantization="bitsandbytes", offload_bytes=60 * GIB)
    found = throughput.expected(shape_70b, chosen, H200)["batch_1"]
    assert found is not None
    assert found < 55.4e9 / offloaded_bytes(shape_70b, chosen)


def test_an_unknown_card_has_no_expectation_unless_the_link_decides(shape_8b: ModelShape) -> None:
    card = replace(H200, name="Voodoo 2")
    assert throughput.expected(shape_8b, choices(), card) == {"batch_1": None, "batch_8": None}
    offloaded = throughput.expected(shape_8b, choices(offload_bytes=60 * GIB), card)["batch_1"]
    assert offloaded is not None
    assert offloaded < 55.4e9 / (13 * GIB)


@pytest.mark.parametrize(("name", "bandwidth", "link"), [
    ("NVIDIA GeForce RTX 3060 Ti", 448e9, (4, 16)), ("NVIDIA GeForce RTX 4060", 272e9, (4, 8)),
    ("RTX5090", 1792e9, (5, 16)), ("NVIDIA L40S", 864e9, (4, 16)), ("NVIDIA L4", 300e9, (4, 16)),
    ("Tesla T4", 320e9, (3, 16)), ("NVIDIA H100 80GB HBM3", 3350e9, (5, 16)), ("NVIDIA A10", 600e9, (4, 16)),
    ("RTX A5000", None, (0, 0)), ("", None, (0, 0)),
])
def test_cards_are_known_by_name(name: str, bandwidth: float | None, link: tuple[int, int]) -> None:
    assert gpu_specs.memory_bandwidth(name) == bandwidth
    assert gpu_specs.typical_pcie(name) == link


def test_an_unknown_link_is_taken_as_generation_4_and_lanes_count() -> None:
    assert gpu_specs.host_to_device_bandwidth(replace(H200, pcie_generation=0)) == (25e9, False)
    assert gpu_specs.host_to_device_bandwidth(replace(H200, pcie_generation=3, pcie_width=8)) == (6.15e9, True)


def test_the_parts_add_up_and_the_cache_takes_what_is_left(shape_8b: ModelShape) -> None:
    [parts] = estimate(shape_8b, choices(limit_bytes=24 * GIB))
    assert parts.total_bytes == sum(size for key, size in parts.to_json().items()
                                    if key not in ("total_bytes", "limit_bytes"))
    block = 16 * 131_072
    assert 0 <= parts.limit_bytes - MARGIN_BYTES - parts.total_bytes < block
    assert parts.kv_cache_bytes % block == 0


def test_when_nothing_is_left_the_cache_is_empty_and_the_excess_shows(shape_8b: ModelShape) -> None:
    [parts] = estimate(shape_8b, choices(limit_bytes=10 * GIB))
    assert parts.kv_cache_bytes == 0
    assert parts.total_bytes > parts.limit_bytes


def test_the_cache_of_a_token_is_as_published(shape_70b: ModelShape) -> None:
    for changes, per_token in (({}, 327_680), ({"kv_dtype_bytes": 1}, 163_840), ({"tensor_parallel": 2}, 163_840),
                               ({"tensor_parallel": 16}, 40_960)):  # at 16 one head each, copied
        chosen = choices(max_model_len=16, **changes)
        assert kv_bytes(shape_70b, chosen) == 16 * per_token
        assert kv_tokens(shape_70b, chosen, 1000 * 16 * per_token) == 16_000
    assert kv_bytes(shape_70b, choices(max_model_len=17)) == 32 * 327_680


def test_two_gpus_halve_what_is_split_and_copy_the_rest(shape_70b: ModelShape) -> None:
    one, two = (estimate(shape_70b, choices(quantization="bitsandbytes", tensor_parallel=count))[0] for count in (1, 2))
    assert two.quant_state_bytes * 2 == one.quant_state_bytes
    assert two.embeddings_bytes * 2 == one.embeddings_bytes
    assert two.framework_bytes > one.framework_bytes
    assert two.weights_bytes > one.weights_bytes // 2  # norms and the rotary table are whole


def test_offload_never_moves_more_than_there_is(shape_8b: ModelShape) -> None:
    assert offloaded_bytes(shape_8b, choices(offload_bytes=60 * GIB)) == 32 * 218_103_808 * 2
    assert offloaded_bytes(shape_8b, choices(offload_bytes=GIB)) == GIB


def test_nf4_state_stays_on_the_card_when_the_weights_leave(shape_70b: ModelShape) -> None:
    chosen = choices(quantization="bitsandbytes")
    gone = replace(chosen, offload_bytes=60 * GIB)
    assert estimate(shape_70b, gone)[0].quant_state_bytes == 4_278_190_080
    assert estimate(shape_70b, chosen)[0].quant_state_bytes == 4_278_190_080


def test_prefetch_holds_buffers_and_offloads_the_last_of_each_group(shape_70b: ModelShape) -> None:
    everything = choices(quantization="bitsandbytes", prefetch=(1, 1, 2))
    [parts] = estimate(shape_70b, everything)
    codes, absmax = 68_451_041_280 // 2, 68_451_041_280 // 64 * 65 // 64
    assert parts.offload_buffer_bytes == 2 * ((codes + absmax) // 80)
    assert parts.quant_state_bytes == 0, "absmax stays nested and travels with the weights"
    assert offloaded_bytes(shape_70b, everything) == codes + absmax
    assert offloaded_bytes(shape_70b, replace(everything, prefetch=(8, 2, 1))) == (codes + absmax) // 4


def test_pinned_memory_is_what_is_offloaded(shape_70b: ModelShape) -> None:
    chosen = choices(quantization="bitsandbytes", offload_bytes=60 * GIB)
    assert pinned_bytes(shape_70b, chosen) == offloaded_bytes(shape_70b, chosen) == 68_451_041_280 // 2
    with_embedding = replace(chosen, embedding_on_host=True)
    assert pinned_bytes(shape_70b, with_embedding) == 68_451_041_280 // 2 + 128256 * 8192 * 2
    halves = replace(with_embedding, tensor_parallel=2)
    assert pinned_bytes(shape_70b, halves) == pinned_bytes(shape_70b, with_embedding)
    assert pinned_bytes(shape_70b, replace(chosen, offload_bytes=0)) == 0
    assert host_bytes(shape_70b, chosen) > pinned_bytes(shape_70b, chosen)


def test_a_prequantized_nf4_checkpoint_gets_its_state_as_fp32() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    shape = checkpoints.read(checkpoint({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "vocab_size": 64, "intermediate_size": 128, "max_position_embeddings": 64,
        "quantization_config": {"quant_method": "bitsandbytes"}},
        {name: ("U8", [4096, 1]), f"{name}.absmax": ("U8", [128]), f"{name}.nested_absmax": ("F32", [1])}))
    [parts] = estimate(shape, choices())
    assert parts.quant_state_bytes == 128 * 4
    assert parts.weights_bytes == 4096 + 64 * 64 * 2


def test_what_is_not_dense_is_counted_unquantized(shape_8b: ModelShape) -> None:
    strange = replace(shape_8b, architecture="StrangeForCausalLM")
    [parts] = estimate(strange, choices(quantization="bitsandbytes"))
    assert parts.quant_state_bytes == 0
    assert parts.weights_bytes > 12 * GIB


def test_fp32_checkpoints_are_held_in_the_chosen_format() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 1, "vocab_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    sizes = [estimate(checkpoints.read(checkpoint(config, {"model.layers.0.mlp.up_proj.weight": (dtype, [128, 64])})),
                      choices())[0].weights_bytes for dtype in ("F32", "BF16")]
    assert sizes[0] == sizes[1]


def test_graphs_cost_only_where_they_are_made_and_by_their_number(shape_8b: ModelShape) -> None:
    assert estimate(shape_8b, choices())[0].cuda_graphs_bytes == 0
    few, many = (estimate(shape_8b, choices(eager=False, max_num_seqs=count))[0].cuda_graphs_bytes
                 for count in (2, 256))
    assert few == 3 * 32 * (192 << 10)  # 1, 2 and 4
    assert many == 51 * 32 * (192 << 10)
    [divided, _] = estimate(shape_8b, choices(eager=False, max_num_seqs=2, tensor_parallel=2))
    assert divided.cuda_graphs_bytes == 3 * 32 * (832 << 10), "NCCL keeps memory for each sum in a graph"


def test_compiling_needs_a_copy_of_the_embedding_before_the_cache_is_made(shape_8b: ModelShape) -> None:
    assert compiling_bytes(shape_8b, choices()) == 0
    assert compiling_bytes(shape_8b, choices(eager=False)) == (128256 + 512) * 4096 * 2
    tight = choices(eager=False, limit_bytes=17 * GIB, max_num_seqs=1, max_num_batched_tokens=512)
    parts = estimate(shape_8b, tight)[0]
    assert parts.total_bytes <= tight.limit_bytes
    assert missing_bytes(shape_8b, tight) < 0 < missing_bytes(shape_8b, replace(tight, limit_bytes=16_900 << 20))


def test_a_mixture_reads_only_the_experts_that_some_token_passes() -> None:
    shape = checkpoints.read(captured_models.files("qwen3-30b-a3b"))
    sizes = [moved_bytes(shape, choices(eager=False), requests)[1] for requests in (1, 8, 256)]
    assert sizes[0] < 8 * GIB < sizes[1] < sizes[2] < shape.weights_bytes
    assert activations(shape, 2048) > 2048 * 8 * 768 * 2


def activations(shape: ModelShape, tokens: int) -> int:
    return estimate(shape, choices(max_num_batched_tokens=tokens))[0].activations_bytes


def test_a_compressed_cache_is_small_and_its_projections_are_held_twice() -> None:
    shape = checkpoints.read(captured_models.files("deepseek-v2-lite-chat"))
    assert kv_bytes(shape, choices(max_model_len=16)) == 16 * 27 * 576 * 2
    assert shape.absorbed_parameters == 27 * 512 * 16 * 256
    [parts] = estimate(shape, choices())
    assert (parts.weights_bytes + parts.embeddings_bytes) / GIB == pytest.approx(29.32, rel=0.01)  # measured


def test_a_draft_model_takes_its_weights_and_its_cache(shape_70b: ModelShape, shape_8b: ModelShape) -> None:
    plain, drafted = choices(quantization="bitsandbytes"), choices(quantization="bitsandbytes", draft=shape_8b)
    [without], [with_draft] = estimate(shape_70b, plain), estimate(shape_70b, drafted)
    own = choices(quantization="bitsandbytes", eager=True)
    [alone] = estimate(shape_8b, own)
    assert with_draft.weights_bytes - without.weights_bytes == \
        alone.weights_bytes + alone.quant_state_bytes + alone.embeddings_bytes, "in NF4, as the model is"
    assert kv_bytes(shape_70b, drafted) - kv_bytes(shape_70b, plain) == kv_bytes(shape_8b, plain)


def test_a_pipeline_gives_each_stage_its_layers_the_first_the_embedding_and_the_last_the_head(
        shape_70b: ModelShape) -> None:
    chosen = choices(quantization="bitsandbytes", pipeline_parallel=2)
    first, last = estimate(shape_70b, chosen)
    [whole] = estimate(shape_70b, choices(quantization="bitsandbytes"))
    assert first.embeddings_bytes + last.embeddings_bytes == whole.embeddings_bytes
    assert first.quant_state_bytes + last.quant_state_bytes == whole.quant_state_bytes
    assert [stage_share(replace(shape_70b, layers=10), choices(pipeline_parallel=4), stage) for stage in range(4)] == [
        0.2, 0.3, 0.3, 0.2]


def test_activations_grow_with_batch_sequences_and_nf4(shape_8b: ModelShape) -> None:
    def activations(**changes: object) -> int:
        return estimate(shape_8b, choices(**changes))[0].activations_bytes

    assert activations(max_num_batched_tokens=8192) > 10 * activations()
    assert activations(max_num_batched_tokens=512, max_num_seqs=256) > activations()
    assert activations(quantization="bitsandbytes") > activations() + 4096 * 14336 * 2
    assert activations(tensor_parallel=2) < activations()


def test_the_framework_grows_with_the_samplers_counts_and_with_gpus(shape_8b: ModelShape) -> None:
    def framework(**changes: object) -> int:
        return estimate(shape_8b, choices(**changes))[0].framework_bytes

    assert framework() > CONTEXT_BYTES
    assert framework(max_num_seqs=256) - framework() == 248 * 128256 * 4
    assert framework(tensor_parallel=2) > framework() < framework(quantization="bitsandbytes")


def test_on_the_cpu_the_host_holds_everything(shape_8b: ModelShape) -> None:
    needed = host_bytes(shape_8b, choices(kv_cache_bytes=GIB), on_cpu=True)
    assert shape_8b.weights_bytes + GIB < needed < shape_8b.weights_bytes + 4 * GIB


def test_the_sums_over_two_cards_take_their_time(shape_70b: ModelShape) -> None:
    def seconds(cards: int) -> float:
        return 1 / (throughput.expected(shape_70b, choices(eager=False, tensor_parallel=cards), H200)["batch_1"] or 0)

    one, two, four = seconds(1), seconds(2), seconds(4)
    assert one - two == pytest.approx(2 * (two - four) - 80 * 20e-6, rel=0.01), "the first step alone adds the sums"


def test_experts_in_nf4_are_unpacked_whole_in_every_pass() -> None:
    shape = checkpoints.read(captured_models.files("qwen3-30b-a3b"))
    nf4 = choices(quantization="bitsandbytes")
    layer = 128 * 3 * 2048 * 768 * 2
    assert unpacked_bytes(shape, nf4) == 48 * layer
    assert unpacked_bytes(shape, choices()) == 0
    assert unpacked_bytes(shape, replace(nf4, tensor_parallel=2)) == 24 * layer
    unpacked_linear = (512 + shape.hidden) * shape.intermediate * 2
    assert activations_bytes(shape, nf4) == activations_bytes(shape, choices()) + unpacked_linear + layer
    one = throughput.expected(shape, nf4, H200)["batch_1"]
    assert one is not None
    assert one < 4.38e12 / (48 * layer), "no faster than they can be written"
