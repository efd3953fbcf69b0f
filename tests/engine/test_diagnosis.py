"""Diagnosis: real lines of the engine -> causes. The lines are as vLLM 0.32.0 and torch 2.13.0 print them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from shoehorn.engine.diagnosis import diagnose

_PREFIX = "(EngineCore pid=33) ERROR 11-23 08:00:00 [core.py:1510] "


@pytest.mark.parametrize(("name", "line"), [
    ("context_exceeds_kv_cache", "ValueError: To serve at least one request with the model's max seq len (8192), "
     "(2.5 GiB KV cache is needed, which is larger than the available KV cache memory (1.1 GiB)."),
    ("no_kv_cache_memory", "ValueError: No available memory for the cache blocks. Try increasing "
     "`gpu_memory_utilization` when initializing the engine."),
    ("gpu_in_use", "ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory "
     "utilization (0.9, 21.2 GiB)."),
    ("gpu_out_of_memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 448.00 MiB."),
    ("gpu_out_of_memory", 'RuntimeError: torch_call_dispatcher( "aten::empty", "memory_format", stack.data(), ( ((0ULL '
     "+ 2) << 56) | ((0ULL + 13) << 48))) API call failed at torch/csrc/stable/ops.h, line 631"),
    ("offload_undone", "shoehorn_vllm.hybrid.offload_proof.OffloadUndoneError: Offloaded weights: 13.92 GiB planned in "
     "host memory, of which only 0.00 GiB are there: the engine's kernels moved them to the GPU."),
    ("offload_undone", "shoehorn_vllm.hybrid.offload_proof.OffloadUndoneError: Offloaded weights: option `experts` of "
     "--additional-config had no effect, they are on the GPU."),
    ("host_out_of_memory", "RuntimeError: [enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't "
     "allocate memory: you tried to allocate 1 bytes."),
    ("unsupported_model", "ValueError: Model architectures ['FooForCausalLM'] are not supported for now."),
    ("unsupported_dtype", "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0."),
    ("bad_engine_argument", "entry.py: error: argument --dtype: invalid choice: 'bf8'"),
    ("bad_engine_argument", "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"),
    ("shared_memory_too_small", "OSError: Insufficient space in /dev/shm: 64 MiB available, 160 MiB needed"),
    ("no_compiler", "torch._inductor.exc.InductorError: CalledProcessError: Command '['/opt/gcc/bin/gcc', '/tmp/c.c', "
     "'-O3']' returned non-zero exit status 1."),
    ("bad_weights", "safetensors_rust.SafetensorError: Error while deserializing header: invalid header length"),
])
def test_known_failure_has_a_code_and_is_final(name: str, line: str) -> None:
    diagnosis = diagnose(["INFO something", _PREFIX + line, "RuntimeError: Engine core initialization failed."], 1)
    assert diagnosis.name == name
    assert diagnosis.final
    assert diagnosis.cause
    assert diagnosis.remedy


def test_killed_engine_core_is_diagnosed_as_killed() -> None:
    lines = ["Engine core proc EngineCore died unexpectedly, shutting down client."]
    assert diagnose(lines, 0, memory_kill=True).name == "killed"
    assert diagnose(lines, 0).name == "unknown"
    assert diagnose(["torch.OutOfMemoryError: CUDA out of memory."], 1, memory_kill=True).name == "gpu_out_of_memory"


def test_first_failure_counts_and_not_its_repetition() -> None:
    lines = ["ValueError: No available memory for the cache blocks.", "torch.OutOfMemoryError: CUDA out of memory."]
    assert diagnose(lines, 1).name == "no_kv_cache_memory"


def test_kill_is_distinguished_from_an_unknown_exit() -> None:
    assert diagnose(["INFO serving"], -9).name == "killed"
    unknown = diagnose(["INFO one", "INFO two", "INFO three", "INFO four"], 0)
    assert unknown.name == "unknown"
    assert not unknown.final
    assert "status 0: INFO two | INFO three | INFO four" in unknown.cause


def test_exit_without_output_is_unknown() -> None:
    assert "no output" in diagnose([], 1).cause


def test_killed_worker_is_diagnosed_as_killed() -> None:
    lines = ["(EngineCore pid=62) ERROR 11-23 16:21:08 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
             "unexpectedly (exit code: -9), shutting down executor."]
    diagnosis = diagnose(lines, 0)
    assert (diagnosis.name, diagnosis.final) == ("killed", False)
    assert "out of memory" in diagnosis.cause


GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(("lines", "name", "missing", "cache_made"), [
    (["ValueError: To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is needed, "
      "which is larger than the available KV cache memory (3.25 GiB). Based on the available memory, the estimated "
      "maximum model length is 26624."], "context_exceeds_kv_cache", 0.75, False),
    (["Available KV cache memory: -1.50 GiB", "ValueError: No available memory for the cache blocks. Try increasing"],
     "no_kv_cache_memory", 1.5, False),
    (["ValueError: Free memory on device cuda:0 (10.25/23.64 GiB) on startup is less than desired GPU memory "
      "utilization (0.92, 21.75 GiB). Decrease"], "gpu_in_use", 11.5, False),
    (["GPU KV cache size: 8,192 tokens, Maximum concurrency for 4,096 tokens per request: 2.00x",
      "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB "
      "of which 512.00 MiB is free. Process 1 has"], "gpu_out_of_memory", 1.0, True),
])
def test_missing_memory_is_read_from_the_log(lines: list[str], name: str, missing: float,
                                             cache_made: bool) -> None:
    diagnosis = diagnose(lines, 1)
    assert (diagnosis.name, diagnosis.memory, diagnosis.cache_made) == (name, True, cache_made)
    assert diagnosis.missing_bytes == pytest.approx(missing * GIB, abs=MIB)


MAMBA = ("ValueError: max_num_seqs (256) exceeds available Mamba cache blocks (80). Each decode sequence requires one "
         "Mamba cache block, so CUDA graph capture cannot proceed. Please lower max_num_seqs to at most 80 or increase "
         "gpu_memory_utilization.")
TOO_LONG = ("1 validation error for ModelConfig",
            "  Value error, User-specified max_model_len (131072) is greater than the derived max_model_len "
            "(max_position_embeddings=40960.0 or model_max_length=None in model's config.json)")
SMALL_BATCH = ("ValueError: Chunked MM input disabled but max_tokens_per_mm_item (16384) is larger than "
               "max_num_batched_tokens (2048). Please increase max_num_batched_tokens.")


@pytest.mark.parametrize(("lines", "name", "limits", "remedy"), [
    ([MAMBA], "sequences_exceed_kv_cache", {"max-num-seqs": 80}, "MAX_NUM_SEQS to 80 or less"),
    (list(TOO_LONG), "context_exceeds_model", {"max-model-len": 40960}, "MAX_MODEL_LEN to 40960 or less"),
    ([SMALL_BATCH], "batch_too_small", {"max-num-batched-tokens": 16384}, "--max-num-batched-tokens 16384"),
    (["  Value error, max_num_batched_tokens (128) must be greater than or equal to max_num_seqs (256)."],
     "batch_too_small", {"max-num-batched-tokens": 256}, "--max-num-batched-tokens 256"),
    (["ValueError: To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is needed, "
      "which is larger than the available KV cache memory (3.25 GiB). Based on the available memory, the estimated "
      "maximum model length is 26624."], "context_exceeds_kv_cache", {"max-model-len": 26624}, "to 26624 or less"),
    (["ValueError: To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is needed, "
      "which is larger than the available KV cache memory (0.01 GiB). Try increasing"], "context_exceeds_kv_cache", {},
     "the number in the message above"),
    (["ValueError: No available memory for the cache blocks."], "no_kv_cache_memory", {}, "--cpu-offload-gb"),
])
def test_values_that_the_engine_names_are_read(lines: list[str], name: str, limits: dict[str, int], remedy: str
                                               ) -> None:
    diagnosis = diagnose(["INFO starting", *lines, "RuntimeError: Engine core initialization failed."], 1)
    assert (diagnosis.name, diagnosis.limits) == (name, limits)
    assert remedy in diagnosis.remedy


@pytest.mark.contract
def test_messages_with_values_are_those_of_the_engine() -> None:
    root = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    for file, words in {
            "config/compilation.py": ("exceeds available Mamba cache ", "Please lower max_num_seqs to at most "),
            "v1/core/kv_cache_utils.py": ("the estimated maximum model length is {",
                                          "To serve at least one request with"),
            "config/model.py": ("User-specified max_model_len ({max_model_len}) is greater ",
                                "than the derived max_model_len ("),
            "config/scheduler.py": ("be greater than or equal to max_num_seqs ",),
            "v1/core/encoder_cache_manager.py": ("is larger than max_num_batched_tokens",)}.items():
        text = (root / file).read_text(encoding="utf-8")
        for word in words:
            assert word in text, (file, word)
