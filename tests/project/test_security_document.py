"""Statements of SECURITY.md about vLLM, its options and our settings are true for the installed versions."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from shoehorn.common.paths import HOME
from shoehorn.config.settings import TABLE
from shoehorn.config.vllm_options import OWNED

TEXT = (HOME / "SECURITY.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def engine() -> Path:
    specification = importlib.util.find_spec("vllm")
    assert specification is not None
    assert specification.origin is not None
    return Path(specification.origin).parent


def test_document_names_the_locked_version() -> None:
    lock = (HOME / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    version = re.search(r"^vllm==(\S+)", lock, re.MULTILINE)
    assert version is not None
    assert f"vLLM {version[1]} is the minimum version" in TEXT
    assert f"| in {version[1]} |" in TEXT


@pytest.mark.contract
def test_penalty_kernel_still_has_no_bound_check(engine: Path) -> None:
    """CVE-2026-105922: if this fails, vLLM is fixed and SECURITY.md has to be updated."""
    source = (engine / "v1" / "worker" / "gpu" / "sample" / "penalties.py").read_text(encoding="utf-8")
    kernel = source[source.index("def _bincount_kernel"):source.index("def bincount")]
    assert "vocab" not in kernel


@pytest.mark.contract
def test_scheduler_still_has_no_budget_for_log_probabilities(engine: Path) -> None:
    """CVE-2026-9540: likewise."""
    sources = [path.read_text(encoding="utf-8") for path in (engine / "v1" / "core" / "sched").glob("*.py")]
    assert not any(re.search(r"logprobs?_(?:token_)?budget|max_num_batched_logprobs", source) for source in sources)
    assert "max_logprobs: int = Field(default=20" in (engine / "config" / "model.py").read_text(encoding="utf-8")


@pytest.mark.contract
def test_limits_of_the_engine_are_as_documented(engine: Path) -> None:
    source = (engine / "envs.py").read_text(encoding="utf-8")
    for line in ("VLLM_MAX_N_SEQUENCES: int = 16384", "VLLM_MAX_COMPLETION_PROMPTS: int = 1024",
                 "VLLM_REGEX_COMPILATION_TIMEOUT_S: int = 5"):
        assert line in source


def test_named_settings_and_options_exist() -> None:
    settings = {name for row in TABLE for name in (row.name, f"{row.name}_FILE")}
    named = set(re.findall(r"`((?:API_KEY|MODEL|TLS|TRUST|VLLM_EXTRA)\w*)(?:=[^`]*)?`", TEXT))
    assert named >= {"API_KEY_FILE", "TRUST_REMOTE_CODE"}
    assert named <= settings
    assert {"trust-request-chat-template", "trust-request-mm-kwargs"} <= OWNED.keys()
