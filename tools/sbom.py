"""Bill of materials in CycloneDX JSON, of an installed environment with the distribution's packages, or of a lock.

Rules:
- `cyclonedx-py` lists the Python packages; the distribution's packages from dpkg are added as purls, and the
  libraries in the console page's folder with the version in their header;
- the same input produces the same bytes: no time, no random serial number;
- the document passes the library's strict validation. It runs with the interpreter of requirements/supply-chain.txt:
    python tools/sbom.py --environment /opt/venv/bin/python --debian --out sbom.json
    python tools/sbom.py --lock requirements/gpu.txt --out sbom.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

HOME = Path(__file__).resolve().parents[1]
_FIELDS = ("${Package}", "${Version}", "${Architecture}", "${db:Status-Abbrev}", "${source:Package}")


def debian_components(listing: str, distribution: str) -> list[dict[str, Any]]:
    """Convert dpkg-query's lines (`_FIELDS`, tab-separated) into components of installed packages.

    Args:
        distribution: of the purl, `debian` or `ubuntu`.
    """
    components = []
    for line in listing.splitlines():
        name, version, architecture, status, source = line.split("\t")
        if status.strip() != "ii":
            continue
        purl = f"pkg:deb/{distribution}/{quote(name)}@{quote(version, safe='')}?arch={architecture}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
                           "properties": [{"name": "dpkg:source", "value": source}]})
    return components


def page_components(page: Path) -> list[dict[str, Any]]:
    """Return the components of the npm libraries in the console page's folder."""
    components = []
    for path in sorted(page.glob("*.esm.js")):
        text = path.read_text(encoding="utf-8")
        header = re.search(r"\* (\S+) v(\d[\w.]*) - ", text)
        if not header:
            raise ValueError(f"{path} does not contain its version in its first lines")
        name, version = header.groups()
        purl = f"pkg:npm/{name}@{version}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
                           "licenses": [{"license": {"id": "MIT"}}],
                           "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(text.encode()).hexdigest()}]})
    return components


def merged(python: dict[str, Any], others: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """Merge all parts into one document for the image of this version, sorted by reference."""
    components = sorted([*python.get("components", ()), *others], key=lambda part: str(part["bom-ref"]))
    root = {"type": "container", "bom-ref": "shoehorn-image", "name": "shoehorn", "version": version,
            "licenses": [{"license": {"id": "Apache-2.0"}}]}
    return {**python, "metadata": {**python.get("metadata", {}), "component": root}, "components": components,
            "dependencies": [each for each in python.get("dependencies", ()) if each["ref"] != "root-component"]}


def _cyclonedx(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cyclonedx_py", *arguments, "--output-format=JSON", "--output-reproducible"]
    document: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return document


def _distribution() -> str:
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    return next(line.partition("=")[2].strip('"') for line in lines if line.startswith("ID="))


def _version() -> str:
    text = (HOME / "src" / "shoehorn" / "__init__.py").read_text(encoding="utf-8")
    return next(line.split('"')[1] for line in text.splitlines() if line.startswith("__version__"))


def main() -> None:
    """Write the requested document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--environment", help="the interpreter of an installed environment")
    source.add_argument("--lock", type=Path, help="a lock in requirements/")
    parser.add_argument("--debian", action="store_true", help="include the distribution's packages of this machine")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    python = (_cyclonedx("environment", arguments.environment) if arguments.environment
              else _cyclonedx("requirements", str(arguments.lock)))
    others = page_components(HOME / "gateway" / "page")
    page = len(others)
    if arguments.debian:
        query = ["dpkg-query", "--show", "--showformat", "\t".join(_FIELDS) + "\n"]
        listing = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        others += debian_components(listing, _distribution())
    text = json.dumps(merged(python, others, _version()), indent=1, sort_keys=True) + "\n"

    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    if error := JsonStrictValidator(SchemaVersion.from_version(python["specVersion"])).validate_str(text):
        sys.exit(f"the bill of materials is not valid: {error}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {len(python.get('components', ()))} Python packages, {page} of the page, "
          f"{len(others) - page} of the distribution")


if __name__ == "__main__":
    main()
