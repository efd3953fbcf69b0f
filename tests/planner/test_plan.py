"""Plans: which source wins, what is worked out, and what stands in a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import captured as captured_models
from fakes.checkpoint_files import checkpoint
from shoehorn.common.errors import SettingsError
from shoehorn.config import settings
from shoehorn.deployment import inputs
from shoehorn.engine.environment import engine_environment
from shoehorn.int4.layout import Bits
from shoehorn.model import checkpoint as checkpoints
from shoehorn.planner import placement
from shoehorn.planner.build import ALLOCATOR, make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.memory.estimate import CONTEXT_BYTES, MARGIN_BYTES
from shoehorn.planner.plan import Plan
from support.plans import (
    CPU_ONLY,
    GIB,
    HUGE,
    LARGE,
    MIDDLE,
    SMALL,
    TWENTY,
    llama_8b,
    llama_70b,
    machine,
    plan_for,
    planned,
    quantized,
    reason,
    tiny,
)

# Precedence.


def test_extra_arguments_win_over_settings_and_settings_over_the_profile() -> None:
    plan = planned(machine(LARGE), llama_8b(), MAX_MODEL_LEN="4096", MAX_NUM_SEQS="16",
                   VLLM_EXTRA_ARGS="--max-num-seqs 4")
    assert plan.engine_args["max-model-len"] == 4096
    assert reason(plan, "max-model-len") == (4096, "setting", "MAX_MODEL_LEN")
    assert reason(plan, "max-num-seqs") == (4, "setting", "VLLM_EXTRA_ARGS instead of 16 (setting MAX_NUM_SEQS)")
    named = planned(machine(LARGE), llama_8b(), VRAM_PROFILE="32gb", MAX_NUM_SEQS="16")
    assert reason(named, "block-size") == (32, "profile", "32gb")
    assert reason(named, "max-num-seqs") == (16, "setting", "MAX_NUM_SEQS instead of 256 (profile 32gb)")


def test_every_option_has_one_reason() -> None:
    plan = planned(machine(MIDDLE), llama_70b(), SPECULATIVE="ngram", VLLM_EXTRA_ARGS="--seed 1")
    for option, value in plan.engine_args.items():
        assert reason(plan, option)[0] == value


def test_the_model_lowers_a_profiles_context_with_a_reason() -> None:
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu")
    assert reason(plan, "max-model-len") == (2048, "model", "the model's own limit; profile has 4096")


@pytest.mark.parametrize(("environment", "named"), [
    ({"MAX_MODEL_LEN": "4096"}, "MAX_MODEL_LEN"), ({"VLLM_EXTRA_ARGS": "--max-model-len 4k"}, "VLLM_EXTRA_ARGS"),
])
def test_a_context_beyond_the_model_is_refused_by_name(environment: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=f"^{named} asks for a context of 4.* limit is 2048") as caught:
        plan_for(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", **environment)
    assert "2048" in caught.value.remedy


def test_what_nobody_said_is_fixed_and_said(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("engine: {}\n")
    plan = planned(machine(HUGE), llama_8b(), VRAM_PROFILE=str(path))
    assert reason(plan, "max-model-len")[:2] == (131072, "machine")
    assert reason(plan, "max-num-seqs")[:2] == (256, "machine")
    assert reason(plan, "gpu-memory-utilization")[:2] == (0.92, "machine")


def test_more_sequences_than_batched_tokens_raise_the_batch() -> None:
    plan = planned(machine(SMALL), llama_8b(), VLLM_EXTRA_ARGS="--max-num-seqs 9 --max-num-batched-tokens 8")
    assert reason(plan, "max-num-batched-tokens")[:2] == (9, "machine")


def test_switches_of_the_settings_reach_the_engine() -> None:
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", SPECULATIVE="ngram", TRUST_REMOTE_CODE="yes")
    assert plan.engine_args["speculative-config"] == {
        "method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert plan.engine_args["trust-remote-code"] is True
    plain = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", SPECULATIVE="off")
    assert not {"speculative-config", "trust-remote-code", "quantization"} & set(plain.engine_args)


def test_a_profiles_environment_reaches_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("match: {device: cpu}\nenvironment: {OMP_NUM_THREADS: 2}\n")
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE=str(path))
    assert plan.engine_environment == {"OMP_NUM_THREADS": "2"}
    assert reason(plan, "kv-cache-memory-bytes")[:2] == (GIB, "machine")


def test_more_of_the_card_is_used_where_that_keeps_all_weights_on_it() -> None:
    shape = checkpoints.read(captured_models.converted("deepseek-r1-distill-llama-70b"))
    plan = planned(machine(TWENTY, TWENTY), shape)
    assert reason(plan, "gpu-memory-utilization") == (0.97, "machine", "with less, weights would lie in host memory")
    assert (plan.offloaded_bytes, plan.choices.max_model_len) == (0, 4096)
    assert all(parts.total_bytes <= parts.limit_bytes < 19.7 * GIB for parts in plan.vram)
    told = planned(machine(TWENTY, TWENTY), shape, VLLM_EXTRA_ARGS="--gpu-memory-utilization 0.92")
    assert told.offloaded_bytes
    assert planned(machine(TWENTY), shape).engine_args["gpu-memory-utilization"] == 0.92, "it would not be enough"


def test_fewer_cuda_graphs_are_made_rather_than_none() -> None:
    shape = checkpoints.read(captured_models.converted("deepseek-r1-distill-llama-70b"))
    card = (TWENTY[0], 21_023_948_800 / GIB)  # a modified RTX 3080, which has not quite 20 GiB
    plan = planned(machine(card, card), shape)
    assert plan.engine_args["enforce-eager"] is False
    assert reason(plan, "max-cudagraph-capture-size") == (
        4, "machine", "CUDA graphs for more requests at a time would take memory that is not there without offload")
    none = planned(machine(card, card), shape, VLLM_EXTRA_ARGS="--enforce-eager")
    one, eight = (tuple(float(each.expected_tokens_per_second[batch] or 0) for each in (plan, none))
                  for batch in ("batch_1", "batch_8"))
    assert one[0] > 1.5 * one[1] > 0
    assert eight[0] == pytest.approx(max(eight[1], one[0]), rel=0.05), "eight requests have no graph"
    fixed = planned(machine(card, card), shape, VLLM_EXTRA_ARGS="--max-cudagraph-capture-size 8")
    assert fixed.engine_args["enforce-eager"] is True, "what the user says is not changed, and does not fit with graphs"


# Quantization.


def test_quantization_none_takes_the_checkpoint_as_it_is() -> None:
    plan = planned(machine(MIDDLE), llama_8b(), QUANTIZATION="none")
    assert "quantization" not in plan.engine_args
    assert plan.vram[0].quant_state_bytes == 0
    assert reason(plan, "quantization")[1] == "setting"


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8"])
def test_a_quantized_checkpoint_is_left_alone_by_a_profile(method: str) -> None:
    assert "quantization" not in planned(machine(LARGE), quantized(method)).engine_args
    plan = planned(machine(LARGE), quantized(method), VRAM_PROFILE="32gb")
    assert "quantization" not in plan.engine_args
    assert reason(plan, "quantization")[1] == "model"
    assert method in reason(plan, "quantization")[2]


@pytest.mark.parametrize("environment", [
    {"QUANTIZATION": "bitsandbytes"}, {"VLLM_EXTRA_ARGS": "--quantization bitsandbytes"},
])
def test_nf4_of_an_awq_checkpoint_is_refused_by_both_names(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="bitsandbytes, but the checkpoint is quantized already, by awq") as caught:
        plan_for(machine(LARGE), quantized("awq"), **environment)
    assert next(iter(environment)) in caught.value.cause


def test_another_kernel_for_the_same_checkpoint_may_be_asked_for() -> None:
    plan = planned(machine(LARGE), quantized("awq"), VLLM_EXTRA_ARGS="--quantization awq_marlin")
    assert plan.engine_args["quantization"] == "awq_marlin"


def test_quantized_experts_on_a_cpu_need_its_matrix_instructions() -> None:
    lite = checkpoints.read(captured_models.converted("deepseek-v2-lite-chat", Bits(16, 16)))
    without = machine(ram=64)
    with pytest.raises(SettingsError, match="the engine needs AMX") as caught:
        plan_for(without, lite, VRAM_PROFILE="cpu")
    assert "QUANTIZATION=none" in caught.value.remedy
    plain = checkpoints.read(captured_models.files("deepseek-v2-lite-chat"))
    for hardware, shape in ((without, plain), (replace(without, amx=True), lite)):
        assert isinstance(plan_for(hardware, shape, VRAM_PROFILE="cpu"), Plan)


# The machine.


@pytest.mark.parametrize("profile", ["auto", "7gb", "2x20gb"])
def test_no_gpu_says_how_to_pass_one_in(profile: str) -> None:
    with pytest.raises(SettingsError, match="GPU") as caught:
        plan_for(CPU_ONLY, tiny(), VRAM_PROFILE=profile)
    assert "--gpus" in caught.value.remedy


def test_one_card_is_too_few_for_two() -> None:
    with pytest.raises(SettingsError, match="needs 2 GPUs"):
        plan_for(machine(LARGE), llama_8b(), VRAM_PROFILE="2x20gb")


def test_a_card_without_bf16_gets_float16_and_is_refused_what_needs_more() -> None:
    turing = captured_models.machine("t4-16-ram64")
    plan = planned(turing, llama_8b())
    assert reason(plan, "dtype") == ("float16", "machine", "Tesla T4 has no bfloat16")
    named = planned(turing, llama_8b(), VRAM_PROFILE="7gb")
    assert named.engine_args["dtype"] == "float16", "a profile's bfloat16 gives way"
    with pytest.raises(SettingsError, match=r"Tesla T4 has no bfloat16 \(compute capability 7.5\)"):
        plan_for(turing, llama_8b(), VLLM_EXTRA_ARGS="--dtype bfloat16")
    with pytest.raises(SettingsError, match="Gemma3ForConditionalGeneration is unstable in float16"):
        plan_for(turing, checkpoints.read(captured_models.files("gemma-3-12b-it")))


def test_what_an_earlier_start_had_to_step_down_to_holds_unless_the_user_says_otherwise() -> None:
    loaded = settings.load({"MAX_NUM_SEQS": "32"})
    hardware = machine(MIDDLE)
    stepped = {"max-num-seqs": 4, "max-num-batched-tokens": 256, "cpu-offload-gb": 3.0, "enforce-eager": True}
    plan = make_plan(PlanInputs(PlanSettings.of(loaded), hardware, inputs.select_profile(loaded, hardware), llama_8b(),
                                known_good=stepped))
    assert isinstance(plan, Plan)
    assert reason(plan, "max-num-seqs")[:2] == (32, "setting")
    assert reason(plan, "max-num-batched-tokens")[:2] == (256, "step-down")
    assert (plan.choices.offload_bytes, plan.choices.eager) == (3 * GIB, True)
    assert plan.fixed == {"max-num-seqs"}


def test_the_cache_is_fixed_unless_the_share_of_the_card_is() -> None:
    plan = planned(machine(MIDDLE), llama_8b())
    assert plan.engine_args["kv-cache-memory-bytes"] == plan.vram[0].kv_cache_bytes > GIB
    by_share = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS="--gpu-memory-utilization 0.8")
    assert "kv-cache-memory-bytes" not in by_share.engine_args


def test_a_small_card_gets_one_request_without_offload_rather_than_two_with_it() -> None:
    plan = planned(captured_models.machine("rtx4060-8-ram64"), llama_8b())
    assert not plan.offloaded_bytes
    assert plan.engine_args["max-model-len"] == 4096


def test_a_divided_card_is_refused() -> None:
    hardware = machine(LARGE)
    divided = replace(hardware, gpus=(replace(hardware.gpus[0], mig=True),))
    with pytest.raises(SettingsError, match="MIG"):
        plan_for(divided, tiny())


def test_a_limit_for_the_gpu_contradicts_the_cpu_profile() -> None:
    with pytest.raises(SettingsError, match="VRAM_LIMIT is set, but profile cpu"):
        plan_for(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", VRAM_LIMIT="7GiB")


@pytest.mark.parametrize("limit", [7, 10, 24])
def test_a_limit_is_never_exceeded_by_context_and_share_together(limit: int) -> None:
    plan = planned(machine(HUGE), llama_8b(), VRAM_LIMIT=f"{limit}GiB")
    share, source, text = reason(plan, "gpu-memory-utilization")
    assert isinstance(share, float)
    assert share * 139.8 * GIB + CONTEXT_BYTES <= limit * GIB
    assert (source, f"VRAM_LIMIT is {limit}.00 GiB" in text) == ("setting", True)
    assert plan.vram[0].total_bytes <= plan.vram[0].limit_bytes <= limit * GIB


def test_a_card_that_another_process_uses_gives_what_is_free() -> None:
    hardware = machine(LARGE)
    shared = replace(hardware, gpus=(replace(hardware.gpus[0], free_bytes=20 * GIB),))
    plan = planned(shared, llama_8b())
    assert plan.vram[0].total_bytes <= 20 * GIB
    assert reason(plan, "gpu-memory-utilization")[1:] == (
        "machine", "20.00 GiB of the card are free, of which the CUDA context takes 528 MiB that vLLM does not count")


def test_a_share_given_by_hand_stands_and_the_contradiction_is_said() -> None:
    plan = planned(machine(HUGE), llama_8b(), VRAM_LIMIT="10GiB", VLLM_EXTRA_ARGS="--gpu-memory-utilization 0.5")
    value, source, text = reason(plan, "gpu-memory-utilization")
    assert (value, source) == (0.5, "setting")
    assert "although VRAM_LIMIT is 10.00 GiB" in text


# Offload.


def test_what_fits_is_not_offloaded() -> None:
    plan = planned(machine(MIDDLE), llama_8b(), QUANTIZATION="none", VRAM_PROFILE="32gb")
    assert reason(plan, "cpu-offload-gb")[:2] == (0, "machine")
    assert plan.host_pinned_bytes == 0


def test_as_little_is_offloaded_as_leaves_room_for_two_requests() -> None:
    plan = planned(machine(TWENTY, TWENTY), llama_70b(), VRAM_PROFILE="2x20gb")
    value, source, text = reason(plan, "offload-group-size")
    assert (value, source) == (plan.choices.prefetch[0], "machine")
    assert "the least that leaves room for two requests of 8192 tokens" in text
    assert 2 * 8192 <= plan.kv_cache_tokens < 2 * 8192 + 2700, "of a layer or two, at 160 kB a token"
    longer = planned(machine(TWENTY, TWENTY), llama_70b(), MAX_MODEL_LEN="12288", VRAM_PROFILE="2x20gb")
    assert longer.offloaded_bytes > plan.offloaded_bytes


def test_a_profile_offloads_no_more_than_it_says() -> None:
    plan = planned(machine(LARGE), llama_70b(), MAX_MODEL_LEN="22000", VRAM_PROFILE="32gb")
    assert 19 * GIB < plan.offloaded_bytes <= 20 * GIB
    assert "cpu-offload-gb" not in plan.engine_args, "the bound has done its work"


@pytest.mark.parametrize("layers", [1, 7, 24, 32, 61, 80])
def test_offloaded_layers_are_spread_and_never_fewer_than_wanted(layers: int) -> None:
    for wanted in range(1, layers + 1):
        group, last = placement.spread(layers, wanted)
        taken = [layer for layer in range(layers) if layer % group >= group - last]
        assert wanted <= len(taken) <= wanted + wanted // 20
    assert placement.spread(layers, layers) == (1, 1)


def test_what_is_offloaded_takes_the_embedding_along_and_keeps_what_the_user_configured() -> None:
    plan = planned(machine(MIDDLE), llama_70b())
    assert plan.engine_args["additional-config"] == {"shoehorn": {"embedding": "host"}}
    assert plan.vram[0].embeddings_bytes == llama_70b().tensor_bytes.lm_head.parameters * 2
    given = planned(machine(MIDDLE), llama_70b(), VLLM_EXTRA_ARGS="--additional-config '{\"other\": 1}'")
    assert given.engine_args["additional-config"] == {"other": 1, "shoehorn": {"embedding": "host"}}


def test_offload_given_by_hand_stands() -> None:
    plan = planned(machine(HUGE), llama_8b(), VLLM_EXTRA_ARGS="--cpu-offload-gb 2")
    assert reason(plan, "cpu-offload-gb")[:2] == (2.0, "setting")
    assert plan.host_pinned_bytes == 2 * GIB


def test_prefetch_offload_is_estimated_as_itself() -> None:
    plan = planned(machine(MIDDLE), llama_70b(), VLLM_EXTRA_ARGS="--offload-group-size 1 --offload-prefetch-step 2")
    assert plan.vram[0].offload_buffer_bytes > 0
    assert plan.vram[0].weights_bytes < GIB


def test_what_is_not_estimated_is_said() -> None:
    plan = planned(machine(LARGE), llama_8b(), VLLM_EXTRA_ARGS="--kv-offloading-size 4 --pipeline-parallel-size 1")
    assert "its memory is not estimated" in reason(plan, "kv-offloading-size")[2]
    assert "not estimated" not in reason(plan, "pipeline-parallel-size")[2]


def test_a_small_kv_cache_format_doubles_the_tokens() -> None:
    fixed = "--max-num-seqs 16 --max-num-batched-tokens 2048 --max-model-len 8192"
    plain = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=fixed)
    small = planned(machine(MIDDLE), llama_8b(), VLLM_EXTRA_ARGS=f"{fixed} --kv-cache-dtype fp8")
    assert small.kv_cache_tokens == pytest.approx(2 * plain.kv_cache_tokens, rel=0.01)


# What is expected.


def test_speed_is_that_of_the_link_when_offloaded_and_unknown_on_the_cpu() -> None:
    fast = planned(replace(machine(MIDDLE), gpus=(replace(machine(MIDDLE).gpus[0], pcie_generation=5),)), llama_70b())
    slow = planned(machine(MIDDLE), llama_70b())
    assert fast.expected_tokens_per_second["batch_1"] > slow.expected_tokens_per_second["batch_1"]  # type: ignore[operator]  # neither is None
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu")
    assert plan.expected_tokens_per_second == {"batch_1": None, "batch_8": None}
    assert reason(plan, "speed")[1] == "machine"


def test_unequal_cards_are_remarked() -> None:
    plan = planned(machine(LARGE, TWENTY), llama_70b())
    assert "not equal; only equal ones work together" in reason(plan, "gpus")[2]
    assert len(plan.vram) == 1
    assert plan.vram[0].limit_bytes > 25 * GIB, "the largest card alone"


def test_what_the_checkpoint_did_not_tell_is_among_the_reasons() -> None:
    odd = checkpoints.read(checkpoint({
        "architectures": ["OddForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 100, "intermediate_size": 128, "max_position_embeddings": 512},
        {"model.layers.0.mlp.up_proj.weight": ("BF16", [128, 64])}))
    assert "OddForCausalLM" in reason(planned(machine(LARGE), odd), "model")[2]


def test_the_plan_is_json_as_documented() -> None:
    document = json.loads(json.dumps(planned(machine(LARGE), llama_70b()).to_json()))
    assert set(document) >= {"fits", "profile", "engine_args", "reasons", "vram", "host_pinned_bytes",
                             "kv_cache_tokens", "expected_tokens_per_second", "disk_bytes"}
    assert document["fits"] is True
    assert set(document["vram"][0]) == {
        "weights_bytes", "quant_state_bytes", "embeddings_bytes", "offload_buffer_bytes", "kv_cache_bytes",
        "activations_bytes", "cuda_graphs_bytes", "framework_bytes", "total_bytes", "limit_bytes"}
    assert set(document["expected_tokens_per_second"]) == {"batch_1", "batch_8"}


def test_the_allocator_is_bounded_by_the_limit_and_leaves_no_holes() -> None:
    limited = planned(machine(HUGE, ram=200), llama_8b(), VRAM_LIMIT="8GiB").engine_environment
    assert limited == {ALLOCATOR: "expandable_segments:True,per_process_memory_fraction:0.0535"}
    assert float(limited[ALLOCATOR].rpartition(":")[2]) * 139.8 <= 8 - 0.515
    whole = planned(machine(LARGE), llama_8b()).engine_environment[ALLOCATOR]
    assert 0.85 < float(whole.rpartition(":")[2]) <= 0.93
    assert planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu").engine_environment == {}


def test_the_users_allocator_wins_over_the_plans(tmp_path: Path) -> None:
    plan = {ALLOCATOR: "expandable_segments:True"}
    for name in (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"):
        given = {name: "max_split_size_mb:64"}
        made = engine_environment(given, plan, tmp_path)
        assert {key: value for key, value in made.items() if "ALLOC_CONF" in key} == given
    assert engine_environment({}, plan, tmp_path)[ALLOCATOR] == plan[ALLOCATOR]


def test_the_share_asked_of_the_engine_leaves_the_context_room_to_differ() -> None:
    plan = planned(machine(HUGE, ram=200), llama_8b(), VRAM_LIMIT="8GiB")
    share = plan.engine_args["gpu-memory-utilization"]
    assert isinstance(share, float)
    assert share * 139.8 * GIB <= 8 * GIB - CONTEXT_BYTES - MARGIN_BYTES
