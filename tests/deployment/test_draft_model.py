"""SPECULATIVE: default speculative decoding, and a draft model or the reason against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fakes import captured
from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.config import settings
from shoehorn.config.settings import Settings
from shoehorn.deployment import draft_model, inputs, served_model
from shoehorn.deployment.inputs import Deployment
from shoehorn.deployment.plan import plan_deployment
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.engine import fetch
from shoehorn.hardware.types import Hardware
from shoehorn.model import checkpoint
from shoehorn.model.shape import ModelShape
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.store import pull
from support.plans import HUGE, LARGE, MIDDLE, SMALL, llama_8b, machine, planned, reason

GIB = 1 << 30
TEN = ("NVIDIA GeForce RTX 3080", 10.0)
MODELS = {"a/70b": "deepseek-r1-distill-llama-70b", "a/8b": "llama-3.1-8b-instruct", "a/qwen": "qwen3-8b",
          "a/8b-packed": "llama-3.1-8b-instruct-w4a16", "a/mixture": "mixtral-8x7b-instruct-v0.1"}
WORDS = {"one": 0, "two": 1}


class Files:
    """A captured model with a tokenizer; None has no tokenizer."""

    def __init__(self, name: str, tokenizer: object) -> None:
        self._files = captured.files(name)
        self._tokenizer = json.dumps(tokenizer).encode()
        self._has = tokenizer is not None

    def names(self) -> Mapping[str, int]:
        others = {name: size for name, size in self._files.names().items() if name != "tokenizer.json"}
        return others | ({"tokenizer.json": len(self._tokenizer)} if self._has else {})

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self._tokenizer if name == "tokenizer.json" else self._files.read(name, start, length)


@pytest.fixture
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Tokenizers by model, as the hub has them."""
    vocabularies: dict[str, object] = {name: {"model": {"vocab": WORDS}} for name in MODELS}
    monkeypatch.setattr(pull, "hub_files", lambda _, ref: Files(MODELS[ref.id], vocabularies[ref.id]))
    return vocabularies


def asked(tmp_path: Path, **environment: str) -> Settings:
    return settings.load({"MODEL_ID": "a/70b", "SPECULATIVE": "a/8b", "QUANTIZATION": "int4",
                          "MODELS_DIR": str(tmp_path), **environment})


def shape_of(settings: Settings) -> ModelShape:
    return ShapeReader(settings).read(served_model.served_reference(settings), None)


def consider(settings: Settings, hardware: Hardware, free_bytes: int | None = None) -> Plan | Refusal:
    """Plan with the draft that the settings name, without a look at the volume."""
    profile = inputs.select_profile(settings, hardware)
    return plan_deployment(settings, Deployment(
        PlanInputs(PlanSettings.of(settings), hardware, profile, shape_of(settings)),
        served_model.served_reference(settings), None, free_bytes, Path("/nowhere")))


def left_out(plan: Plan | Refusal) -> str:
    assert isinstance(plan, Plan)
    assert plan.draft is None
    return plan.reasons[-1].code


# SPECULATIVE=auto.


def test_speculation_is_used_with_offload_only() -> None:
    offloading = planned(machine(SMALL), llama_8b(), QUANTIZATION="none")
    assert offloading.offloaded_bytes
    assert offloading.engine_args["speculative-config"] == {
        "method": "ngram", "num_speculative_tokens": offloading.config.speculation.draft_tokens, "prompt_lookup_max": 4,
        "prompt_lookup_min": 2}
    assert reason(offloading, "speculative-config")[1:] == ("machine", "ngram")
    assert "speculative-config" not in planned(machine(HUGE), llama_8b()).engine_args


def test_more_sequences_mean_fewer_draft_tokens_each() -> None:
    few, many = (planned(machine(SMALL), llama_8b(), QUANTIZATION="none", MAX_NUM_SEQS=number, MAX_MODEL_LEN="512")
                 for number in ("1", "32"))
    assert (few.config.speculation.draft_tokens, many.config.speculation.draft_tokens) == (8, 3)


def test_draft_tokens_add_no_cuda_graph_memory() -> None:
    partly = planned(machine(("NVIDIA GeForce RTX 3080", 19.7)), checkpoint.read(
        captured.files("qwen2.5-32b-instruct-awq")))
    assert partly.offloaded_bytes
    assert not partly.config.eager
    assert partly.engine_args["max-cudagraph-capture-size"] == 2 * partly.config.limits.max_num_seqs
    without = planned(machine(("NVIDIA GeForce RTX 3080", 19.7)), checkpoint.read(
        captured.files("qwen2.5-32b-instruct-awq")), SPECULATIVE="off")
    assert without.vram[0].cuda_graphs_bytes == partly.vram[0].cuda_graphs_bytes
    assert "max-cudagraph-capture-size" not in without.engine_args


@pytest.mark.parametrize(("model", "environment"), [
    ("llama-3.1-8b-instruct", {"SPECULATIVE": "off"}),
    ("mixtral-8x7b-instruct-v0.1", {}),
    ("llama-3.1-8b-instruct", {"VLLM_EXTRA_ARGS": "--pipeline-parallel-size 2"}),
])
def test_speculation_is_off_if_disabled_or_slower(model: str, environment: dict[str, str]) -> None:
    plan = planned(machine(SMALL, SMALL, ram=128), captured.shape(model), QUANTIZATION="none",
                   **environment)
    assert plan.offloaded_bytes
    assert "speculative-config" not in plan.engine_args


# A draft model.


def test_draft_model_is_used_with_offload(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    plan = consider(asked(tmp_path), machine(TEN))
    assert isinstance(plan, Plan)
    assert plan.draft is not None
    assert plan.draft.ref.is_int4, "as the model is"
    assert plan.engine_args["speculative-config"] == {
        "method": "draft_model", "num_speculative_tokens": 7, "model": str(tmp_path / "a/8b.int4")}
    assert int(str(plan.engine_args["max-num-batched-tokens"])) >= 2 * plan.config.limits.max_num_seqs
    alone = consider(asked(tmp_path, SPECULATIVE="off"), machine(TEN))
    assert isinstance(alone, Plan)
    more = plan.vram[0].weights_bytes - alone.vram[0].weights_bytes
    assert 3.5 * GIB < more + plan.offloaded_bytes - alone.offloaded_bytes < 4.5 * GIB, "all of the draft's weights"
    assert plan.vram[0].total_bytes <= plan.vram[0].limit_bytes
    faster, slower = (each.expected_tokens_per_second["batch_1"] or 0 for each in (plan, alone))
    assert 2 < faster / slower < 3
    assert plan.disk_bytes > alone.disk_bytes


def test_slower_draft_is_left_out(tmp_path: Path,
                                                                    tokenizers: dict[str, object]) -> None:
    loaded = asked(tmp_path, MODEL_ID="a/8b", QUANTIZATION="none")
    assert left_out(consider(loaded, machine(HUGE))) == "draft-slower"


def test_draft_without_a_useful_context_is_left_out(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    code = left_out(consider(asked(tmp_path), machine(("NVIDIA GeForce RTX 5060", 5.0))))
    assert code in {"draft-does-not-fit", "draft-short-context"}


def test_draft_that_exceeds_the_volume_is_left_out(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    assert left_out(consider(asked(tmp_path), machine(TEN), free_bytes=GIB)) == "draft-disk-full"


def test_draft_with_pipeline_parallelism_is_left_out(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    loaded = asked(tmp_path, VLLM_EXTRA_ARGS="--pipeline-parallel-size 2")
    assert left_out(consider(loaded, machine(MIDDLE, MIDDLE))) == "draft-pipeline"


def test_draft_of_an_nf4_model_is_loaded_in_nf4(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    plan = consider(asked(tmp_path, QUANTIZATION="bitsandbytes"), machine(("NVIDIA GeForce RTX 5080", 16.0)))
    assert isinstance(plan, Plan)
    assert plan.engine_args["speculative-config"] == {
        "method": "draft_model", "num_speculative_tokens": 7, "model": str(tmp_path / "a/8b"),
        "quantization": "bitsandbytes"}


@pytest.mark.parametrize(("environment", "problem"), [
    ({"SPECULATIVE": "a/qwen"}, "vocabulary mismatch: 151936 tokens, a/70b has 128256"),
    ({"SPECULATIVE": "a/8b-packed", "QUANTIZATION": "bitsandbytes"}, "vLLM loads both in one way"),
])
def test_draft_that_does_not_match_the_model_is_refused(tmp_path: Path, tokenizers: dict[str, object],
                                                            environment: dict[str, str], problem: str) -> None:
    with pytest.raises(SettingsError, match="SPECULATIVE=a/") as caught:
        consider(asked(tmp_path, **environment), machine(LARGE))
    assert problem in caught.value.cause
    assert caught.value.remedy


def test_draft_with_other_tokens_is_refused(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    tokenizers["a/8b"] = {"model": {"vocab": {"one": 1, "two": 0}}}
    with pytest.raises(SettingsError, match="token mismatch with a/70b"):
        consider(asked(tmp_path), machine(LARGE))


def test_draft_without_a_tokenizer_file_is_accepted(tmp_path: Path,
                                                                      tokenizers: dict[str, object]) -> None:
    tokenizers["a/8b"] = None
    plan = consider(asked(tmp_path), machine(TEN))
    assert isinstance(plan, Plan)
    assert plan.draft


def test_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    tokenizers["a/8b"] = {"model": {}}
    with pytest.raises(ModelUnavailableError, match="vocabulary missing"):
        consider(asked(tmp_path), machine(TEN))


def test_vllm_extra_args_override_the_draft(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    loaded = asked(tmp_path, VLLM_EXTRA_ARGS="--speculative-config.method ngram "
                                     "--speculative-config.num_speculative_tokens 2")
    assert not draft_model.is_named(loaded)
    plan = consider(loaded, machine(TEN))
    assert isinstance(plan, Plan)
    assert plan.config.speculation.draft_tokens == 2


def test_refusal_is_not_changed_by_a_draft(tmp_path: Path, tokenizers: dict[str, object]) -> None:
    assert isinstance(consider(asked(tmp_path), machine(("tiny", 1.0))), Refusal)


def test_fetch_of_the_draft_has_its_own_reference(tmp_path: Path,
                                                                    tokenizers: dict[str, object]) -> None:
    loaded = asked(tmp_path, MODEL_REVISION="v1")
    plan = consider(loaded, machine(TEN))
    assert isinstance(plan, Plan)
    assert plan.draft
    inherited = {"MODELS_DIR": str(tmp_path), "MODEL_REVISION": "v1"}
    loaded = settings.load(fetch.model_environment(inherited, plan.draft.ref))
    assert (loaded.model_id, loaded.model_source, loaded.model_revision) == ("a/8b", "modelscope", "master")


@pytest.mark.parametrize(("value", "problem"), [
    ("fast", "not one of auto, off, ngram"), ("a/b/c", "SPECULATIVE"), ("/a/folder", "set MODEL_SOURCE=local")])
def test_invalid_draft_reference_is_refused(value: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.load({"SPECULATIVE": value})
    assert problem in str(caught.value)
