"""Work of a forked process: an API server, or a process of vLLM's `multiprocessing`."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from shoehorn_vllm.fork_server import process, threads
from shoehorn_vllm.fork_server.preload import API_SERVER
from shoehorn_vllm.fork_server.server import Order

TITLE = "VLLM::APIServer"


def begin(order: Order) -> Callable[[], object]:
    """Give the process its group, environment, output and threads; return its work."""
    os.setpgid(0, order.group)
    data, _status, output, *others = order.descriptors  # the status stays open until the process has exited
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    os.environ.clear()
    os.environ.update(order.environment)
    threads.bind(order.imported, order.environment)
    gc.enable()
    process.fork_processes_from(order.connection)
    if order.serve is None:
        return partial(process.receive_process, others, data)
    return partial(_serve, order.serve)


def _serve(arguments: Sequence[str]) -> object:
    set_title(TITLE)
    sys.argv = [API_SERVER, *arguments]
    return importlib.import_module(API_SERVER).main()


def set_title(title: str) -> None:
    """Name this process in the list of processes, as vLLM does with the same library."""
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)
