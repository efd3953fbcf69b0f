"""The command `shoehorn`: each subcommand is a module of `commands`; errors become a message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence

from shoehorn import __version__
from shoehorn.common.errors import EXIT_NOT_READ, ShoehornError
from shoehorn.config import network

COMMANDS = {
    "serve": "plan for this machine, and run everything until stopped",
    "plan": "print the plan for this or another machine, without a GPU or a download",
    "profiles": "list the profiles and their result on this machine",
    "pull": "fetch a model into the volume and verify every file",
    "convert": "convert a model in the volume to INT4, once",
    "models": "list the models in the volume, and remove them",
    "keys": "add, list, rotate and revoke API keys",
    "drain": "refuse new requests, finish running ones, and wait until the appliance can be stopped",
    "bench": "measure the speed of the running appliance, and compare it with the plan",
    "doctor": "check the machine, the volume and the programs that serving needs",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line parser with all subcommands."""
    top = argparse.ArgumentParser(
        prog="shoehorn", description="Fits big language models onto small GPUs.",
        epilog="Settings come from environment variables; docs/configuration.md lists them. Exit codes: 0 done, "
               "2 invalid settings, 3 does not fit, 4 model unavailable, 5 engine failed.")
    top.add_argument("--version", action="version", version=f"shoehorn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"shoehorn.commands.{name}")
        module.add_arguments(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return top


def _is_unread(descriptor: int) -> bool:
    """Return True for a pipe whose reader has closed it, like `head`."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code."""
    arguments = parser().parse_args(argv)
    for remark in network.prepare(os.environ):
        print(f"shoehorn: {remark}", file=sys.stderr)
    module = importlib.import_module(f"shoehorn.commands.{arguments.command}")
    try:
        code = int(module.run(arguments, os.environ))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes the rest there
        return EXIT_NOT_READ
    except ShoehornError as error:
        print(f"shoehorn: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
