"""The container's HEALTHCHECK: asks the gateway one question and exits 0 for yes, 1 for everything else.

    healthcheck.py [live|ready] [--port N]

`live`: the appliance can still come to serve; it is so while the model is pulled and loaded. `ready`, the default: a
request would be answered. The port is the environment's PORT, or 6333. One line on standard output says why; Docker
shows it. With TLS_CERT_FILE set it asks over HTTPS, without checking the certificate, which is for the name by which
others know this machine. Standard library only, and any Python from 3.8 on.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import ssl
import sys
from collections.abc import Mapping
from types import FrameType
from typing import NoReturn

LIMIT_SECONDS = 5.0  # for the whole answer, not for each byte
MOST_BYTES = 65536


class Parser(argparse.ArgumentParser):
    """argparse exits 2 on wrong arguments, which Docker reserves."""

    def error(self, message: str) -> NoReturn:
        """Exit 1 with the usage."""
        say(f"{message[:150]}; {self.format_usage()}")
        sys.exit(1)


def say(text: str) -> None:
    """Print one short line, bypassing Python's buffer: a failed flush at exit would change the exit code to 120."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300] + "\n"
    try:
        os.write(1, line.encode("utf-8", "replace"))
    except OSError:
        return  # stdout is closed; the exit code is sufficient


def ask(question: str, port: int, secure: bool) -> tuple[bool, str]:
    """Ask the gateway. Returns the answer and its reason.

    Raises:
        OSError, HTTPException, ValueError: no valid response.
    """
    if secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("GET", f"/{question}z", headers={"Connection": "close"})
        answer = connection.getresponse()
        body = answer.read(MOST_BYTES)
    finally:
        connection.close()
    if answer.status == 200:
        return True, "ready: idle, the next request starts the engine" if is_idle(body) else question
    return False, f"not {question}: {answer.status} {reason(body)}"


def is_idle(body: bytes) -> bool:
    """Check whether the body of /readyz reports an idle appliance."""
    try:
        return bool(json.loads(body)["status"] == "idle")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def reason(body: bytes) -> str:
    """The message of an error in OpenAI's form; empty when the body is something else."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def out_of_time(_signal: int, _frame: FrameType | None) -> NoReturn:
    """For SIGALRM: ends whatever the connection is waiting for."""
    raise TimeoutError(f"no answer in {LIMIT_SECONDS:g} s")


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Ask and print. Returns the exit code."""
    parser = Parser(usage="healthcheck.py [live|ready] [--port N]", add_help=False)
    parser.add_argument("question", nargs="?", default="ready", choices=["live", "ready"])
    parser.add_argument("--port", default=environment.get("PORT", "").strip() or "6333")
    options = parser.parse_args(arguments)
    if not (options.port.isascii() and options.port.isdigit() and 1 <= int(options.port[:9]) <= 65535):
        parser.error(f"no port: {options.port!r}")
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yes, why = ask(options.question, int(options.port), bool(environment.get("TLS_CERT_FILE", "").strip()))
    except (OSError, http.client.HTTPException, ValueError) as error:
        yes, why = False, f"not {options.question}: {str(error) or type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    say(why)
    return 0 if yes else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
