"""Writes the generated documents: `make docs`. A test compares each with what this makes, so that none can go stale.

Settings, metrics and routes come from their tables, and the README's figures from bench/results and nowhere else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from shoehorn import metric_table, route_table
from shoehorn.paths import HOME
from shoehorn.settings import TABLE

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fault_table  # the path is set just above

RESULTS = HOME / "bench" / "results"

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


_BEGIN, _END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
_STARTS = {"bf16": "bf16, on the card", "nf4": "NF4, on the card",
           "nf4-offloaded": "NF4 in 5 GiB (`VRAM_LIMIT=5GiB`), partly in host memory"}


def measured() -> str:
    """The README's figures, as Markdown."""
    results = {name: json.loads((RESULTS / file).read_text(encoding="utf-8"))
               for name, file in (("gpu", "appliance-h200.json"), ("demo", "demo.json"))}
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701  # it makes Markdown
    text = (HOME / "tools" / "measured.md.j2").read_text(encoding="utf-8")
    return template.from_string(text).render(**results, starts=_STARTS)


def readme() -> str:
    """README.md with its figures as they are in bench/results."""
    text = (HOME / "README.md").read_text(encoding="utf-8")
    head, rest = text.split(_BEGIN)
    return head + _BEGIN + measured() + _END + rest.split(_END)[1]


DOCUMENTS = {Path("README.md"): readme, Path("docs/configuration.md"): configuration, Path(".env.example"): example,
             Path("docs/metrics.md"): metric_table.document, Path("docs/routes.md"): route_table.document,
             Path("docs/reliability.md"): fault_table.document}

if __name__ == "__main__":
    for path, text in DOCUMENTS.items():
        (HOME / path).write_text(text(), encoding="utf-8")
        print(path)
