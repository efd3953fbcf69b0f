"""The fork server's loop: forks on order, reaps, and reports exits.

`Server.run` returns in each forked child, with the child's work: so a child leaves the loop of its parent by an
ordinary return, and ends like a program, with its exit handlers.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoehorn_vllm.fork_server import messages
from shoehorn_vllm.fork_server.preload import changed_names

Work = Callable[[], object]


@dataclass(frozen=True)
class Order:
    """An order, with everything that the child needs.

    Attributes:
        serve: arguments of an API server; None for a `multiprocessing` process.
        environment: of the process.
        connection: to the server, for the child's own orders.
        group: process group to join; 0 makes a new one.
        imported: the environment that the import left.
        descriptors: of the message.
    """

    serve: Sequence[str] | None
    environment: Mapping[str, str]
    connection: socket.socket
    group: int
    imported: Mapping[str, str]
    descriptors: Sequence[int]


@dataclass(frozen=True)
class _Child:
    group: int
    status: int
    connection: socket.socket


class Server:
    """The fork server.

    Args:
        control: connection of the engine program; the server exits when it is closed.
        read: variables that were read during the import.
        before: the environment before the import.
        begin: prepares the process of an order and returns its work.
    """

    def __init__(self, control: socket.socket, read: set[str], before: Mapping[str, str],
                 begin: Callable[[Order], Work]) -> None:
        self._control, self._read, self._begin = control, read, begin
        self._imported = dict(os.environ)
        self._set_by_import = {name: value for name, value in os.environ.items() if before.get(name) != value}
        self._groups = {control: 0}
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._wakeup, self._signalled = socket.socketpair()
        for end in (self._wakeup, self._signalled):
            end.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)

    def run(self) -> Work | None:
        """Serve orders; return a child's work in that child, and None in the server after its last order."""
        while True:
            ready = [key.fileobj for key, _ in self._selector.select()]
            with contextlib.suppress(BlockingIOError):
                self._wakeup.recv(4096)
            self._reap()  # first: an order of a dead engine must not be served
            for connection in ready:
                if connection in self._groups and isinstance(connection, socket.socket):
                    try:
                        work = self._serve(connection)
                    except EOFError:
                        if connection is self._control:
                            self._kill_all()
                            return None
                        self._forget(connection)
                        continue
                    if work:
                        return work

    def _serve(self, connection: socket.socket) -> Work | None:
        message, descriptors = messages.receive(connection)
        environment = {**message["environment"], **(self._set_by_import if connection is self._control else {})}
        changed = changed_names(self._read, self._imported, environment)
        if changed:
            answer: dict[str, Any] = {"changed": changed}
        else:
            mine, theirs = messages.connect()
            order = Order(message.get("serve"), environment, theirs, self._groups[connection], self._imported,
                          descriptors)
            pid = os.fork()
            if pid == 0:
                self._leave_to_child(mine)
                return self._begin(order)
            theirs.close()
            group = order.group or pid
            with contextlib.suppress(OSError):  # the child does the same: the order may not depend on which is first
                os.setpgid(pid, group)
            self._groups[mine] = group
            self._children[pid] = _Child(group, os.dup(descriptors[1]), mine)
            self._selector.register(mine, selectors.EVENT_READ)
            answer = {"pid": pid}
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # the client has died meanwhile
            messages.send(connection, answer)
        return None

    def _leave_to_child(self, connection: socket.socket) -> None:
        """Close in a child what belongs to the server; the child's own exit status stays open until its exit."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for each in (*self._groups, connection, self._wakeup, self._signalled):
            each.close()
        for child in self._children.values():
            os.close(child.status)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            child = self._children.pop(pid, None)
            if child is None:
                continue
            self._forget(child.connection)
            if child.group == pid:
                self._close_group(pid)
            with contextlib.suppress(OSError):  # the client has died meanwhile
                os.write(child.status, messages.pack_status(os.waitstatus_to_exitcode(status)))
            os.close(child.status)

    def _close_group(self, group: int) -> None:
        """Kill a group whose API server has exited, and accept no further order from it."""
        for connection in [each for each, owner in self._groups.items() if owner == group]:
            self._forget(connection)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)

    def _forget(self, connection: socket.socket) -> None:
        if self._groups.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()

    def _kill_all(self) -> None:
        for group in {child.group for child in self._children.values()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
