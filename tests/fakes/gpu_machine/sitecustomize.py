"""NVML as recorded on an H200, for programs with this folder first on PYTHONPATH."""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from fakes.nvml import FakeNvml  # noqa: E402  # the path is extended above

capture = json.loads((HERE.parents[1] / "captures" / "nvml-h200.json").read_text(encoding="utf-8"))
for name, value in json.loads(os.environ.get("STANDIN_GPU", "{}")).items():
    capture["gpus"][0][name] = value
sys.modules["pynvml"] = FakeNvml(capture)  # type: ignore[assignment]  # it has the functions that the appliance calls
