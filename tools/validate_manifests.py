"""Validates Kubernetes manifests strictly: reads a JSON list of them, writes a JSON list of problems.

Runs in the environment of requirements/chart.txt, which has the schemas; a strict check refuses unknown fields.
usage: python tools/validate_manifests.py VERSION... < MANIFESTS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import kubernetes_validate


def problems(manifests: list[dict[str, Any]], versions: list[str]) -> list[str]:
    """List the problems of manifests in each version of Kubernetes (1.29)."""
    messages = []
    for version in versions:
        for manifest in manifests:
            name = f"{version} {manifest['kind']}/{manifest['metadata'].get('name', '')}"
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                messages.append(f"{name}: {error.message}")
            except kubernetes_validate.SchemaNotFoundError:
                messages.append(f"{name}: unknown kind")
    return messages


if __name__ == "__main__":
    json.dump(problems(json.load(sys.stdin), sys.argv[1:]), sys.stdout)
