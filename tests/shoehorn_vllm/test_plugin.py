"""The engine plugin: loaded by the real engine, limited to its version, and still needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WAIT = """
import os, time
import vllm.plugins
import zmq
vllm.plugins.load_general_plugins()
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

def spun():
    raise SystemExit("SPUN")

os.sched_yield = spun
SpinCondition(is_reader=True, context=zmq.Context(), notify_address="ipc:///tmp/unused").wait()
print("SLEPT")
"""


def wait(plugins: str) -> str:
    done = subprocess.run([sys.executable, "-c", WAIT], text=True, capture_output=True, timeout=100,
                          env={**os.environ, "VLLM_PLUGINS": plugins})
    return done.stdout + done.stderr


@pytest.mark.contract
def test_patched_engine_on_a_cpu_sleeps_while_waiting() -> None:
    assert "SLEPT" in wait("shoehorn")


@pytest.mark.contract
def test_unpatched_engine_spins() -> None:
    assert "SPUN" in wait(""), "the engine sleeps without it: remove the patch"


def test_other_version_of_the_engine_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoehorn_vllm import plugin

    monkeypatch.setitem(plugin.TESTED, "vllm", "0.31.0")
    with pytest.raises(plugin.EngineVersionError, match=r"vllm 0\.32\.0 is unsupported \(tested: 0\.31\.0\)"):
        plugin.register()
