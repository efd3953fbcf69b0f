"""The program: `python -m shoehorn_vllm.fork_server DESCRIPTOR`, the descriptor of the engine program's connection."""

from __future__ import annotations

import os
import socket
import sys
import time

from shoehorn_vllm.fork_server import child, messages, preload
from shoehorn_vllm.fork_server.server import Server

TITLE = "shoehorn: fork server"


def main() -> object:
    """Import vLLM and serve orders; in a forked child, do its work and return its exit status."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    before, begun = dict(os.environ), time.monotonic()
    child.set_title(TITLE)  # it must be set once before the environment is replaced, or a child cannot set its own
    read = preload.import_engine()
    seconds = time.monotonic() - begun
    if reason := preload.why_unusable():
        messages.send(control, {"unusable": reason})
        return 1
    sys.stdout.flush()
    messages.send(control, {"ready": round(seconds, 3)})
    work = Server(control, read, before, child.begin).run()
    return work() if work else 0


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[arg-type]  # None, an exit status or a message, as the work returned it
