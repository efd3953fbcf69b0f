"""Precedence of VLLM_EXTRA_ARGS, settings, profile, last known good options and automatic choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.config import settings
from shoehorn.deployment import inputs
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan
from shoehorn.planner.serving_config import UvaOffload
from support.plans import (
    CPU_ONLY,
    GIB,
    HUGE,
    LARGE,
    MIDDLE,
    SMALL,
    llama_8b,
    llama_70b,
    machine,
    plan_for,
    planned,
    reason,
    reason_of,
    tiny,
)


def test_extra_arguments_win_over_settings_and_settings_over_the_profile() -> None:
    plan = planned(machine(LARGE), llama_8b(), MAX_MODEL_LEN="4096", MAX_NUM_SEQS="16",
                   VLLM_EXTRA_ARGS="--max-num-seqs 4")
    assert plan.engine_args["max-model-len"] == 4096
    assert reason(plan, "max-model-len") == (4096, "setting", "set")
    sequences = reason_of(plan, "max-num-seqs")
    assert (sequences.value, sequences.params) == (4, {"setting": "VLLM_EXTRA_ARGS"})
    assert sequences.replaces
    assert (sequences.replaces.value, sequences.replaces.params) == (16, {"setting": "MAX_NUM_SEQS"})
    named = planned(machine(LARGE), llama_8b(), VRAM_PROFILE="32gb", MAX_NUM_SEQS="16")
    assert reason(named, "block-size") == (32, "profile", "profile")
    sequences = reason_of(named, "max-num-seqs")
    assert sequences.replaces
    assert (sequences.value, sequences.replaces.value, sequences.replaces.source) == (16, 256, "profile")


def test_every_option_has_one_reason() -> None:
    plan = planned(machine(MIDDLE), llama_70b(), SPECULATIVE="ngram", VLLM_EXTRA_ARGS="--seed 1")
    for option, value in plan.engine_args.items():
        assert reason(plan, option)[0] == value


def test_model_lowers_a_profiles_context_with_a_reason() -> None:
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu")
    limited = reason_of(plan, "max-model-len")
    assert (limited.value, limited.source, limited.code) == (2048, "model", "model-limit")
    assert limited.replaces
    assert limited.replaces.value == 4096


@pytest.mark.parametrize(("environment", "named"), [
    ({"MAX_MODEL_LEN": "4096"}, "MAX_MODEL_LEN"), ({"VLLM_EXTRA_ARGS": "--max-model-len 4k"}, "VLLM_EXTRA_ARGS"),
])
def test_context_beyond_the_model_is_an_error_that_names_the_setting(environment: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan_for(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", **environment)
    assert caught.value.code == "context_too_long"
    assert caught.value.cause.startswith(named)
    assert "2048" in caught.value.remedy


def test_unset_options_get_explicit_values_with_reasons(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("engine: {}\n")
    plan = planned(machine(HUGE), llama_8b(), VRAM_PROFILE=str(path))
    assert reason(plan, "max-model-len")[:2] == (131072, "machine")
    assert reason(plan, "max-num-seqs")[:2] == (256, "machine")
    assert reason(plan, "gpu-memory-utilization")[:2] == (0.92, "machine")


def test_more_sequences_than_batched_tokens_raise_the_batch() -> None:
    plan = planned(machine(SMALL), llama_8b(), VLLM_EXTRA_ARGS="--max-num-seqs 9 --max-num-batched-tokens 8")
    assert reason(plan, "max-num-batched-tokens") == (9, "machine", "one-token-per-sequence")
    many = planned(machine(HUGE), llama_8b(), VLLM_EXTRA_ARGS="--max-num-seqs 300 --max-num-batched-tokens 8")
    assert many.engine_args["max-num-batched-tokens"] == 300
    assert many.engine_args["kv-cache-memory-bytes"] == many.vram[0].kv_cache_bytes, "sized for the raised batch"


def test_settings_reach_the_engine() -> None:
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", SPECULATIVE="ngram", TRUST_REMOTE_CODE="yes")
    assert plan.engine_args["speculative-config"] == {
        "method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert plan.engine_args["trust-remote-code"] is True
    plain = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu", SPECULATIVE="off")
    assert not {"speculative-config", "trust-remote-code", "quantization"} & set(plain.engine_args)


def test_profiles_environment_reaches_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("match: {device: cpu}\nenvironment: {OMP_NUM_THREADS: 2}\n")
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE=str(path))
    assert plan.engine_environment == {"OMP_NUM_THREADS": "2"}
    assert reason(plan, "kv-cache-memory-bytes")[:2] == (GIB, "machine")


def test_last_known_good_options_win_over_all_but_the_users() -> None:
    loaded = settings.load({"MAX_NUM_SEQS": "32"})
    hardware = machine(MIDDLE)
    stepped = {"max-num-seqs": 4, "max-num-batched-tokens": 256, "cpu-offload-gb": 3.0, "enforce-eager": True}
    plan = make_plan(PlanInputs(PlanSettings.of(loaded), hardware, inputs.select_profile(loaded, hardware), llama_8b(),
                                known_good=stepped))
    assert isinstance(plan, Plan)
    assert reason(plan, "max-num-seqs")[:2] == (32, "setting")
    assert reason(plan, "max-num-batched-tokens")[:2] == (256, "step-down")
    assert (plan.config.offload, plan.config.eager) == (UvaOffload(3 * GIB), True)
    assert plan.fixed == {"max-num-seqs"}


def test_options_that_are_not_estimated_are_noted() -> None:
    plan = planned(machine(LARGE), llama_8b(), VLLM_EXTRA_ARGS="--kv-offloading-size 4 --pipeline-parallel-size 1")
    assert reason_of(plan, "kv-offloading-size").notes == ("not-estimated",)
    assert reason_of(plan, "pipeline-parallel-size").notes == ()
    for switch, notes in (("--enable-lora", ()), ("--no-enable-lora", ()),
                          ("--kv-offloading-size 1", ("not-estimated",)),
                          ("--decode-context-parallel-size 1", ()),
                          ("--decode-context-parallel-size 2", ("not-estimated",)),
                          ("--limit-mm-per-prompt.image 4", ()), ("--kv-cache-dtype fp8", ()),
                          ("--kv-cache-dtype turboquant_4bit_nc", ("not-estimated",))):
        option = switch.removeprefix("--").removeprefix("no-").split()[0].partition(".")[0]
        plan = planned(machine(LARGE), llama_8b(), VLLM_EXTRA_ARGS=switch)
        assert reason_of(plan, option).notes == notes, switch


def test_lora_adapters_are_planned_with_their_memory() -> None:
    without, small, large = (planned(machine(LARGE), llama_8b(), VLLM_EXTRA_ARGS=words) for words in (
        "", "--enable-lora", "--enable-lora --max-loras 8 --max-lora-rank 64"))
    assert without.kv_cache_tokens > small.kv_cache_tokens > large.kv_cache_tokens
    assert [each.text for each in large.reasons if each.code == "adapters-memory"] == [
        "2.63 GiB on the first GPU for 8 LoRA adapters of rank 64 (max-loras, max-lora-rank)"]
