"""`shoehorn keys show|rotate`: the key alone on standard output, words about it on standard error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping

import httpx

from shoehorn import gateway, keys
from shoehorn import settings as settings_module
from shoehorn.errors import EXIT_DONE, SettingsError, ShoehornError
from shoehorn.keys import ApiKey
from shoehorn.settings import Settings

_FORCE_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`show [--json]` and `rotate`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the key in force")
    show.add_argument("--json", action="store_true", help="print {key, origin, file}")
    actions.add_parser("rotate", help="replace the generated key, at once also in a running server")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Show or rotate; returns the exit code."""
    settings = settings_module.load(environment)
    return _rotate(settings) if arguments.action == "rotate" else _show(settings, arguments.json)


def _show(settings: Settings, as_json: bool) -> int:
    key = keys.in_force(settings)
    if key is None:
        raise SettingsError(f"There is no key yet: API_KEY is not set, and {keys.path(settings)} is not there.",
                            "Start the server, which generates one, or type: shoehorn keys rotate")
    file = str(keys.path(settings)) if key.origin == "volume" else None
    if as_json:
        print(json.dumps({"key": key.value, "origin": key.origin, "file": file}))
    else:
        print(f"from {file or 'API_KEY or API_KEY_FILE'}", file=sys.stderr)
        print(key.value)
    return EXIT_DONE


def _rotate(settings: Settings) -> int:
    key = keys.rotate(settings)
    if pid := gateway.master(settings.run_dir):
        keys.write_map(settings.run_dir, [key.value])
        gateway.reload(pid)
        _wait_until_in_force(settings, key)
        print(f"in force; answers that the old key started have {max(1, settings.drain_timeout)} s to end",
              file=sys.stderr)
    else:
        print("no server runs here; the new key holds from its next start", file=sys.stderr)
    print(key.value)
    return EXIT_DONE


def _wait_until_in_force(settings: Settings, key: ApiKey) -> None:
    """Ask for an address that nobody serves: 401 means that the key is not known.

    Raises:
        ShoehornError: the running gateway does not take the key.
    """
    deadline = time.monotonic() + _FORCE_SECONDS
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"http://127.0.0.1:{settings.port}/v1/", trust_env=False,
                               headers={"Authorization": f"Bearer {key.value}"}, timeout=_FORCE_SECONDS)
            if answer.status_code != httpx.codes.UNAUTHORIZED:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise ShoehornError("The new key is in the volume, but the running gateway still refuses it.",
                        "Restart the container; until then the old key holds.")
