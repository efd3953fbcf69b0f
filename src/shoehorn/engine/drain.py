"""Drain: the engine's API server finishes running requests and aborts the rest with an error.

Rules: nginx refuses new requests as soon as the `ready` mark is gone; the API server's middleware
(`shoehorn_vllm.api.middleware`) refuses those that still arrive, waits, and aborts the late ones. `shoehorn drain`
requests it by a file in the run directory, because only the engine program changes the state; the result is a file too.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from shoehorn.common.atomic_file import write_atomic
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.shutdown import LEAVING_SECONDS, MARGIN_SECONDS
from shoehorn_vllm.protocol import DRAIN_PATH

log = logging.getLogger("engine")


@dataclass(frozen=True)
class DrainResult:
    """Number of running requests that finished, and that were aborted with an error."""

    finished: int
    aborted: int


def announce(paths: RunDir, is_replica: bool) -> None:
    """Ask the front of a ready replica for no new requests, and serve until it has noticed."""
    if is_replica and paths.ready_mark.exists():
        paths.leaving_mark.touch()
        time.sleep(LEAVING_SECONDS)


def drain_engine(socket: Path, seconds: int) -> DrainResult | None:
    """Drain the engine behind `socket` within `seconds`; return None after an invalid answer."""
    log.info("waiting up to %d s for running requests", seconds)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=seconds + MARGIN_SECONDS) as client:
            answer = client.post(f"http://engine{DRAIN_PATH}", params={"seconds": seconds}).raise_for_status().json()
        result = DrainResult(answer["finished"], answer["aborted"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        log.warning("Cannot drain the engine error=%s", str(error) or type(error).__name__)
        return None
    log.info("drained: %d requests finished, %d aborted", result.finished, result.aborted)
    return result


def request_drain(run_dir: Path) -> None:
    """Request a drain from the engine program, and remove an earlier result."""
    RunDir(run_dir).drain_result.unlink(missing_ok=True)
    RunDir(run_dir).drain_request.touch()


def is_requested(run_dir: Path) -> bool:
    """Return True if a drain was requested."""
    return RunDir(run_dir).drain_request.exists()


def publish_result(run_dir: Path, result: DrainResult | None) -> None:
    """Write the result for `shoehorn drain`."""
    write_atomic(RunDir(run_dir).drain_result, json.dumps(asdict(result) if result else None) + "\n")


def read_result(run_dir: Path) -> tuple[bool, DrainResult | None]:
    """Return (the drain has ended, its result)."""
    try:
        document = json.loads(RunDir(run_dir).drain_result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False, None
    return True, DrainResult(**document) if document else None
