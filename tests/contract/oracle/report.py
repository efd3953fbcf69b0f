"""Print the comparison of planner and oracle: `PYTHONPATH=tests python -m contract.oracle.report`.

`--write` stores what differs, and for the planner the architectures that agree; tests/contract/test_oracle.py compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from contract.oracle import store
from contract.oracle.compare import NUMBERS, Row, compare

DIFFERENCES = Path(__file__).resolve().parents[1] / "differences.json"

COMPARED = Path(__file__).resolve().parents[3] / "src" / "shoehorn" / "model" / "compared.json"

_SHORT = {"weights_bytes": "weights", "bytes_per_token": "KV/token", "state_bytes": "states",
          "request_bytes": "request", "max_model_len": "context"}


def main() -> int:
    """Print a table; exit code 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1])
    parser.add_argument("--write", action="store_true", help="store the differences of all models")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.names, arguments.gpus = [], [1, 2, 4]
    rows = [row for name in arguments.names or store.names()
            for row in compare(name, store.load(name), tuple(arguments.gpus))]
    print("| model | architecture | GPUs | " + " | ".join(_SHORT.get(key, key) for key in NUMBERS) + " | windows |")
    print("|---" * (len(NUMBERS) + 4) + "|")
    for row in rows:
        print(_line(row))
    counts = Counter(key for row in rows for key in row.off)
    refused = Counter(row.refused.partition(":")[0] for row in rows if row.refused)
    if arguments.write:
        COMPARED.write_text(json.dumps(agreeing(rows), indent=0) + "\n", encoding="utf-8")
        DIFFERENCES.write_text(_lines(differences(rows)), encoding="utf-8")
    right = sum(1 for row in rows if not row.off and not row.refused)
    print(f"\n{len(rows)} records of {len({row.architecture for row in rows})} architectures: {right} right; off in "
          + ", ".join(f"{key} {number}" for key, number in counts.most_common())
          + "; no figures from " + ", ".join(f"{who} {number}" for who, number in refused.items()))
    return 0 if right == len(rows) else 1


def differences(rows: Iterable[Row]) -> dict[str, Any]:
    """Return `MODEL on GPUS` -> {figure: [planner's, oracle's]}, or which of the two has no figures."""
    return {f"{row.name} on {row.gpus}":
            row.refused.partition(":")[0] or {key: list(row.off[key]) for key in sorted(row.off)}
            for row in rows if row.off or row.refused}


def agreeing(rows: Iterable[Row]) -> list[str]:
    """Return the architectures all of whose records agree, sorted."""
    by_architecture: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_architecture[row.architecture].append(row)
    return sorted(name for name, each in by_architecture.items() if not any(row.off or row.refused for row in each))


def _lines(entries: Mapping[str, Any]) -> str:
    """Write one entry per line."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()) + "\n}\n"


def _line(row: Row) -> str:
    start = f"| {row.name} | {row.architecture} | {row.gpus} | "
    if row.refused:
        return start + row.refused.replace("|", "/") + " |" * (len(NUMBERS) + 1)
    return start + " | ".join(_cell(key, row.off.get(key)) for key in (*NUMBERS, "windows")) + " |"


def _cell(key: str, values: tuple[Any, Any] | None) -> str:
    """`ok`, or planner -> truth; bytes as a ratio, too."""
    if values is None:
        return "ok"
    planned, true = values
    if key.endswith("bytes") or key == "bytes_per_token":
        ratio = f" ({planned / true:.2f}x)" if true else ""
        return f"{_size(planned)} -> {_size(true)}{ratio}"
    return f"{planned} -> {true}"


def _size(number: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


if __name__ == "__main__":
    sys.exit(main())
