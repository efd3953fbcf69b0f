"""A front with three replicas: exact limits, and requests that survive a lost or a stopping replica."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import ssl
from pathlib import Path

import httpx
import pytest

from front.conftest import POSTS, Rig, body, key_of, run
from shoehorn.runtime import peer_certificates
from shoehorn.runtime.state import Phase
from support.replicas import write_secret
from support.waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("front")]

CHAT = "/v1/chat/completions"


def events(text: str) -> list[dict[str, object]]:
    """Return the events of a stream; fail unless it is complete."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]", text
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("path", POSTS)
def test_limit_per_minute_is_exact_over_all_replicas_on_every_route(rig: Rig, path: str) -> None:
    async def work() -> None:
        async with rig.client(key_of(path)) as client:
            answers = await asyncio.gather(*(client.post(path, json=body()) for _ in range(66)))
        assert collections.Counter(each.status_code for each in answers) == {200: 60, 429: 6}
        assert len({each.json()["replica"] for each in answers if each.status_code == 200}) == 3
        assert all(int(each.headers["retry-after"]) > 50 for each in answers if each.status_code == 429)

    run(work)


def test_concurrent_limit_is_exact_over_all_replicas(rig: Rig) -> None:
    async def work() -> None:
        async with rig.client("slots") as client:
            for _ in range(2):
                answers = await asyncio.gather(*(client.post(CHAT, json=body(tokens=1, pause=0.5)) for _ in range(12)))
                assert collections.Counter(each.status_code for each in answers) == {200: 4, 429: 8}

    run(work)


def test_budget_is_exact_over_all_replicas(rig: Rig) -> None:
    async def work() -> None:
        async with rig.client("budget") as client:
            for number in range(10):  # of 3 + 4 tokens each: the tenth uses up the 70
                answer = await client.post(CHAT, json=body(stream=number % 2 == 0))
                assert answer.status_code == 200, (number, answer.text)
            answer = await client.post(CHAT, json=body())
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
            assert "70 of 70" in answer.json()["error"]["message"]

    run(work)


@pytest.mark.fault("The program of a front is killed", "Limits of the last minute and budgets hold: no token is "
                   "forgotten or counted twice.")
def test_killed_front_forgets_and_repeats_nothing(rig: Rig) -> None:
    async def use_up() -> None:
        for key in ("twice", "spent"):
            async with rig.client(key) as client:
                for _ in range(2):
                    assert (await client.post(CHAT, json=body())).status_code == 200

    run(use_up)
    killed = rig.front.find("shoehorn.front.main")
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    wait_until(lambda: rig.front.runs("shoehorn.front.main"), 20, "the program is restarted")
    wait_until(lambda: _is_served(rig), 20, "the front serves again")

    async def work() -> None:
        async with rig.client("twice") as client:
            assert (await client.post(CHAT, json=body())).status_code == 429
        async with rig.client("spent") as client:
            assert "14 of 14" in (await client.post(CHAT, json=body())).json()["error"]["message"]

    run(work)


def test_same_prefix_returns_to_its_replica_and_a_burst_is_spread(rig: Rig) -> None:
    async def work() -> None:
        places: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

        async def talk(client: httpx.AsyncClient, name: str) -> None:
            messages = [{"role": "user", "content": f"conversation {name}"}]
            for turn in range(6):
                answer = (await client.post(CHAT, json={"messages": messages, "pause": 0.01})).json()
                places[name][answer["replica"]] += 1
                messages += [{"role": "assistant", "content": "answer"}, {"role": "user", "content": f"turn {turn}"}]

        async with rig.client() as client:
            for first in range(0, 48, 4):
                await asyncio.gather(*(talk(client, str(number)) for number in range(first, first + 4)))
            same = sum(counts.most_common(1)[0][1] for counts in places.values())
            assert same >= 0.9 * 48 * 6, places
            assert len({counts.most_common(1)[0][0] for counts in places.values()}) == 3
            burst = await asyncio.gather(*(client.post(CHAT, json=body("one", tokens=1, pause=0.5)) for _ in range(12)))
        counts = collections.Counter(each.json()["replica"] for each in burst)
        assert max(counts.values()) <= 9, counts

    run(work)


@pytest.mark.fault("A replica of a front is killed under load", "No request without a first byte fails: it is answered "
                   "by another replica. A stream that had begun ends with an error event.")
def test_killed_replica_costs_no_request_that_had_no_first_byte(rig: Rig) -> None:
    async def work() -> None:
        has_begun = asyncio.Event()

        async def read(client: httpx.AsyncClient) -> str:
            text = ""
            async with client.stream("POST", CHAT, json=body(stream=True, tokens=8, pause=0.5)) as answer:
                async for piece in answer.aiter_text():
                    text += piece
                    if '"replica": "b"' in piece:
                        has_begun.set()
            return text

        async with rig.client() as client:
            slow = [asyncio.create_task(client.post(CHAT, json=body(tokens=1, pause=1.5))) for _ in range(24)]
            streams = [asyncio.create_task(read(client)) for _ in range(24)]
            await has_begun.wait()
            await asyncio.to_thread(rig.replicas["b"].kill)
            later = [await client.post(CHAT, json=body()) for _ in range(30)]
            answers = [*await asyncio.gather(*slow), *later]
            assert {each.status_code for each in answers} == {200}, rig.front.output[-6000:]
            assert all(each.json()["replica"] in "ac" for each in later)
            ends = await asyncio.gather(*streams)
        broken = [text for text in ends if '"replica": "b"' in text]
        assert broken, ends
        assert all('"engine_failed"' in text for text in broken)
        assert all(len(events(text)) == 8 for text in ends if text not in broken)

    run(work)
    rig.wait_for("a", "c")
    assert rig.front.phase is Phase.READY
    rig.restart("b")


@pytest.mark.fault("The replicas of a front are stopped and started one after the other (rolling upgrade)",
                   "Each asks for no new requests 3 s before it refuses them; no request fails, and running streams "
                   "are completed.")
def test_rolling_upgrade_costs_no_request(rig: Rig) -> None:
    async def work() -> None:
        answers: list[httpx.Response] = []
        streams: list[asyncio.Task[httpx.Response]] = []

        async def load(client: httpx.AsyncClient, upgrade: asyncio.Task[None]) -> None:
            while not upgrade.done():
                answers.append(await client.post(CHAT, json=body(pause=0.02)))

        async with rig.client() as client:
            for name in rig.replicas:
                streams += [asyncio.create_task(client.post(CHAT, json=body(stream=True, tokens=16, pause=0.25)))
                            for _ in range(6)]
                await asyncio.sleep(0.3)
                upgrade = asyncio.create_task(asyncio.to_thread(_upgrade, rig, name))
                await asyncio.gather(*(load(client, upgrade) for _ in range(4)))
                await upgrade
            complete = [events((await each).text) for each in streams]
        assert {each.status_code for each in answers} == {200}
        assert all(len(each) == 16 for each in complete)

    run(work)
    assert sum("replica is draining" in line for line in rig.front.lines) == 3


@pytest.mark.fault("A request kills the engine of each replica that gets it", "It is repeated once, so at most two "
                   "engines die, and is answered with an error.")
def test_request_that_kills_engines_does_not_reach_all_of_them(rig: Rig) -> None:
    async def work() -> None:
        async with rig.client() as client:
            answer = await client.post(CHAT, json=body(die=True))
            assert answer.status_code in (500, 503)
            assert answer.json()["error"]["code"] in ("engine_failed", "model_not_ready")

    run(work)
    wait_until(lambda: sum(each.engine_is_dead for each in rig.replicas.values()) == 2, 10, "two engines have died")
    assert _is_served(rig)
    for replica in rig.replicas.values():
        if replica.engine_is_dead:
            replica.kill()
            replica.start()
            replica.wait()
    rig.wait_for("a", "b", "c")


def test_client_that_leaves_stops_its_generation_and_its_tokens_are_counted(rig: Rig) -> None:
    before = used(rig, "free")

    async def work() -> None:
        async with rig.client() as client, client.stream("POST", CHAT, json=body(
                stream=True, tokens=1000, pause=0.05)) as answer:
            async for line in answer.aiter_lines():
                if '"n": 9' in line:
                    break

    run(work)
    wait_until(lambda: all(_running(each.client()) == 0 for each in rig.replicas.values()), 10, "no request runs")
    wait_until(lambda: used(rig, "free") - before >= 13, 10, "the tokens are counted")
    assert used(rig, "free") - before < 100


@pytest.mark.fault("HAProxy of a front is killed", "It is restarted; no request without a first byte fails.")
def test_killed_balancer_is_restarted(rig: Rig) -> None:
    async def work() -> None:
        async with rig.client() as client:
            slow = [asyncio.create_task(client.post(CHAT, json=body(tokens=1, pause=0.5))) for _ in range(6)]
            await asyncio.sleep(0.2)
            os.kill(rig.front.find("haproxy").pid, signal.SIGKILL)
            assert {(await each).status_code for each in slow} == {200}

    run(work)
    rig.wait_for("a", "b", "c")


@pytest.mark.fault("All replicas of a front are lost", "Requests get 503 with the phase `waiting`, `/readyz` 503; "
                   "requests are served again once a replica is back.")
def test_front_without_replicas_waits(rig: Rig) -> None:
    for replica in rig.replicas.values():
        replica.kill()
    rig.front.wait_for(Phase.WAITING, 20)
    answer = httpx.get(f"{rig.front.url}/readyz")
    assert (answer.status_code, answer.json()["error"]["phase"]) == (503, "waiting")
    for replica in rig.replicas.values():
        replica.start()
    rig.front.wait_for(Phase.READY, 20)
    rig.wait_for("a", "b", "c")
    wait_until(lambda: _is_served(rig), 20, "served again")


def test_replica_accepts_its_front_only(rig: Rig, tmp_path: Path) -> None:
    replica = rig.replicas["a"]
    url = f"https://127.0.0.1:{replica.port}"
    secret = rig.secret.read_text()
    other = write_secret(tmp_path).read_text()
    with httpx.Client(verify=_trust(tmp_path, secret, None)) as client:
        assert client.post(f"{url}{CHAT}", json=body()).status_code == 400  # no certificate
    with httpx.Client(verify=_trust(tmp_path, secret, peer_certificates.issue(secret, "replica"))) as client:
        assert client.post(f"{url}{CHAT}", json=body()).status_code in (400, 403)  # of another replica
    with httpx.Client(verify=_trust(tmp_path, secret, peer_certificates.issue(other, "front"))) as client:
        assert client.post(f"{url}{CHAT}", json=body()).status_code == 400  # of another cluster
    with httpx.Client(verify=_trust(tmp_path, secret, peer_certificates.issue(secret, "front"))) as client:
        assert client.post(f"{url}{CHAT}", json=body()).json()["replica"] == "a"
        assert client.get(f"{url}/-/activity").status_code == 404
        assert client.post(f"{url}/-/drain?seconds=0").status_code == 404
    public = httpx.post(f"http://127.0.0.1:{replica.public_port}{CHAT}", json=body(),
                        headers={"X-Shoehorn-Key": "free", "X-Shoehorn-Limits": ""})
    assert (public.status_code, public.json()["error"]["code"]) == (403, "behind_front")


def used(rig: Rig, key: str) -> float:
    """Return the tokens of a key that the front has counted since its program started."""
    text = httpx.get(f"http://127.0.0.1:{rig.front.metrics_port}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
               if line.startswith("shoehorn_tokens_total{") and f'key="{key}"' in line)


def _upgrade(rig: Rig, name: str) -> None:
    assert rig.replicas[name].stop()["aborted"] == 0
    rig.restart(name)


def _running(client: httpx.Client) -> int:
    with client:
        return int(client.get("http://engine/-/activity").json()["running"])


def _is_served(rig: Rig) -> bool:
    served: list[bool] = []

    async def work() -> None:
        async with rig.client() as client:
            served.append((await client.post(CHAT, json=body())).status_code == 200)

    run(work)
    return served[0]


def _trust(folder: Path, secret: str, own: peer_certificates.PeerCertificate | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=peer_certificates.issue(secret, "front").authority.decode())
    context.check_hostname = False
    if own:
        file = folder / "pair.pem"
        file.write_bytes(own.pair)
        context.load_cert_chain(file)
    return context
