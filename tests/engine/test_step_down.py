"""Steps down: from the engine's own words to the smallest change that is enough, and the memory of what worked."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import captured as captured_models
from fakes.checkpoint_files import dense
from shoehorn.config import profiles, settings
from shoehorn.deployment import known_good
from shoehorn.engine.diagnosis import Diagnosis, diagnose
from shoehorn.engine.step_down import TRIES, Step, next_step
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.estimate import CONTEXT_BYTES
from shoehorn.planner.memory.fit import missing_bytes
from shoehorn.planner.memory.offload import offloaded_layers
from shoehorn.planner.serving_config import Choices

GIB, MIB = 1 << 30, 1 << 20
LLAMA_8B = checkpoints.read(dense(4096, 14336, 32, 32, 8, 128256))
LLAMA_70B = checkpoints.read(captured_models.files("deepseek-r1-distill-llama-70b"))
START = Choices(limit_bytes=24 * GIB, max_model_len=16384, max_num_seqs=64, max_num_batched_tokens=4096)
ALL_FIXED = frozenset({"max-num-batched-tokens", "max-num-seqs", "max-model-len", "max-cudagraph-capture-size",
                       "enforce-eager", "cpu-offload-gb"})


def failure(name: str = "no_kv_cache_memory", missing: int = 0, cache_made: bool = False) -> Diagnosis:
    return Diagnosis(name, "cause", "remedy", True, True, missing, cache_made)


BY_SHARE = frozenset({"gpu-memory-utilization"})
"""The user's own share of the card: the engine makes the cache, and what a step frees goes into it."""


def step(diagnosis: Diagnosis, choices: Choices = START, fixed: frozenset[str] = frozenset(), tries: int = 0,
         host: int = 0, shape: ModelShape = LLAMA_8B) -> Step | None:
    return next_step(shape, choices, fixed | BY_SHARE, {}, 24 * GIB, host, diagnosis, tries)


def step_of_the_card(diagnosis: Diagnosis, tries: int = 0, fixed: frozenset[str] = frozenset()) -> Step | None:
    return next_step(LLAMA_8B, START, fixed, {}, 24 * GIB, 0, diagnosis, tries)


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
def test_what_was_missing_is_read_from_the_engines_words(lines: list[str], name: str, missing: float,
                                                         cache_made: bool) -> None:
    found = diagnose(lines, 1)
    assert (found.name, found.memory, found.cache_made) == (name, True, cache_made)
    assert found.missing_bytes == pytest.approx(missing * GIB, abs=MIB)


def test_a_failure_that_has_nothing_to_do_with_memory_is_no_step() -> None:
    assert step(diagnose(["error: unrecognized arguments: --x"], 2)) is None
    assert step(diagnose(["something else"], 1)) is None


def test_guessed_tokens_are_given_up_after_a_failure_that_is_not_about_memory() -> None:
    unknown, options = diagnose(["something else"], 1), {"speculative-config": {"method": "ngram"}}
    found = next_step(LLAMA_8B, START, frozenset(), options, 24 * GIB, 0, unknown, 0)
    assert found == Step({"speculative-config": None}, "guessed tokens -> none")
    assert next_step(LLAMA_8B, START, frozenset({"speculative-config"}), options, 24 * GIB, 0, unknown, 0) is None
    memory = next_step(LLAMA_8B, START, frozenset(), options, 24 * GIB, 0, failure(), 0)
    assert memory is None or "speculative-config" not in memory.options, "they take next to no memory"


def test_the_first_rung_that_is_enough_alone_is_taken() -> None:
    assert step(failure(missing=0)) == Step({"max-num-batched-tokens": 2048}, "max-num-batched-tokens 4096 -> 2048")
    without_tokens = step(failure(), fixed=frozenset({"max-num-batched-tokens"}))
    assert without_tokens is not None
    assert set(without_tokens.options) <= {"max-num-seqs", "max-model-len"}
    much = step(failure(missing=3 * GIB))
    assert much is not None
    assert set(much.options) == {"cpu-offload-gb", "offload-backend", "offload-group-size", "offload-num-in-group",
                                 "offload-prefetch-step", "additional-config"}, "no other rung frees so much alone"


def test_where_no_rung_is_enough_they_are_gathered_from_the_top() -> None:
    found = step(failure(missing=2200 * MIB), fixed=frozenset({"cpu-offload-gb"}))
    assert found is not None
    assert list(found.options) == ["max-num-batched-tokens", "max-num-seqs", "max-model-len"]
    assert len(found.text.split(", ")) == 3


def offload(step: Step) -> tuple[int, int, int]:
    group, last, steps = (step.options.get(f"offload-{name}", 0)
                          for name in ("group-size", "num-in-group", "prefetch-step"))
    assert isinstance(group, int)
    assert isinstance(last, int)
    assert isinstance(steps, int)
    return group, last, steps


@pytest.mark.parametrize("missing", [0, 200 * MIB, GIB, 2 * GIB])
def test_every_step_frees_what_was_missing(missing: int) -> None:
    found = step(failure(missing=missing))
    assert found is not None
    names = {"max-num-batched-tokens": "max_num_batched_tokens", "max-num-seqs": "max_num_seqs",
             "max-model-len": "max_model_len"}
    changed = replace(START, **{names[option]: value for option, value in found.options.items() if option in names},
                      eager="enforce-eager" in found.options, prefetch=offload(found),
                      embedding_on_host="additional-config" in found.options)
    assert missing_bytes(LLAMA_8B, START) - missing_bytes(LLAMA_8B, changed) >= missing


def test_what_the_user_fixed_is_never_touched() -> None:
    assert step(failure(), fixed=ALL_FIXED) is None


def test_graphs_for_small_batches_are_kept_where_that_is_enough() -> None:
    many = replace(START, max_num_seqs=256, tensor_parallel=2)  # 51 graphs of each kind
    others = ALL_FIXED - {"max-cudagraph-capture-size", "enforce-eager"}
    found = step(failure(missing=300 * MIB), many, others)
    assert found is not None
    assert list(found.options) == ["max-cudagraph-capture-size"]
    largest = found.options["max-cudagraph-capture-size"]
    assert isinstance(largest, int)
    assert 256 < largest < 512, "no fewer than are enough"
    assert found.text == f"CUDA graphs for 512 tokens at a time -> {largest}"
    fewer = replace(many, capture_limit=largest)
    assert missing_bytes(LLAMA_8B, many) - missing_bytes(LLAMA_8B, fewer) >= 300 * MIB
    told = step(failure(missing=300 * MIB), many, others | {"max-cudagraph-capture-size"})
    assert told == Step({"enforce-eager": True}, "CUDA graphs -> none")


def test_an_overflow_makes_the_cache_smaller() -> None:
    assert step(failure("gpu_out_of_memory", 500 * MIB, cache_made=True)) is None, "the user's own share stands"
    found = step_of_the_card(failure("gpu_out_of_memory", 500 * MIB, cache_made=True))
    assert found is not None
    share = found.options["gpu-memory-utilization"]
    assert isinstance(share, float)
    assert share * 24 * GIB + CONTEXT_BYTES <= START.limit_bytes - 500 * MIB
    assert list(found.options) == ["gpu-memory-utilization"]


def test_a_card_that_others_fill_is_used_less_and_the_rest_follows() -> None:
    found = step_of_the_card(failure("gpu_in_use", 10 * GIB))
    assert found is not None
    assert found.options["gpu-memory-utilization"] < 0.6  # type: ignore[operator]  # a number
    assert "offload-group-size" in found.options, "an 8B does not fit into the 14 GiB that are left"
    assert step(failure("gpu_in_use", GIB)) is None


def test_offload_goes_no_further_than_the_host_has_memory() -> None:
    rest = ALL_FIXED - {"cpu-offload-gb"}
    assert step(failure(missing=GIB), fixed=rest, host=64 * GIB) is not None
    assert step(failure(missing=GIB), fixed=rest, host=4 * GIB) is None


def test_the_tries_end_and_grow() -> None:
    assert step(failure(), tries=TRIES) is None
    assert step_of_the_card(failure("gpu_in_use", 10 * GIB), fixed=ALL_FIXED) is None, "nothing may be made smaller"
    sizes = []
    for tries in range(TRIES):
        found = step(failure(), fixed=ALL_FIXED - {"cpu-offload-gb"}, tries=tries, shape=LLAMA_70B)
        assert found is not None
        sizes.append(offloaded_layers(LLAMA_70B, offload(found)))
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 3 * sizes[0]


def test_a_number_format_that_the_card_lacks_becomes_float16_once() -> None:
    found = diagnose(["ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0"], 1)
    assert step(found) == Step({"dtype": "float16"}, "dtype of the checkpoint -> float16")
    assert step(found, fixed=frozenset({"dtype"})) is None
    assert next_step(LLAMA_8B, START, frozenset(), {"dtype": "float16"}, 24 * GIB, 0, found, 1) is None


def test_what_worked_is_remembered_for_the_same_start_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = settings.load({"MODELS_DIR": str(tmp_path)})
    gpu = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, (8, 9), 4, 16, False)
    machine = Hardware((gpu,), "580.95", 64 * GIB, 60 * GIB, 8.0)
    profile = profiles.automatic()
    path = known_good.location(loaded, machine, profile, LLAMA_8B)
    assert known_good.read(path) == {}
    known_good.write(path, {"max-num-seqs": 4}, "no_kv_cache_memory: max-num-seqs 8 -> 4")
    assert known_good.read(path) == {"max-num-seqs": 4}
    same = replace(machine, host_available_bytes=GIB, gpus=(replace(gpu, free_bytes=20 * GIB),))
    assert known_good.location(loaded, same, profile, LLAMA_8B) == path, "what is free just now changes nothing"
    others = [known_good.location(loaded, replace(machine, driver_version="590.1"), profile, LLAMA_8B),
              known_good.location(loaded, replace(machine, gpus=(gpu, gpu)), profile, LLAMA_8B),
              known_good.location(loaded, machine, profiles.load("7gb"), LLAMA_8B),
              known_good.location(loaded, machine, profile, LLAMA_70B),
              known_good.location(replace(loaded, max_model_len=100), machine, profile, LLAMA_8B),
              known_good.location(replace(loaded, vllm_extra_args=("--seed", "1")), machine, profile, LLAMA_8B)]
    assert len({path, *others}) == 7
    assert "sk-" not in path.read_text()
    with caplog.at_level(logging.WARNING):
        path.write_text('{"options": ')
        assert known_good.read(path) == {}
    assert "Ignoring unreadable known-good options" in caplog.text


def test_a_volume_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        known_good.write(tmp_path / "file" / "worked" / "x.json", {}, "")
    assert "Cannot save known-good options" in caplog.text
