"""The planner differs from the oracle's records exactly where listed, and the installed vLLM reproduces a record.

After an intended change of the planner, run `PYTHONPATH=tests python -m contract.oracle.report --write`, then
`make docs`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contract.oracle import compare, report, store

pytestmark = pytest.mark.contract


def test_planner_differs_exactly_where_listed() -> None:
    rows = [row for name in store.names() for row in compare.compare(name, store.load(name), (1, 2, 4))]
    assert report.differences(rows) == json.loads(report.DIFFERENCES.read_text(encoding="utf-8"))
    assert report.agreeing(rows) == json.loads(report.COMPARED.read_text(encoding="utf-8"))


def test_engine_reproduces_a_record(tmp_path: Path) -> None:
    name = "qwen3-embedding-0.6b"
    program = ("import sys; from pathlib import Path; from contract.oracle import __main__, store; "
               "store.FOLDER = Path(sys.argv.pop()); sys.exit(__main__.main())")
    document = store.load(name)
    (tmp_path / f"{name}.json").write_text(
        json.dumps({key: value for key, value in document.items() if key not in ("tensors", "truth")}))
    subprocess.run([sys.executable, "-c", program, name, "--log", str(tmp_path / "log"), str(tmp_path)], check=True,
                   cwd=Path(__file__).parents[1], env={"PYTHONPATH": str(Path(__file__).parents[1])})
    assert json.loads((tmp_path / f"{name}.json").read_text()) == document
