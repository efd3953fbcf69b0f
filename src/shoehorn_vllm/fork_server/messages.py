"""Messages between the fork server and its clients: JSON with file descriptors, over a Unix socket of packets.

Orders of a client:
- `{"serve": ARGUMENTS, "environment": {...}}` with [data, status, output]: fork an API server in a new process group;
- `{"environment": {...}}` with [data, status, output, resource tracker, ...]: fork a `multiprocessing` process whose
  pickle is in `data`, in the group of the client; it inherits the other descriptors.
`data` is the reading end of a pipe that the client keeps open while it lives. `status` is the writing end of a pipe
that gets the exit status, as `pack_status` writes it.
Answers: `{"pid": N}`, or `{"changed": NAMES}`: variables that were read during the import have other values.
After its import the server sends `{"ready": SECONDS}` or `{"unusable": REASON}` to the engine program.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

_LIMIT_BYTES = 1 << 20
_DESCRIPTORS = 253  # the kernel's limit
_STATUS = struct.Struct("i")


def connect() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new connection."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:  # a packet is at most as long as the buffer; an environment may have some 100 KB
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LIMIT_BYTES)
    return ends


def send(connection: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        OSError: the other end is closed, or the message is too long.
    """
    socket.send_fds(connection, [json.dumps(message).encode()], list(descriptors))


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message and its file descriptors, which the caller closes.

    Raises:
        EOFError: the other end is closed.
    """
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, _LIMIT_BYTES, _DESCRIPTORS)
    except ConnectionResetError:
        data, descriptors = b"", []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not data:
        raise EOFError
    return json.loads(data), descriptors


def pack_status(status: int) -> bytes:
    """Format an exit status; negative for a signal."""
    return _STATUS.pack(status)


def read_status(descriptor: int) -> int | None:
    """Read the exit status from a pipe; None if the server was killed before it could report one."""
    data = os.read(descriptor, _STATUS.size)
    return int(_STATUS.unpack(data)[0]) if len(data) == _STATUS.size else None
