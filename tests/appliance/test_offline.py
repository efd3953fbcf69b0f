"""A model copied to a machine without a network, and served there without any attempt to reach another machine.

The machine is a network namespace with only a loopback interface. Its kernel counts packets without a route, including
those of name resolution.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.hub import Hub
from shoehorn.runtime.state import Phase
from support.pulling import Volume
from support.running import DEMO_MODEL, TEST_KEY, Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.engine

_LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh22x", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
os.execv(sys.argv[1], sys.argv[1:])
"""
ISOLATED = ("unshare", "--net", sys.executable, "-c", _LOOPBACK_UP)
_ASK = """
import sys, urllib.request
url, key, body = sys.argv[1:]
print(urllib.request.urlopen(urllib.request.Request(url, body.encode(), {
    "Authorization": f"Bearer {key}", "Content-Type": "application/json"})).read().decode())
"""


def run_inside(appliance: Appliance, *command: str) -> str:
    """Run a command in the appliance's network and return its output."""
    return subprocess.run(["nsenter", f"--target={appliance.process.pid}", "--net", *command], capture_output=True,
                          text=True, timeout=60, check=True).stdout


def unroutable(appliance: Appliance) -> int:
    """Return the number of packets to other machines."""
    names, values = re.findall(r"^Ip: (.*)$", run_inside(appliance, "cat", "/proc/net/snmp"), re.MULTILINE)
    counters = dict(zip(names.split(), values.split(), strict=True))
    more = re.search(r"^Ip6OutNoRoutes\s+(\d+)", run_inside(appliance, "cat", "/proc/net/snmp6"), re.MULTILINE)
    assert more
    return int(counters["OutNoRoutes"]) + int(more[1])


@pytest.mark.fault("A machine without a network, and a model that was copied there",
                   "Verified by its manifest and served; no packet to another machine, not even of name resolution.")
def test_copied_model_is_served_without_a_network(tmp_path: Path) -> None:
    stick, here = tmp_path / "stick", tmp_path / "here"
    with Hub({"shoehorn/demo": DEMO_MODEL}) as hub:
        assert Volume(tmp_path, hub, MODEL_ID="shoehorn/demo").pull("--to", str(stick))[0] == 0
    shutil.copytree(stick, here, copy_function=shutil.copyfile)  # with new timestamps, so that the content is checked
    appliance = Appliance(tmp_path, within=ISOLATED, MODEL_ID=str(here / "shoehorn" / "demo"), OFFLINE="yes")
    try:
        appliance.wait_for(Phase.READY)
        body = json.dumps({"model": "shoehorn-demo", "messages": [{"role": "user", "content": "你叫啥?"}]})
        answer = run_inside(appliance, sys.executable, "-c", _ASK, f"{appliance.url}/v1/chat/completions", TEST_KEY,
                            body)
        assert "Shoehorn" in json.loads(answer)["choices"][0]["message"]["content"]
        assert unroutable(appliance) == 0
        run_inside(appliance, sys.executable, "-c", "import socket\ntry: socket.getaddrinfo('modelscope.cn', 443)\n"
               "except OSError as error: print(error)")
        assert unroutable(appliance) > 0, "the counter works"
        wait_until(lambda: "ready after" in appliance.output, 5, "readiness")
        assert appliance.stop() == 0
    finally:
        appliance.discard()
