"""Ending without cutting anybody off: the engine's API server finishes what runs, and ends the rest properly.

Rules: nginx refuses new requests from the moment that the mark `ready` is gone; the API server's middleware
(`shoehorn_vllm.api.middleware`) refuses what still slips through, waits, and ends the late ones with an error.
`shoehorn drain` asks by a file in the run directory, since only the engine program may change the state; the answer is
a file as well.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from shoehorn.common.atomic_file import write_atomic
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.shutdown import MARGIN_SECONDS

log = logging.getLogger("engine")


@dataclass(frozen=True)
class Outcome:
    """How many of the requests that ran were answered in full, and how many were ended with an error."""

    finished: int
    aborted: int


def engine(socket: Path, seconds: int) -> Outcome | None:
    """Drain the engine behind `socket`, for `seconds` at most; None when it does not answer as it should."""
    log.info("waiting up to %d s for running requests", seconds)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=seconds + MARGIN_SECONDS) as client:
            answer = client.post("http://engine/-/drain", params={"seconds": seconds}).raise_for_status().json()
        outcome = Outcome(answer["finished"], answer["aborted"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        log.warning("the engine could not be drained: %s", str(error) or type(error).__name__)
        return None
    log.info("drained: %d requests finished, %d aborted", outcome.finished, outcome.aborted)
    return outcome


def request(run_dir: Path) -> None:
    """Ask the engine program to drain. An outcome of before is forgotten."""
    RunDir(run_dir).drain_result.unlink(missing_ok=True)
    RunDir(run_dir).drain_request.touch()


def requested(run_dir: Path) -> bool:
    """Whether somebody asked."""
    return RunDir(run_dir).drain_request.exists()


def publish(run_dir: Path, outcome: Outcome | None) -> None:
    """Leave the outcome for `shoehorn drain`."""
    write_atomic(RunDir(run_dir).drain_result, json.dumps(asdict(outcome) if outcome else None) + "\n")


def published(run_dir: Path) -> tuple[bool, Outcome | None]:
    """Whether the drain is over, and its outcome."""
    try:
        document = json.loads(RunDir(run_dir).drain_result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False, None
    return True, Outcome(**document) if document else None
