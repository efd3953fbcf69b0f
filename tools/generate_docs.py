"""Writes the generated documents: `make docs`. A test compares each with what this makes, so that none can go stale.

Settings, metrics and routes come from their tables, figures from bench/results and nowhere else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from shoehorn.common.paths import HOME
from shoehorn.config.settings import TABLE
from shoehorn.gateway import route_policy
from shoehorn.observability import metrics

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
_LOW_VRAM = {"70b-int4-3072mib": "INT4, all layers offloaded", "70b-int4-7168mib": "INT4, all layers offloaded",
             "70b-int4-3584mib-4096": "INT4, all layers offloaded by UVA, 4,096 tokens",
             "70b-int4-7168mib-fp8": "INT4, all layers offloaded, fp8 KV cache",
             "70b-nf4-7168mib": "NF4, all layers offloaded",
             "70b-int4-8192mib-draft": "INT4, all layers offloaded, with an 8B in INT4 as draft (acceptance drawn, 5)",
             "70b-int4-32gb": "INT4, a third of the layers offloaded", "70b-int4-40gib": "INT4, on the card",
             "70b-int4-3072mib-ngram": "INT4, all layers offloaded, tokens guessed from the text (zeros: all right)",
             "70b-int4-2x20gib": "INT4, on two cards (each)"}


def filled(path: str, template: str, **files: str) -> Callable[[], str]:
    """What makes a document whose figures, between its two marks, are those of `files` of bench/results."""

    def document() -> str:
        results = {name: json.loads((RESULTS / file).read_text(encoding="utf-8")) for name, file in files.items()}
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701  # for Markdown
        text = (HOME / "tools" / template).read_text(encoding="utf-8")
        head, rest = (HOME / path).read_text(encoding="utf-8").split(_BEGIN)
        made = environment.from_string(text).render(**results, starts=_STARTS, low_vram=_LOW_VRAM)
        return head + _BEGIN + made + _END + rest.split(_END)[1]

    return document


DOCUMENTS = {Path("README.md"): filled("README.md", "measured.md.j2", gpu="appliance-h200.json", demo="demo.json",
                                       soak="soak.json", vram="low-vram.json"),
             Path("docs/low-vram.md"): filled("docs/low-vram.md", "low-vram.md.j2", vram="low-vram.json"),
             Path("docs/int4.md"): filled("docs/int4.md", "int4.md.j2", quality="int4-quality.json",
                                          speed="convert-speed.json"),
             Path("docs/configuration.md"): configuration, Path(".env.example"): example,
             Path("docs/metrics.md"): metrics.document, Path("docs/routes.md"): route_policy.document,
             Path("docs/reliability.md"): fault_table.document}

if __name__ == "__main__":
    for path, text in DOCUMENTS.items():
        (HOME / path).write_text(text(), encoding="utf-8")
        print(path)
