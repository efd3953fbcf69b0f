"""Root cause of captured failures of the engine: trimmed logs of vLLM 0.32.0 on a CPU, and variants of them."""

from __future__ import annotations

import re

import pytest

from shoehorn.common.paths import HOME
from shoehorn.engine.diagnosis import diagnose
from shoehorn.engine.root_cause import find_root_cause

CAPTURES = HOME / "tests" / "captures" / "failures"

EXPECTED = {
    "bad-config-json": ("refused_configuration", "config.json' is not a valid JSON file."),
    "block-size": ("refused_configuration", "No common block size for 7"),
    "chat-template-missing": ("refused_configuration", "appears path-like, but doesn't exist"),
    "compilation-config": ("bad_engine_argument", "--compilation-config/-cc: Input should be an object."),
    "context-too-long": ("context_exceeds_model", "max_model_len (9999999) is greater"),
    "damaged-header": ("bad_weights", "header too large"),
    "gguf": ("refused_configuration", "Load format `gguf` is not supported."),
    "heads": ("refused_configuration", "hidden size (256) is not a multiple of the number of attention heads (5)"),
    "import-error": ("import_error", "No module named 'nonexistent_package'."),
    "kv-transfer": ("bad_engine_argument", "Unsupported connector type: BogusConnector."),
    "load-format": ("refused_configuration", "Load format `bogus` is not supported."),
    "logits-processor-import": ("import_error", "Failed to load 0th LogitsProcessor plugin"),
    "missing-tokenizer": ("missing_tokenizer", "Couldn't instantiate the backend tokenizer"),
    "more-layers": ("weights_mismatch", "weights were not initialized from checkpoint"),
    "quantization-awq": ("bad_engine_argument", "Cannot find the config file for awq."),
    "reasoning-parser": ("bad_parser", "Reasoning parser 'deepseek' not found."),
    "remote-code": ("remote_code_required", "contains custom code"),
    "speculative-missing": ("bad_engine_argument", "'/nope/draft'"),
    "tool-parser": ("bad_parser", "invalid tool call parser: llama"),
    "truncated-weights": ("bad_weights", "incomplete metadata, file not fully covered."),
    "unsupported-architecture-known-type": ("unsupported_model", "['LlamaFooForCausalLM']"),
}

_SYNTAX = re.compile(r"Traceback|\bFile \"|\^\^|errors\.pydantic\.dev|\[type=|\d validation error|"
                     r"\(\w+ pid=|See root cause")


def captured(name: str) -> list[str]:
    return (CAPTURES / f"{name}.log").read_text(encoding="utf-8").splitlines()


def test_every_capture_is_expected() -> None:
    assert {path.stem for path in CAPTURES.glob("*.log")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_captured_failure_is_final_with_the_cause_of_the_engine(name: str) -> None:
    code, words = EXPECTED[name]
    diagnosis = diagnose(captured(name), 1)
    assert (diagnosis.name, diagnosis.final) == (code, True)
    assert words in diagnosis.cause
    assert not _SYNTAX.search(diagnosis.cause)
    assert len(diagnosis.cause) < 420
    assert diagnosis.remedy


@pytest.mark.parametrize("name", EXPECTED)
def test_noise_after_the_failure_changes_nothing(name: str) -> None:
    """Eight workers repeat the traceback, and every other process reports the end of the first one."""
    lines = captured(name)
    noise = [re.sub(r"\((Worker|EngineCore)[\w-]* pid=\d+\)", rf"(Worker-{number} pid={900 + number})", line)
             for number in range(8) for line in lines if line.startswith("(Worker")]
    later = ["(EngineCore pid=9) ERROR 11-28 06:00:00 [core.py:1] Traceback (most recent call last):",
             "(EngineCore pid=9) ERROR 11-28 06:00:00 [core.py:1]   File \"x.py\", line 1, in f",
             "(EngineCore pid=9) ERROR 11-28 06:00:00 [core.py:1] vllm.v1.engine.exceptions.EngineDeadError: "
             "EngineCore encountered an issue."]
    assert diagnose([*lines, *noise, *later], 1).cause == diagnose(lines, 1).cause


WORKER = "(Worker pid=7) ERROR 11-28 06:00:00 [multiproc_executor.py:953] "


def failing(*exception: str) -> list[str]:
    return ["INFO 11-28 06:00:00 [a.py:1] starting", WORKER + "Traceback (most recent call last):",
            WORKER + '  File "/opt/venv/vllm/x.py", line 7, in load', WORKER + "    assert self.rank < self.size, hint",
            WORKER + "           ^^^^^^^^^^^^^^^^^^^^", *(WORKER + line for line in exception),
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"]


def test_assertion_without_a_message_shows_its_statement() -> None:
    diagnosis = diagnose(failing("AssertionError"), 1)
    assert (diagnosis.name, diagnosis.final) == ("refused_configuration", True)
    assert "assert self.rank < self.size, hint." in diagnosis.cause


@pytest.mark.parametrize(("line", "final"), [
    ("AssertionError: heads must be divisible by 3", True), ("NotImplementedError: no such backend", True),
    ("ImportError: cannot import name 'x' from 'vllm'", True), ("some.package.ValidationError: bad", True),
    ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
    ("OSError: [Errno 5] Input/output error", False), ("TimeoutError: no answer", False),
    ("torch.distributed.DistBackendError: NCCL error", False)])
def test_only_deterministic_exceptions_of_a_start_are_final(line: str, final: bool) -> None:
    assert diagnose(failing(line), 1).final is final
    assert not diagnose(failing(line), 1, is_start=False).final


def test_serving_engine_failed_by_its_last_exception() -> None:
    lines = [*failing("ValueError: of a request, hours ago")[:-1], "INFO 11-28 09:00:00 [a.py:1] serving",
             *failing("RuntimeError: CUDA error: unspecified launch failure")]
    cause = find_root_cause(lines, is_start=False)
    assert cause is not None
    assert cause.message == "CUDA error: unspecified launch failure"
    first = find_root_cause(lines, is_start=True)
    assert first is not None
    assert first.message == "of a request, hours ago"


def test_last_exception_of_a_chain_counts() -> None:
    lines = failing("KeyError: 'num_heads'", "", "The above exception was the direct cause of the following exception:",
                    "", "Traceback (most recent call last):", '  File "x.py", line 1, in f', "    raise E",
                    "ValueError: config.json lacks num_heads")
    cause = find_root_cause(lines, is_start=True)
    assert cause is not None
    assert (cause.message, cause.chain) == ("config.json lacks num_heads", ("KeyError",))
