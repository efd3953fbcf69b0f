"""`shoehorn bench`: how fast the running appliance is, beside what its plan expected.

Rules: it asks the engine itself, inside the container, so that no key is needed and no limit is hit; every request
streams, and writes as many tokens as it is told; requests that others send meanwhile slow it down, as it does them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import httpx

from shoehorn.common.errors import EXIT_DONE, EngineFailedError, SettingsError, ShoehornError
from shoehorn.config import settings as settings_module
from shoehorn.engine.readiness import TOKEN
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

_PROMPT_TOKENS = 16
_TIMEOUT_SECONDS = 3600.0
"""Of one token: an offloaded model that serves others too may take long for its first one."""


@dataclass(frozen=True)
class Round:
    """What so many requests at a time got.

    Attributes:
        tokens: written by all of them together.
        tokens_per_second: of all together, from the first request's beginning to the last one's end.
        first_token_seconds: the median time to the first token.
        expected_tokens_per_second: the plan's; None where it has none for that many.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token_seconds: float
    expected_tokens_per_second: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many requests at a time, and how long their answers."""
    parser.add_argument("--requests", metavar="N[,N...]", default="1,8", help="so many at a time, one round each (1,8)")
    parser.add_argument("--tokens", metavar="N", default="64", help="that each request writes (64)")
    parser.add_argument("--json", action="store_true", help="print {model, rounds} instead of a table")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Measure and print; returns the exit code.

    Raises:
        SettingsError: numbers that cannot be used.
        ShoehornError: no appliance runs here, or it is not ready.
        EngineFailedError: the engine failed meanwhile.
    """
    wanted, tokens = [_number(word, "--requests") for word in arguments.requests.split(",")], _number(
        arguments.tokens, "--tokens")
    settings = settings_module.load(environment)
    if not RunDir(settings.run_dir).state.exists():
        raise ShoehornError(f"No appliance runs with RUN_DIR={settings.run_dir}.",
                            "In compose, type: docker compose exec shoehorn shoehorn bench")
    state = StateFile(settings.run_dir).read()
    if state.phase is not Phase.READY:
        raise ShoehornError(f"The appliance is not ready ({state.phase}).", "Type it again once /readyz says so.")
    plan = state.plan or {}
    room = int(plan.get("max_model_len", 0)) - _PROMPT_TOKENS
    if 0 < room < tokens:
        raise SettingsError(f"--tokens {tokens} is more than a context of {plan['max_model_len']} tokens has room for.",
                            f"Give at most {room}.")
    expected = plan.get("expected_tokens_per_second", {})
    socket = str(RunDir(settings.run_dir).engine_socket)
    rounds = []
    for requests in (1, *wanted):  # the first one warms up, and is not shown
        found = measure(lambda: httpx.HTTPTransport(uds=socket), state.model, requests, tokens)
        rounds.append(Round(**{**asdict(found), "expected_tokens_per_second": expected.get(f"batch_{requests}")}))
    if arguments.json:
        print(json.dumps({"model": state.model, "rounds": [asdict(each) for each in rounds[1:]]}, indent=1))
    else:
        print("\n".join(_table(state.model, rounds[1:])))
    return EXIT_DONE


def measure(transport: Callable[[], httpx.BaseTransport], model: str, requests: int, tokens: int) -> Round:
    """One round: so many streaming requests at once, of so many tokens each.

    Args:
        transport: makes what reaches the engine, once for each request.

    Raises:
        EngineFailedError: a request was not answered as it should be.
    """
    begun = time.monotonic()
    with ThreadPoolExecutor(requests) as threads:
        streams = list(threads.map(lambda number: _stream(transport(), model, number, tokens), range(requests)))
    seconds = time.monotonic() - begun
    written = sum(each[1] for each in streams)
    return Round(requests, written, round(seconds, 3), round(written / seconds, 3),
                 round(statistics.median(each[0] for each in streams), 4))


def _stream(transport: httpx.BaseTransport, model: str, number: int, tokens: int) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one request."""
    prompt = [TOKEN + (7 * number + place) % 200 for place in range(_PROMPT_TOKENS)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}
    begun, first, written = time.monotonic(), 0.0, 0
    try:
        with httpx.Client(transport=transport, timeout=_TIMEOUT_SECONDS) as client, \
                client.stream("POST", "http://engine/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                raise EngineFailedError(f"The engine answered with {answer.status_code}: {answer.read()[:300]!r}.",
                                        "Look at the log.")
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                first = first or (time.monotonic() - begun if event.get("choices") else 0.0)
                written = (event.get("usage") or {}).get("completion_tokens", written)
    except (httpx.TransportError, ValueError) as error:
        raise EngineFailedError(f"The engine did not finish its answer ({type(error).__name__}).",
                                "Look at the log.") from error
    if not written:
        raise EngineFailedError("The engine's answer has no tokens.", "Look at the log.")
    return first, written


def _table(model: str, rounds: Sequence[Round]) -> list[str]:
    lines = [f"{model}, {rounds[0].tokens // rounds[0].requests} tokens a request", "",
             f"{'requests':>8}  {'tokens/s':>9}  {'expected':>9}  {'first token':>11}"]
    for each in rounds:
        expected = "-" if each.expected_tokens_per_second is None else f"{each.expected_tokens_per_second:.2f}"
        lines.append(f"{each.requests:>8}  {each.tokens_per_second:>9.2f}  {expected:>9}  "
                     f"{each.first_token_seconds:>9.2f} s")
    return lines


def _number(text: str, option: str) -> int:
    if not text.strip().isdecimal() or not 0 < int(text) <= 4096:
        raise SettingsError(f"{option}: {text!r} is no number from 1 to 4096.", f"Type, for example: {option} 8")
    return int(text)
