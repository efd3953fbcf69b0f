"""Generator of documents (`make docs`): settings, metrics, routes, failure modes, and measured figures.

Figures come only from bench/results. A test compares every document with the generated text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from shoehorn.common.paths import HOME
from shoehorn.config.other_variables import COMPOSE, INSIDE_ONLY, PASSED, Variable
from shoehorn.config.settings import TABLE

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fault_table  # the path is set just above
import metrics_document  # likewise
import model_table
import parser_document  # likewise
import routes_document  # likewise

RESULTS = HOME / "bench" / "results"

_INTRODUCTION = """# Configuration

Every setting is an environment variable; with compose, put them into `.env` (start from `.env.example`).
An empty variable counts as unset. An invalid value stops the start with exit code 2 and one line per error. A setting
marked *secret* can be read from a file instead: `NAME_FILE` names the file. Setting both is an error.

Precedence, highest first: `VLLM_EXTRA_ARGS`, settings, the profile, values computed from model and machine. Three
values in a profile are upper bounds: `max-model-len` (not in vLLM's own config.yaml), `max-num-seqs` for models with
states, and `cpu-offload-gb`. The plan offloads the smallest amount that leaves enough KV cache for
two requests of full length, and nothing if all weights fit on the GPU.

| setting | default | meaning |
|---|---|---|
"""


_COMPOSE = """
## Variables of docker-compose.yml

Compose reads these on the host, from `.env` or its own environment. Inside the container `PORT` is always 6333,
`METRICS_PORT` 6334 and `MODELS_DIR` `/models`. All of `.env` reaches the container; of the host's environment, the
settings above and the variables of the next section do, and override `.env`.

| variable | default | meaning |
|---|---|---|
"""

_PASSED = """
## Other variables

Libraries, CUDA and the engine read these. Variables of vLLM and NCCL that are not listed here also take effect from
`.env`, except those that open routes or load code.

| variable | meaning |
|---|---|
"""


def configuration() -> str:
    """Generate docs/configuration.md."""
    rows = []
    for setting in TABLE:
        default = f"`{setting.default}`" if setting.default else ""
        secret = " *Secret.*" if setting.secret else ""
        rows.append(f"| `{setting.name}` | {default} | {setting.help}{secret} |\n")
    compose = [f"| `{each.name}` | {f'`{each.default}`' if each.default else ''} | {each.help} |\n" for each in COMPOSE]
    passed = [f"| `{name}` | {meaning} |\n" for name, meaning in _by_meaning(PASSED)]
    return "".join((_INTRODUCTION, *rows, _COMPOSE, *compose, _PASSED, *passed))


def _by_meaning(variables: Iterable[Variable]) -> Iterator[tuple[str, str]]:
    """Group the names of variables with the same text."""
    for meaning, group in groupby(variables, lambda each: each.help):
        yield "`, `".join(each.name for each in group), meaning


def example() -> str:
    """Generate .env.example: settings and variables, commented out, with their defaults."""
    lines = ["# Copy to .env and uncomment the settings to change. Reference: docs/configuration.md.\n"]
    for setting in TABLE:
        if setting.name not in INSIDE_ONLY:
            lines.append(f"\n# {setting.help}\n#{setting.name}={setting.default}\n")
    lines.append("\n\n# Variables of docker-compose.yml.\n")
    lines += [f"\n# {each.help}\n#{each.name}={each.default}\n" for each in COMPOSE]
    lines.append("\n\n# Variables of libraries, CUDA and the engine.\n")
    for meaning, group in groupby(PASSED, lambda each: each.help):
        lines.append(f"\n# {meaning}\n" + "".join(f"#{each.name}=\n" for each in group))
    return "".join(lines)


_BEGIN, _END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
_STARTS = {"bf16": "bf16, resident", "nf4": "NF4, resident",
           "nf4-offloaded": "NF4 in 5 GiB (`VRAM_LIMIT=5GiB`), partly offloaded"}
_LOW_VRAM = {"70b-int4-3072mib": "INT4, all layers offloaded", "70b-int4-7168mib": "INT4, all layers offloaded",
             "70b-int4-3584mib-4096": "INT4, all layers offloaded by UVA, 4,096 tokens",
             "70b-int4-7168mib-fp8": "INT4, all layers offloaded, fp8 KV cache",
             "70b-nf4-7168mib": "NF4, all layers offloaded",
             "70b-int4-8192mib-draft": "INT4, all layers offloaded, 8B INT4 draft (simulated acceptance length 5)",
             "70b-int4-32gb": "INT4, a third of the layers offloaded", "70b-int4-40gib": "INT4, resident",
             "70b-int4-3072mib-ngram": "INT4, all layers offloaded, n-gram draft tokens (zero weights, all accepted)",
             "70b-int4-2x20gib": "INT4, resident, two GPUs (each)"}
_CHINESE = {"bf16, resident": "bf16，全部驻留", "NF4, resident": "NF4，全部驻留",
            "NF4 in 5 GiB (`VRAM_LIMIT=5GiB`), partly offloaded": "NF4，限 5 GiB（`VRAM_LIMIT=5GiB`），部分卸载",
            "INT4, all layers offloaded": "INT4，所有层卸载", "NF4, all layers offloaded": "NF4，所有层卸载",
            "INT4, all layers offloaded by UVA, 4,096 tokens": "INT4，所有层以 UVA 卸载，上下文 4,096 token",
            "INT4, all layers offloaded, fp8 KV cache": "INT4，所有层卸载，fp8 KV 缓存",
            "INT4, all layers offloaded, 8B INT4 draft (simulated acceptance length 5)":
                "INT4，所有层卸载，8B INT4 草稿模型（模拟接受长度 5）",
            "INT4, a third of the layers offloaded": "INT4，三分之一的层卸载", "INT4, resident": "INT4，全部驻留",
            "INT4, all layers offloaded, n-gram draft tokens (zero weights, all accepted)":
                "INT4，所有层卸载，n-gram 草稿 token（零权重，全部接受）",
            "INT4, resident, two GPUs (each)": "INT4，全部驻留，两张 GPU（每张）"}


def filled(path: str, template: str, **files: str) -> Callable[[], str]:
    """Return the generator of a document whose figures, between its two marks, come from `files` of bench/results."""

    def document() -> str:
        results = {name: json.loads((RESULTS / file).read_text(encoding="utf-8")) for name, file in files.items()}
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701  # for Markdown
        text = (HOME / "tools" / template).read_text(encoding="utf-8")
        head, rest = (HOME / path).read_text(encoding="utf-8").split(_BEGIN)
        figures = environment.from_string(text).render(**results, starts=_STARTS, low_vram=_LOW_VRAM, zh=_CHINESE)
        return head + _BEGIN + figures + _END + rest.split(_END)[1]

    return document


_README_RESULTS = {"gpu": "appliance-h200.json", "demo": "demo.json", "soak": "soak.json", "vram": "low-vram.json"}
DOCUMENTS = {Path("README.md"): filled("README.md", "measured.md.j2", **_README_RESULTS),
             Path("README.zh-CN.md"): filled("README.zh-CN.md", "measured.zh-CN.md.j2", **_README_RESULTS),
             Path("docs/low-vram.md"): filled("docs/low-vram.md", "low-vram.md.j2", vram="low-vram.json"),
             Path("docs/int4.md"): filled("docs/int4.md", "int4.md.j2", quality="int4-quality.json",
                                          speed="convert-speed.json"),
             Path("docs/configuration.md"): configuration, Path(".env.example"): example,
             Path("docs/metrics.md"): metrics_document.document, Path("docs/routes.md"): routes_document.document,
             Path("docs/reliability.md"): fault_table.document,
             Path("docs/models.md"): model_table.document, Path("docs/parsers.md"): parser_document.document}

if __name__ == "__main__":
    for path, text in DOCUMENTS.items():
        (HOME / path).write_text(text(), encoding="utf-8")
        print(path)
