"""The program `front`: admission for all replicas, in the one process that counts.

It serves nginx on the socket that belongs to the engine in other roles, with the same middleware, and forwards admitted
requests to HAProxy. It publishes the state: ready while at least one replica is.

Rules: SIGTERM drains as in other roles; a restart forgets neither the requests of the last minute nor counted tokens;
the state names each replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import aiohttp
import uvicorn
from prometheus_client import REGISTRY
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.settings import Settings
from shoehorn.front import replica_states
from shoehorn.front.forwarding import Forwarding
from shoehorn.front.replica_states import READY, ReplicaState
from shoehorn.front.usage_collection import UsageCollection
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.server_program import GracefulServer, listen, run, stop_with_parent
from shoehorn.runtime.state import Phase, StateFile
from shoehorn.runtime.usage_file import Account, Usage, UsageFiles
from shoehorn_vllm.api.admissions import AdmissionLog
from shoehorn_vllm.api.ledger import UsageLedger
from shoehorn_vllm.api.metrics import RequestMetrics
from shoehorn_vllm.api.middleware import AdmissionMiddleware, Scope
from shoehorn_vllm.api.request import Receive, Send

log = logging.getLogger("front")

LOOK_SECONDS = 1.0
KEEP_ALIVE_SECONDS = 5
"""As of vLLM's API server: nginx closes idle connections earlier."""


class Front:
    """The ASGI application: health and metrics of the front; everything else goes through the middleware.

    Args:
        session: connects to HAProxy.
    """

    def __init__(self, settings: Settings, session: aiohttp.ClientSession) -> None:
        paths = RunDir(settings.run_dir)
        self._settings, self._states = settings, StateFile(settings.run_dir)
        self.replicas: Sequence[ReplicaState] = ()
        self._metrics = RequestMetrics()
        self._ledger = UsageLedger(UsageFiles(ModelsDir(settings.models_dir).usage))
        self.usage = UsageCollection(session, lambda: [each.server for each in self.replicas], self._count,
                                     self._ledger.save, ModelsDir(settings.models_dir).collected_usage)
        forwarding = Forwarding(session, len(settings.replicas), self.usage.collect)
        self.middleware = AdmissionMiddleware(forwarding, self._metrics, ledger=self._ledger,
                                              admissions=AdmissionLog(paths.admissions))
        self._stats, self._stopping = paths.balancer_stats, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["path"] == "/health":
            await _answer(send, 200 if self._is_ready else 503, b"")
        elif scope["type"] == "http" and scope["path"] == "/metrics":
            await _answer(send, 200, generate_latest(REGISTRY), CONTENT_TYPE_PLAIN_0_0_4)
        else:
            await self.middleware(scope, receive, send)

    @property
    def _is_ready(self) -> bool:
        return any(replica.state == READY for replica in self.replicas)

    def _count(self, account: Account, usage: Usage) -> None:
        self._metrics.count_tokens(account.key, usage)
        self._ledger.add_to(account, usage)

    async def watch(self) -> None:
        """Publish the states of the replicas until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Read the states of the replicas, and publish a change."""
        replicas = await asyncio.to_thread(replica_states.read, self._stats, self._settings.replicas) or ()
        before, self.replicas = [each.public() for each in self.replicas], replicas
        shown = [each.public() for each in replicas]
        earlier = {each["name"] for each in before if each["state"] == READY}
        # before a request can meet a budget that lacks what the engine has counted since an earlier front
        await asyncio.gather(*(self.usage.collect(each.server) for each in replicas
                               if each.state == READY and each.name not in earlier))
        if self._stopping or (shown == before and shown):
            return
        _log_changes(before, shown)
        ready = sum(each.state == READY for each in replicas)
        detail = f"{ready} of {len(self._settings.replicas)} replicas are ready" if replicas else \
            "the balancer is being started"
        self._states.update_progress(phase=Phase.READY if ready else Phase.WAITING, progress=None, detail=detail,
                                     model=self._settings.served_model_name, replicas=tuple(shown))

    async def stop(self) -> None:
        """Refuse new requests, finish running ones, and save the counted tokens."""
        self._stopping = True
        self._states.update_progress(phase=Phase.STOPPING, progress=None, detail="stopping")
        finished, aborted = await self.middleware.drain(self._settings.drain_timeout)
        log.info("drained: %d requests finished, %d aborted", finished, aborted)
        await self.usage.collect_all()
        await asyncio.to_thread(self.usage.save)


def _log_changes(before: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> None:
    earlier = {each["name"]: each["state"] for each in before}
    for each in now:
        if earlier.get(each["name"]) != each["state"]:
            level = logging.INFO if each["state"] == READY else logging.WARNING
            log.log(level, "replica is %s replica=%s%s", each["state"], each["name"],
                    f" reason={each['reason']}" if each["reason"] else "")


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM."""
    paths = RunDir(settings.run_dir)
    connector = aiohttp.UnixConnector(str(paths.balancer_socket), limit=0, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False,
                                     cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as session:
        front = Front(settings, session)
        server = GracefulServer(uvicorn.Config(
            front, lifespan="off", log_config=None, access_log=False, server_header=False, date_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1), before_exit=front.stop)
        async with asyncio.TaskGroup() as group:  # a failed task stops the program, and supervisord restarts it
            await front.look()
            tasks = [group.create_task(front.watch()), group.create_task(front.usage.run()),
                     group.create_task(stop_with_parent(parent_watch.supervisor(), server))]
            await server.serve(sockets=[listen(paths.engine_socket)])
            for task in tasks:
                task.cancel()


async def _answer(send: Send, status: int, content: bytes, kind: str = "application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]})
    await send({"type": "http.response.body", "body": content})


if __name__ == "__main__":
    run(serve)
