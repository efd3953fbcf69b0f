"""Collection of the tokens that the replicas' engines processed for each key.

Every engine counts from its start and names its run (`run`); the front adds the differences to its ledger.

Rules:
- a figure is counted once: the last figures of each run are remembered, and saved in the volume whenever the ledger is,
  so that a restarted front continues where the last saved one ended;
- running requests are counted every second, the rest of a request before the end of its answer if its key has a budget;
- a lost replica's tokens since the last collection are not counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from shoehorn.common.atomic_file import write_atomic
from shoehorn.front.names import REPLICA_HEADER
from shoehorn.runtime.usage_file import Account, Usage
from shoehorn_vllm.protocol import USAGE_PATH

log = logging.getLogger("front")

COLLECT_SECONDS = 1.0
SAVE_SECONDS = 15.0
MAX_RUNS = 1000
"""Runs of engines that are remembered, the latest ones."""
_LIMIT = aiohttp.ClientTimeout(total=2.0)

Figures = dict[Account, Usage]


class UsageCollection:
    """The figures of all replicas.

    Args:
        session: connects to HAProxy as `http://balancer`.
        servers: returns HAProxy's names of the replicas that answer.
        count: adds usage to the ledger and the metrics.
        save: saves the ledger; returns whether it succeeded.
        file: where the figures of the runs are saved.
    """

    def __init__(self, session: aiohttp.ClientSession, servers: Callable[[], list[str]],
                 count: Callable[[Account, Usage], None], save: Callable[[], bool], file: Path) -> None:
        self._session, self._servers, self._count, self._save, self._file = session, servers, count, save, file
        self._runs = read(file)
        self._locks: dict[str, asyncio.Lock] = {}

    async def run(self) -> None:
        """Collect and save until cancelled."""
        saved_at = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            await self.collect_all()
            if asyncio.get_running_loop().time() - saved_at >= SAVE_SECONDS:
                await asyncio.to_thread(self.save)
                saved_at = asyncio.get_running_loop().time()

    async def collect_all(self) -> None:
        """Collect from all replicas that answer."""
        await asyncio.gather(*(self.collect(server) for server in self._servers()))

    async def collect(self, server: str) -> None:
        """Collect from one replica; a replica that does not answer is left for the next time."""
        if not server:
            return
        async with self._locks.setdefault(server, asyncio.Lock()):  # an older answer must not follow a newer one
            try:
                async with self._session.get(f"http://balancer{USAGE_PATH}", headers={REPLICA_HEADER: server},
                                             timeout=_LIMIT) as response:
                    if response.status != 200:
                        return
                    document = await response.json()
                run, figures = str(document["run"]), parse(document["usage"])
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, TypeError, KeyError) as error:
                log.debug("cannot collect usage replica=%s error=%s", server, error)
                return
            self._add(run, figures)

    def _add(self, run: str, figures: Figures) -> None:
        known = self._runs.pop(run, {})
        self._runs[run] = known
        for account, usage in figures.items():
            earlier = known.get(account, Usage())
            difference = Usage(*(max(0, now - then)
                                 for now, then in zip(_numbers(usage), _numbers(earlier), strict=True)))
            if difference != Usage():  # an answer that was overtaken by a later one has no differences
                known[account] = earlier + difference
                self._count(account, difference)
        while len(self._runs) > MAX_RUNS:
            del self._runs[next(iter(self._runs))]

    def save(self) -> None:
        """Save the ledger, then the figures that it includes."""
        text = _format(self._runs)
        if not self._save():
            return
        try:
            write_atomic(self._file, text, 0o600)
        except OSError as error:
            log.warning("cannot save the collected figures of replicas error=%s", error)


def _numbers(usage: Usage) -> tuple[int, int, int]:
    return usage.requests, usage.prompt_tokens, usage.completion_tokens


def read(file: Path) -> dict[str, Figures]:
    """Read the saved figures by run; none without a readable file."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return {str(run): parse(rows) for run, rows in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("cannot read the collected figures, running engines are counted from their start file=%s error=%s",
                    file, error)
        return {}


def parse(rows: list[Mapping[str, Any]]) -> Figures:
    """Parse the figures of an engine.

    Raises:
        KeyError, TypeError, ValueError: they are damaged.
    """
    return {Account(*(str(row[name]) for name in Account._fields)): Usage(
        int(row["requests"]), int(row["prompt_tokens"]), int(row["completion_tokens"])) for row in rows}


def _format(runs: Mapping[str, Figures]) -> str:
    return json.dumps({run: [{**account._asdict(), **vars(usage)} for account, usage in figures.items()]
                       for run, figures in runs.items()}) + "\n"
