"""Writes docs/configuration.md and .env.example from the settings table, docs/metrics.md from the metrics: `make docs`.

A test compares each with what this makes, so that none can go stale.
"""

from __future__ import annotations

from pathlib import Path

from shoehorn import metric_table
from shoehorn.paths import HOME
from shoehorn.settings import TABLE

_INTRODUCTION = """# Configuration

Every setting is an environment variable; with compose, put them into `.env` (start from `.env.example`).
An empty variable counts as not set. A wrong value stops the start with exit code 2 and one line for each mistake.
A setting marked *secret* may instead be read from the file that `NAME_FILE` names; setting both is an error.

Precedence: `VLLM_EXTRA_ARGS` wins over the settings, a setting over the profile, the profile over what is worked out
from model and machine. One thing in a profile is an upper bound, not a value: `cpu-offload-gb`. The plan offloads the
least that leaves room for two requests of full length, and nothing when everything fits on the card.

| setting | default | meaning |
|---|---|---|
"""


def configuration() -> str:
    """The text of docs/configuration.md."""
    rows = []
    for setting in TABLE:
        default = f"`{setting.default}`" if setting.default else ""
        secret = " *Secret.*" if setting.secret else ""
        rows.append(f"| `{setting.name}` | {default} | {setting.help}{secret} |\n")
    return _INTRODUCTION + "".join(rows)


def example() -> str:
    """The text of .env.example: every setting, commented out, with its default."""
    lines = ["# Copy to .env and remove the # of what you change. docs/configuration.md says more.\n"]
    for setting in TABLE:
        lines.append(f"\n# {setting.help}\n#{setting.name}={setting.default}\n")
    return "".join(lines)


DOCUMENTS = {Path("docs/configuration.md"): configuration, Path(".env.example"): example,
             Path("docs/metrics.md"): metric_table.document}

if __name__ == "__main__":
    for path, text in DOCUMENTS.items():
        (HOME / path).write_text(text(), encoding="utf-8")
        print(path)
