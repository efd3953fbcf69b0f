"""HAProxy's table of servers, as 2.6 writes it."""

from __future__ import annotations

from pathlib import Path

from shoehorn.config.replicas import parse as addresses
from shoehorn.front.replica_states import DRAINING, LOST, READY, parse, read

TABLE = """# pxname,svname,scur,stot,status,lastchg,check_status,check_code,last_chk,
replicas,r1,3,17,UP,12,L7OK,200,OK,
replicas,r2,1,5,NOLB,3,* L7OKC,404,Not Found,
replicas,r3,0,9,DOWN,4,L4CON,,Connection refused,
replicas,r4,0,0,UP 1/2,1,L7OK,200,OK,
"""


def test_states_of_a_table() -> None:
    states = parse(TABLE, addresses("gpu1,gpu2,gpu3:7000,[fe80::1]"))
    assert states is not None
    assert [(each.name, each.server, each.state, each.reason, each.running, each.requests, each.seconds)
            for each in states] == [
        ("gpu1", "r1", READY, "", 3, 17, 12), ("gpu2", "r2", DRAINING, "L7OKC 404 Not Found", 1, 5, 3),
        ("gpu3:7000", "r3", LOST, "L4CON Connection refused", 0, 9, 4), ("[fe80::1]", "r4", READY, "", 0, 0, 1)]
    assert states[0].public() == {"name": "gpu1", "state": READY, "reason": ""}


def test_nothing_is_known_without_a_complete_table(tmp_path: Path) -> None:
    assert parse(TABLE, addresses("a,b,c,d,e")) is None
    assert parse("", addresses("a")) is None
    assert read(tmp_path / "absent.sock", addresses("a")) is None
