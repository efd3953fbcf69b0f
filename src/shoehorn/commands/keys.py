"""`shoehorn keys add|list|usage|rotate|revoke`: a new key alone on standard output, messages on standard error.

Rules: a key is shown once, when it is created, because only its hash is stored; a running server applies every change
to the next request, and running answers continue; keys from API_KEY and API_KEYS_FILE are listed here and changed at
their source.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from shoehorn.commands import key_usage
from shoehorn.commands.output import print_table
from shoehorn.common.errors import EXIT_DONE, SettingsError
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.gateway.keys import sources
from shoehorn.gateway.keys.api_key import Key, parse_expiry, parse_limits, parse_name
from shoehorn.gateway.keys.store import KeyStore, NewKey

_OPTIONS = {
    "requests_per_minute": ("--requests-per-minute", "N", "maximum of requests in any 60 s"),
    "concurrent": ("--concurrent", "N", "maximum of concurrent requests"),
    "max_tokens": ("--max-tokens", "N", "maximum of tokens in one answer"),
    "body_bytes": ("--max-body", "SIZE", "maximum size of a request, for example 1MiB"),
    "tokens_per_day": ("--tokens-per-day", "N", "budget of tokens, prompts and answers, in a day (UTC)"),
    "tokens_per_month": ("--tokens-per-month", "N", "budget of tokens in a calendar month (UTC)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="create a key and print it once")
    add.add_argument("name", metavar="NAME", help="name of the user, for the log and the metrics")
    add.add_argument("--expires", metavar="WHEN", help="30d, 12h, or a date such as 2027-01-31 (UTC)")
    for field, (option, shape, text) in _OPTIONS.items():
        add.add_argument(option, metavar=shape, dest=field, help=text)
    listing = actions.add_parser("list", help="list the keys by name, with limits and last use")
    listing.add_argument("--json", action="store_true",
                         help="print [{name, source, created, last_used, expires, expired, limits}], Unix times")
    usage = actions.add_parser("usage", help="list used tokens by key and model, and what is left of the budgets")
    usage.add_argument("--since", metavar="WHEN", default="",
                       help="first day (UTC): 2026-11-01, or 7d for the last seven; default: this month")
    usage.add_argument("--json", action="store_true", help="print {since, usage: [{key, model, requests, "
                       "prompt_tokens, completion_tokens}], budgets: [{key, period, limit, used, renewed}]}")
    rotate = actions.add_parser("rotate", help="replace a key by a new one with the same limits, and print it")
    rotate.add_argument("name", metavar="NAME")
    revoke = actions.add_parser("revoke", help="revoke a key")
    revoke.add_argument("name", metavar="NAME")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run one action; return the exit code.

    Raises:
        SettingsError: invalid arguments, a name that exists or is unknown, or unreadable keys.
    """
    settings = settings_module.load(environment)
    if arguments.action == "list":
        return _list(settings, arguments.json)
    if arguments.action == "usage":
        return key_usage.show(settings, arguments.since, arguments.json)
    _require_changeable(settings, arguments.name)
    store = KeyStore(settings.models_dir)
    if arguments.action == "add":
        _show(store.add(_template(arguments)), "created")
    elif arguments.action == "rotate":
        _show(store.rotate(arguments.name, time.time()), "rotated; the old key is revoked")
    else:
        store.revoke(arguments.name)
        print(f"key {arguments.name!r} revoked", file=sys.stderr)
    return EXIT_DONE


def _template(arguments: argparse.Namespace) -> Key:
    words = {field: text for field in _OPTIONS if (text := getattr(arguments, field)) is not None}
    now = time.time()
    try:
        expires = parse_expiry(arguments.expires, now) if arguments.expires else None
        return Key(parse_name(arguments.name), b"", b"", now, expires, parse_limits(words))
    except ValueError as error:
        raise SettingsError(f"Key: {error}.", "Type: shoehorn keys add --help", code="invalid_key") from None


def _require_changeable(settings: Settings, name: str) -> None:
    """Refuse to change keys that are not stored in the volume."""
    _, source = sources.list_keys(settings).get(name, (None, "volume"))
    if source != "volume":
        raise SettingsError(f"Key {name!r}: already exists in {source}.", f"Change it there, or choose another name."
                            f"{' Then restart.' if source == 'API_KEY' else ''}", code="key_exists")


def _show(key: NewKey, action: str) -> None:
    print(f"key {key.key.name!r} {action}. It is shown only once:", file=sys.stderr)
    print(key.token)


def _list(settings: Settings, as_json: bool) -> int:
    used = KeyStore(settings.models_dir).last_used()
    now = time.time()
    rows = [{"name": name, "source": source, "created": None if source == "API_KEY" else key.created,
             "last_used": used.get(name), "expires": key.expires,
             "expired": key.expires is not None and key.expires <= now, "limits": key.limits.as_dict()}
            for name, (key, source) in sorted(sources.list_keys(settings).items())]
    if as_json:
        print(json.dumps(rows, indent=1))
        return EXIT_DONE
    if not rows:
        print("no keys; the next start creates one, or type: shoehorn keys add NAME", file=sys.stderr)
        return EXIT_DONE
    table = [["NAME", "SOURCE", "CREATED", "LAST USED", "EXPIRES", "LIMITS"]]
    table += [[str(row["name"]), str(row["source"]), _day(row["created"], "-"), _day(row["last_used"], "never"),
               "expired" if row["expired"] else _day(row["expires"], "never"), _limits(row["limits"])] for row in rows]
    print_table(table)
    return EXIT_DONE


def _day(moment: object, absent: str) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M}Z" if isinstance(moment, float) else absent


def _limits(limits: object) -> str:
    return ", ".join(f"{name}={value}" for name, value in limits.items()) if isinstance(limits, dict) else ""
