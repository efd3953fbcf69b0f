"""The command `shoehorn`: one subcommand a module of `commands`; errors become a message and a documented exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence

from shoehorn import __version__
from shoehorn.common.errors import EXIT_NOT_READ, ShoehornError

COMMANDS = {
    "serve": "look at the machine, plan, and run everything until stopped",
    "plan": "say what would run on this or another machine, without a GPU or a download",
    "profiles": "list the profiles",
    "pull": "fetch a model into the volume and check every file",
    "convert": "make a model's weights INT4, once, in the volume",
    "models": "list the models of the volume, and remove them",
    "keys": "add, list, rotate and revoke API keys",
    "drain": "refuse new requests, let running ones finish, and wait until it can be stopped",
    "bench": "measure the running appliance's speed, beside what its plan expected",
    "doctor": "check the machine, the volume and the programs that serving needs",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand's module is imported only here and when it runs."""
    top = argparse.ArgumentParser(
        prog="shoehorn", description="Fits big language models onto small GPUs.",
        epilog="Settings come from environment variables; docs/configuration.md lists them. Exit codes: 0 done, "
               "2 bad settings, 3 does not fit, 4 model not to be had, 5 engine failed.")
    top.add_argument("--version", action="version", version=f"shoehorn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"shoehorn.commands.{name}")
        module.add_arguments(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return top


def _is_unread(descriptor: int) -> bool:
    """Whether it is a pipe whose reader has seen enough, like `head`."""
    watched = select.poll()
    watched.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in watched.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = parser().parse_args(argv)
    module = importlib.import_module(f"shoehorn.commands.{arguments.command}")
    try:
        code = int(module.run(arguments, os.environ))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter writes the rest there
        return EXIT_NOT_READ
    except ShoehornError as error:
        print(f"shoehorn: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
