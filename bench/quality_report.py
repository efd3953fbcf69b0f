"""Write docs/quality.md's table and docs/images/quality.svg from bench/results/quality.json.

The plot has one panel for each text: bits per weight of the linear layers, and perplexity above bf16 in percent.
usage: bench/quality_report.py
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "quality.json"
PAGE, PLOT = HOME / "docs" / "quality.md", HOME / "docs" / "images" / "quality.svg"
TEXTS = ("english", "chinese", "code")
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 240, 50, 40, 40
COLORS = {"INT4 calibrated": "#1a7f37", "INT4": "#bc4c00", "NF4": "#8250df", "Q": "#0969da"}


def table(variants: dict[str, Any]) -> str:
    """Return the Markdown table."""
    lines = ["| weights | bits | " + " | ".join(f"{text}: perplexity | KL | top-1" for text in TEXTS) +
             " | arithmetic, facts, format |", "|---" * (3 + 3 * len(TEXTS)) + "|"]
    for name, figures in variants.items():
        cells = [name, f"{figures['bits']:.2f}"]
        for text in TEXTS:
            own, exact = figures[text], variants["bf16"][text]["perplexity"]
            excess = 100 * (own["perplexity"] / exact - 1)
            if name == "bf16":
                cells += [f"{own['perplexity']:.2f}", "", ""]
            else:
                cells += [f"{own['perplexity']:.2f} (+{excess:.0f} %)", f"{own['kl_mean']:.3f}",
                          f"{100 * own['same_top1']:.0f} %"]
        cells.append(", ".join(f"{100 * share:.0f} %" for share in figures["answers"].values()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(variants: dict[str, Any]) -> str:
    """Return the plot as SVG."""
    bits = [figures["bits"] for name, figures in variants.items() if name != "bf16"]
    low, high = min(bits) - 0.25, max(bits) + 0.6
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + (WIDTH + GAP) * len(TEXTS)}" '
             f'height="{TOP + HEIGHT + 45}" font-family="sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>']
    for number, text in enumerate(TEXTS):
        exact = variants["bf16"][text]["perplexity"]
        excess = {name: 100 * (figures[text]["perplexity"] / exact - 1) for name, figures in variants.items()}
        most = max(excess.values()) * 1.15
        left = LEFT + number * (WIDTH + GAP)
        parts.append(f'<text x="{left}" y="20" font-size="13">{text}: perplexity above bf16, %</text>')
        parts.append(f'<path d="M{left} {TOP}v{HEIGHT}h{WIDTH}" fill="none" stroke="#57606a"/>')
        for step in range(5):
            value, y = most * step / 4, TOP + HEIGHT - HEIGHT * step / 4
            parts.append(f'<text x="{left - 5}" y="{y + 4:.0f}" text-anchor="end">{value:.0f}</text>')
        for tick in range(int(low) + 1, int(high) + 1):
            x = left + WIDTH * (tick - low) / (high - low)
            parts.append(f'<text x="{x:.0f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{tick}</text>')
        parts.append(f'<text x="{left + WIDTH / 2:.0f}" y="{TOP + HEIGHT + 34}" text-anchor="middle">bits per weight'
                     '</text>')
        for name, figures in variants.items():
            if name == "bf16":
                continue
            x = left + WIDTH * (figures["bits"] - low) / (high - low)
            y = TOP + HEIGHT - HEIGHT * excess[name] / most
            color = next(value for prefix, value in COLORS.items() if name.startswith(prefix))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
                         f'<text x="{x + 6:.1f}" y="{y - 4:.1f}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write both files."""
    variants = json.loads(RESULT.read_text(encoding="utf-8"))["variants"]
    page = PAGE.read_text(encoding="utf-8")
    measured = f"<!-- measured: begin -->\n{table(variants)}\n<!-- measured: end -->"
    PAGE.write_text(re.sub(r"<!-- measured: begin -->.*<!-- measured: end -->", lambda _: measured, page, flags=re.S),
                    encoding="utf-8")
    PLOT.write_text(plot(variants), encoding="utf-8")


if __name__ == "__main__":
    main()
