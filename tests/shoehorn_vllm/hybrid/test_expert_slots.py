"""The expert cache's kernels in Triton's interpreter; on a GPU: tests/gpu/expert_cache.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRITON = ROOT / ".venv-triton" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


@pytest.mark.contract
@pytest.mark.parametrize("seed", [1, 2])
def test_needed_experts_are_cached_and_least_recently_used_ones_evicted(seed: int) -> None:
    assert (TRITON / "triton").is_dir(), "`make test-contract` installs it"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("expert_slots_check.py")), str(seed)], text=True,
        capture_output=True, timeout=240,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}:{TRITON}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


@pytest.mark.contract
def test_choices_are_divided_between_gpu_and_cpu_and_experts_are_repacked_as_by_vllm() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("expert_share_check.py")), "1"], text=True, capture_output=True,
        timeout=240, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}:{TRITON}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.contract
def test_streamed_weights_are_unpacked_as_the_checkpoint_means_them() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("unpack_check.py"))], text=True, capture_output=True, timeout=240,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}:{TRITON}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
