"""A calibration keeps to its planned memory: it runs in a process whose memory is limited to the plan."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support.converting import local, readable, write_model

pytestmark = pytest.mark.process

PLANNED_BYTES = 96 << 20
"""Too little for the widest matrix at once: 5 matrices of 2048 x 2048 in float32 are 84 MB, the layer 2 x 15 MB."""

PROGRAM = textwrap.dedent("""
    import resource, sys, torch
    from transformers import AutoModelForCausalLM, LlamaConfig  # before the limit
    from shoehorn.config import settings
    from shoehorn.int4 import convert, quantizer
    from shoehorn.int4.calibration import budget
    from shoehorn.int4.journal import Limits
    torch.set_num_threads(1)
    quantizer.quantize(torch.randn(4, 256), 4, 128, torch.bfloat16)  # compiles
    AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                                 vocab_size=32, num_attention_heads=4))(torch.zeros(1, 4).long())
    planned, slack = int(sys.argv[1]), int(sys.argv[2])
    host = int((planned + budget._HOST_BASE_BYTES) / budget._HOST_SHARE)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    resource.setrlimit(resource.RLIMIT_DATA, 2 * (int(status["VmData"].split()[0]) * 1024 + planned + slack,))
    import os
    convert.convert(settings.load(os.environ), convert.ConversionOptions(16, limits=Limits(host)), 1, lambda _: None)
    """)


def run(environment: dict[str, str], slack: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(PLANNED_BYTES), str(slack)], capture_output=True,
                          text=True, env={**environment, "PYTHONPATH": ":".join(sys.path)}, timeout=300)


def test_calibration_runs_within_its_planned_memory(tmp_path: Path) -> None:
    model = readable(write_model(tmp_path / "wide", 2, 512, 2048))
    environment = local(tmp_path, model, CALIBRATION=str(tmp_path / "text.txt"))
    done = run(environment, slack=96 << 20)  # the buffers of the shards' workers, and the allocator
    assert done.returncode == 0, done.stderr[-2000:]
    journal = json.loads((tmp_path / "models/local/wide.int4/conversion.json").read_text())["calibration"]
    assert journal["budget"]["total_bytes"] <= PLANNED_BYTES
    assert journal["budget"]["columns"] < 2048, "the limit did not matter"
    assert all(error < free for error, free in journal["output_errors"].values())
