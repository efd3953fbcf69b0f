"""SECURITY.md says what is so: statements about the installed engine are looked up in it, named files exist."""

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


def test_it_speaks_of_the_version_that_is_locked() -> None:
    lock = (HOME / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    version = re.search(r"^vllm==(\S+)", lock, re.MULTILINE)
    assert version is not None
    assert f"vLLM {version[1]} is the least version" in TEXT
    assert f"| in {version[1]} |" in TEXT


@pytest.mark.contract
def test_the_penalty_kernel_still_has_no_bound(engine: Path) -> None:
    """CVE-2026-105922: once this fails the engine is mended, and SECURITY.md has to say so."""
    source = (engine / "v1" / "worker" / "gpu" / "sample" / "penalties.py").read_text(encoding="utf-8")
    kernel = source[source.index("def _bincount_kernel"):source.index("def bincount")]
    assert "vocab" not in kernel


@pytest.mark.contract
def test_the_scheduler_still_has_no_budget_for_log_probabilities(engine: Path) -> None:
    """CVE-2026-9540: as above."""
    sources = [path.read_text(encoding="utf-8") for path in (engine / "v1" / "core" / "sched").glob("*.py")]
    assert not any(re.search(r"logprobs?_(?:token_)?budget|max_num_batched_logprobs", source) for source in sources)
    assert "max_logprobs: int = Field(default=20" in (engine / "config" / "model.py").read_text(encoding="utf-8")


@pytest.mark.contract
def test_the_bounds_that_it_names_are_the_engines(engine: Path) -> None:
    source = (engine / "envs.py").read_text(encoding="utf-8")
    for line in ("VLLM_MAX_N_SEQUENCES: int = 16384", "VLLM_MAX_COMPLETION_PROMPTS: int = 1024",
                 "VLLM_REGEX_COMPILATION_TIMEOUT_S: int = 5"):
        assert line in source


def test_every_file_that_it_names_exists() -> None:
    names = set(re.findall(r"(?:tests|docs|requirements)/[\w/.*]+", TEXT)) | {f"tests/e2e/{name}" for name in (
        "test_gateway.py", "test_fuzz.py")}
    assert len(names) > 10
    assert [name for name in names if not list(HOME.glob(name.rstrip(".")))] == []


def test_every_setting_and_option_that_it_names_exists() -> None:
    settings = {name for row in TABLE for name in (row.name, f"{row.name}_FILE")}
    named = set(re.findall(r"`((?:API_KEY|MODEL|TLS|TRUST|VLLM_EXTRA)\w*)(?:=[^`]*)?`", TEXT))
    assert named >= {"API_KEY_FILE", "TRUST_REMOTE_CODE"}
    assert named <= settings
    assert {"trust-request-chat-template", "trust-request-mm-kwargs"} <= OWNED.keys()
