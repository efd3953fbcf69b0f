"""Collection of usage: each token counts once, whatever is lost or restarted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from shoehorn.front.usage_collection import MAX_RUNS, UsageCollection
from shoehorn.runtime.usage_file import Account, Usage

ACCOUNT = Account("2026-11-28", "phone", "model")


class Engine:
    """An engine behind HAProxy, and the ledger of the front."""

    def __init__(self, folder: Path) -> None:
        self.run, self.tokens, self.broken = "one", 0, False
        self.socket, self.file = folder / "haproxy.sock", folder / "collected.json"
        self.counted, self.is_volume_full = Usage(), False

    async def answer(self, request: web.Request) -> web.Response:
        """Answer `/-/usage`."""
        assert request.headers["X-Shoehorn-Replica"] == "r1"
        rows = [{**ACCOUNT._asdict(), "requests": 1, "prompt_tokens": 3, "completion_tokens": self.tokens}]
        return web.Response(text="{" if self.broken else json.dumps({"run": self.run, "usage": rows}),
                            content_type="application/json")

    def count(self, account: Account, usage: Usage) -> None:
        """Count as the ledger does."""
        assert account == ACCOUNT
        self.counted += usage

    def collection(self, session: aiohttp.ClientSession) -> UsageCollection:
        """Return a new collection, as a restarted front has."""
        return UsageCollection(session, lambda: ["r1"], self.count, lambda: not self.is_volume_full, self.file)


def run(test: Any, folder: Path) -> Engine:
    """Run a test with an engine."""
    async def main() -> Engine:
        engine = Engine(folder)
        application = web.Application()
        application.router.add_get("/-/usage", engine.answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.UnixSite(runner, str(engine.socket)).start()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(engine.socket))) as session:
            await test(engine, session)
        await runner.cleanup()
        return engine

    return asyncio.run(main())


def test_differences_are_counted_and_a_new_run_from_its_start(tmp_path: Path) -> None:
    async def test(engine: Engine, session: aiohttp.ClientSession) -> None:
        collection = engine.collection(session)
        for engine.run, engine.tokens in (("one", 5), ("one", 5), ("one", 9), ("two", 2), ("one", 9)):
            await collection.collect_all()

    assert run(test, tmp_path).counted == Usage(2, 6, 11)


def test_answer_that_was_overtaken_counts_nothing(tmp_path: Path) -> None:
    async def test(engine: Engine, session: aiohttp.ClientSession) -> None:
        collection = engine.collection(session)
        for engine.tokens in (9, 5, 9):
            await collection.collect_all()

    assert run(test, tmp_path).counted == Usage(1, 3, 9)


@pytest.mark.parametrize("is_volume_full", [False, True])
def test_restarted_front_continues_where_the_saved_ledger_ends(tmp_path: Path, is_volume_full: bool) -> None:
    async def test(engine: Engine, session: aiohttp.ClientSession) -> None:
        first = engine.collection(session)
        engine.tokens = 4
        await first.collect_all()
        engine.is_volume_full = is_volume_full
        first.save()
        engine.tokens = 6
        await first.collect_all()
        engine.counted = Usage(1, 3, 4) if not is_volume_full else Usage()  # what the volume has after a kill
        await engine.collection(session).collect_all()

    assert run(test, tmp_path).counted == Usage(1, 3, 6)


def test_damaged_answers_and_files_count_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(engine: Engine, session: aiohttp.ClientSession) -> None:
        engine.broken = True
        await engine.collection(session).collect_all()
        engine.broken = False
        engine.file.write_text('{"one": [{"day": 1}]}')
        await engine.collection(session).collect_all()

    assert run(test, tmp_path).counted == Usage(1, 3, 0)
    assert "counted from their start" in caplog.text


def test_remembered_runs_are_bounded(tmp_path: Path) -> None:
    async def test(engine: Engine, session: aiohttp.ClientSession) -> None:
        collection = engine.collection(session)
        for number in range(MAX_RUNS + 5):
            collection._add(str(number), {ACCOUNT: Usage(1, 0, 1)})
        collection.save()
        assert next(iter(json.loads(engine.file.read_text()))) == "5"

    run(test, tmp_path)
