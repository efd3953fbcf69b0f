"""`shoehorn bench`: speed of the running appliance, compared with its plan.

Rules: requests go to the engine inside the container, without a key and its limits; every request streams and has an
answer of fixed length; concurrent requests of clients lower the measured speed.
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

from shoehorn.commands.appliance import require_appliance
from shoehorn.common.errors import EXIT_DONE, EngineFailedError, SettingsError, ShoehornError
from shoehorn.config import settings as settings_module
from shoehorn.engine import start_times
from shoehorn.engine.readiness import TOKEN
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, State, StateFile

_PROMPT_TOKENS = 16
_REMEDY = "Read the log of the appliance."
_TIMEOUT_SECONDS = 3600.0
"""Of one token: an offloaded model under load may need long for its first one."""


@dataclass(frozen=True)
class Round:
    """Result of one number of concurrent requests.

    Attributes:
        tokens: total of all answers.
        tokens_per_second: total, from the start of the first request to the end of the last.
        first_token_seconds: median time to the first token.
        expected_tokens_per_second: of the plan; None if it has no value for that many requests.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token_seconds: float
    expected_tokens_per_second: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of concurrent requests and the length of their answers."""
    parser.add_argument("--requests", metavar="N[,N...]", default="1,8",
                        help="concurrent requests, one round for each number (1,8)")
    parser.add_argument("--tokens", metavar="N", default="64", help="tokens of each answer (64)")
    parser.add_argument("--start", action="store_true", help="print the seconds of each part of the last start instead")
    parser.add_argument("--json", action="store_true", help="print {model, rounds}, or with --start {model, "
                        "start_seconds}, instead of a table")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Measure and print; return the exit code.

    Raises:
        SettingsError: invalid numbers.
        ShoehornError: no appliance runs here, or it is not ready.
        EngineFailedError: the engine failed a request.
    """
    counts, tokens = [_number(word, "--requests") for word in arguments.requests.split(",")], _number(
        arguments.tokens, "--tokens")
    settings = settings_module.load(environment)
    require_appliance(settings.run_dir, "bench")
    state = StateFile(settings.run_dir).read()
    if state.phase is not Phase.READY:
        remedy = ("Send a request, which starts the engine; then retry." if state.phase is Phase.IDLE
                  else "Retry when /readyz answers 200.")
        raise ShoehornError(f"Appliance: not ready (phase {state.phase}).", remedy, code="not_ready")
    if arguments.start:
        _print_start(state, arguments.json)
        return EXIT_DONE
    plan = state.plan or {}
    limit = int(plan.get("max_model_len", 0)) - _PROMPT_TOKENS
    if 0 < limit < tokens:
        raise SettingsError(f"--tokens {tokens}: exceeds the context of {plan['max_model_len']} tokens.",
                            f"Type at most --tokens {limit}.", code="context_exceeded")
    expected = plan.get("expected_tokens_per_second", {})
    socket = str(RunDir(settings.run_dir).engine_socket)
    rounds = []
    for requests in (1, *counts):  # the first one is a warm-up, and not shown
        result = measure(lambda: httpx.HTTPTransport(uds=socket), state.model, requests, tokens)
        rounds.append(Round(**{**asdict(result), "expected_tokens_per_second": expected.get(f"batch_{requests}")}))
    if arguments.json:
        print(json.dumps({"model": state.model, "rounds": [asdict(each) for each in rounds[1:]]}, indent=1))
    else:
        print("\n".join(_table(state.model, rounds[1:])))
    return EXIT_DONE


def _print_start(state: State, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": state.model, "start_seconds": dict(state.start_seconds)}, indent=1))
    else:
        print("\n".join([f"{state.model}, last start", "", *start_times.table(state.start_seconds)]))


def measure(transport: Callable[[], httpx.BaseTransport], model: str, requests: int, tokens: int) -> Round:
    """Run one round of concurrent streaming requests.

    Args:
        transport: returns the transport to the engine, once for each request.

    Raises:
        EngineFailedError: a request failed.
    """
    begin = time.monotonic()
    with ThreadPoolExecutor(requests) as threads:
        streams = list(threads.map(lambda number: _stream(transport(), model, number, tokens), range(requests)))
    seconds = time.monotonic() - begin
    total = sum(each[1] for each in streams)
    return Round(requests, total, round(seconds, 3), round(total / seconds, 3),
                 round(statistics.median(each[0] for each in streams), 4))


def _stream(transport: httpx.BaseTransport, model: str, number: int, tokens: int) -> tuple[float, int]:
    """Return (seconds to the first token, tokens) of one request."""
    prompt = [TOKEN + (7 * number + place) % 200 for place in range(_PROMPT_TOKENS)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}
    begin, first, tokens_written = time.monotonic(), 0.0, 0
    try:
        with httpx.Client(transport=transport, timeout=_TIMEOUT_SECONDS) as client, \
                client.stream("POST", "http://engine/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                raise EngineFailedError(f"Engine: answered {answer.status_code}: {answer.read()[:300]!r}.", _REMEDY)
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                first = first or (time.monotonic() - begin if event.get("choices") else 0.0)
                tokens_written = (event.get("usage") or {}).get("completion_tokens", tokens_written)
    except (httpx.TransportError, ValueError) as error:
        raise EngineFailedError(f"Engine: incomplete answer ({type(error).__name__}).", _REMEDY) from error
    if not tokens_written:
        raise EngineFailedError("Engine: answer without tokens.", _REMEDY)
    return first, tokens_written


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
        raise SettingsError(f"{option}: invalid number {text!r}.",
                            f"Type an integer from 1 to 4096, for example: {option} 8", code="invalid_number")
    return int(text)
