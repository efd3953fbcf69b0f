"""Audit of the locks, bill of materials, and pinning of base images, with prepared answers of the services."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoehorn.common.paths import HOME

TODAY = date(2026, 11, 23)


def _tool(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, HOME / "tools" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def audit() -> Any:
    return _tool("audit")


@pytest.fixture(scope="module")
def sbom() -> Any:
    return _tool("sbom")


def _report(*entries: dict[str, object]) -> dict[str, object]:
    return {"dependencies": list(entries), "fixes": []}


GOOD = {"name": "jinja2", "version": "3.1.6", "vulns": []}
BAD = {"name": "vllm", "version": "0.32.0", "vulns": [
    {"id": "PYSEC-2026-1", "fix_versions": [], "aliases": ["CVE-2026-105922"], "description": "x"}]}
ABSENT = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


def _waiver(audit: Any, **changes: object) -> Any:
    return audit.Waiver(**{"id": "CVE-2026-105922", "package": "vllm", "reason": "x", "until": TODAY, **changes})


def test_audit_without_vulnerability_passes(audit: Any) -> None:
    code, lines = audit.verdict(audit.read_report(_report(GOOD)), [], TODAY)
    assert (code, lines) == (audit.CLEAN, ["1 packages, no vulnerability that is not waived (0 waived)."])


def test_vulnerability_fails_with_its_ids(audit: Any) -> None:
    code, lines = audit.verdict(audit.read_report(_report(GOOD, BAD, ABSENT)), [], TODAY)
    assert code == audit.VULNERABLE
    assert lines == ["VULNERABLE vllm 0.32.0: CVE-2026-105922, PYSEC-2026-1"]


def test_waiver_is_valid_for_its_package_until_its_date(audit: Any) -> None:
    findings = audit.read_report(_report(BAD))
    assert audit.verdict(findings, [_waiver(audit)], TODAY)[0] == audit.CLEAN
    for change in ({"until": TODAY - timedelta(days=1)}, {"package": "torch"}, {"id": "CVE-2026-1"}):
        assert audit.verdict(findings, [_waiver(audit, **change)], TODAY)[0] == audit.VULNERABLE


def test_unused_waiver_fails(audit: Any) -> None:
    code, lines = audit.verdict(audit.read_report(_report(GOOD)), [_waiver(audit)], TODAY)
    assert (code, lines) == (audit.VULNERABLE, ["WAIVER WITHOUT USE CVE-2026-105922 for vllm"])


@pytest.mark.parametrize("entries", [[], [ABSENT], [GOOD, ABSENT]])
def test_audit_without_an_answer_is_unknown(audit: Any, entries: list[dict[str, object]]) -> None:
    code, lines = audit.verdict(audit.read_report(_report(*entries)), [], TODAY)
    assert code == audit.UNKNOWN
    assert "NOT AUDITED" in lines[0]


def _program(folder: Path, body: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


def test_unreachable_service_gives_unknown(audit: Any, tmp_path: Path) -> None:
    program = _program(tmp_path, "import sys; sys.exit('Failed to resolve host')")
    answers = audit.ask(str(program), "osv", {"a==1", "b==2"})
    assert [(one.name, one.version, one.unknown) for one in answers] == [
        ("a", "1", "Failed to resolve host"), ("b", "2", "Failed to resolve host")]


def test_every_lock_is_audited_and_every_package_once(audit: Any) -> None:
    assert set(audit.LOCKS) == {path.stem for path in (HOME / "requirements").glob("*.txt")} - {
        "overrides", "dev-overrides"}
    locks = ["torch==2.13.0+cpu \\\n    --hash=sha256:0\nvllm-cpu==0.32.0 \\\n", "torch==2.13.0 ; x\n"]
    packages = audit.packages(locks)
    assert packages == {"torch==2.13.0", "vllm==0.32.0"}


def test_waivers_are_valid_and_have_reasons(audit: Any) -> None:
    waivers = audit.read_waivers(HOME / "requirements" / "waivers.yaml")
    assert [waiver.id for waiver in waivers if len(waiver.reason) < 20 or not isinstance(waiver.until, date)] == []


def test_waiver_without_a_date_is_refused(audit: Any, tmp_path: Path) -> None:
    (tmp_path / "waivers.yaml").write_text("- {id: CVE-1, package: a, reason: because}\n")
    with pytest.raises(KeyError, match="until"):
        audit.read_waivers(tmp_path / "waivers.yaml")


def test_debian_packages_become_purls(sbom: Any) -> None:
    listing = "g++\t4:12.2.0-3\tamd64\tii \tgcc-defaults\nold\t1\tall\trc \told\n"
    assert [part["purl"] for part in sbom.debian_components(listing, "debian")] == [
        "pkg:deb/debian/g%2B%2B@4%3A12.2.0-3?arch=amd64"]


def test_javascript_library_is_unchanged_and_has_its_licence(sbom: Any) -> None:
    [part] = sbom.page_components(HOME / "gateway" / "page")
    assert part["purl"] == "pkg:npm/marked@18.2.1"
    assert part["hashes"] == [{"alg": "SHA-256", "content":
                               "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de"}]
    assert "MarkedJS" in (HOME / "gateway" / "marked.LICENSE").read_text(encoding="utf-8")


def test_parts_are_merged_in_a_fixed_order(sbom: Any) -> None:
    python = {"specVersion": "1.6", "components": [{"bom-ref": "vllm==1"}], "metadata": {"tools": {}},
              "dependencies": [{"ref": "root-component"}, {"ref": "vllm==1"}]}
    document = sbom.merged(python, [{"bom-ref": "pkg:deb/x"}, {"bom-ref": "pkg:deb/a"}], "1.2")
    assert [part["bom-ref"] for part in document["components"]] == ["pkg:deb/a", "pkg:deb/x", "vllm==1"]
    assert (document["metadata"]["component"]["version"], set(document["metadata"])) == ("1.2", {"component", "tools"})
    assert document["dependencies"] == [{"ref": "vllm==1"}]


_OLD, _NEW = "@sha256:" + "0" * 64, "@sha256:" + "a" * 64


@pytest.mark.parametrize("before", ["", _OLD])
def test_pinning_writes_the_digest_of_every_base_image(tmp_path: Path, before: str) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM ${{BASE_IMAGE:-a/b:1.0{before}}} AS one\nFROM ${{BASE_IMAGE:-c:2{before}}} AS two\nFROM one\n")
    _program(tmp_path, f"import sys; print('{_NEW[1:]}') if sys.argv[4] in ('a/b:1.0', 'c:2') else sys.exit(1)")
    (tmp_path / "program").rename(tmp_path / "docker")
    _pin(tmp_path, check=True)
    assert (tmp_path / "Dockerfile").read_text() == (
        f"FROM ${{BASE_IMAGE:-a/b:1.0{_NEW}}} AS one\nFROM ${{BASE_IMAGE:-c:2{_NEW}}} AS two\nFROM one\n")


def test_pinning_refuses_an_invalid_digest(tmp_path: Path) -> None:
    text = f"FROM ${{BASE_IMAGE:-a:1{_OLD}}} AS one\n"
    (tmp_path / "Dockerfile").write_text(text)
    _program(tmp_path, "print('denied')").rename(tmp_path / "docker")
    assert _pin(tmp_path, check=False).returncode == 1
    assert (tmp_path / "Dockerfile").read_text() == text


def _pin(folder: Path, *, check: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run([str(HOME / "tools" / "pin-base"), str(folder / "Dockerfile")], env=environment, check=check,
                          capture_output=True, text=True)
