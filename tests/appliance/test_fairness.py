"""One key's flood does not starve another key: order of answers at the real engine."""

from __future__ import annotations

import pytest

from shoehorn.gateway.keys.api_key import Key
from shoehorn.gateway.keys.store import KeyStore
from support.clients import BackgroundRequest, admitted, chat
from support.running import Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.engine

PLACES = 8
"""max-num-seqs of the profile `cpu`."""


@pytest.fixture(scope="module")
def keys(shared_appliance: Appliance) -> dict[str, str]:
    """Create two keys."""
    store = KeyStore(shared_appliance.models_dir)
    return {name: store.add(Key(name, b"", b"", 0.0)).token for name in ("flood", "single")}


@pytest.mark.fault("One key sends 50 streams at once",
                   "A request of another key is answered before the streams that waited for a place.")
def test_streams_of_one_key_do_not_starve_another(appliance: Appliance, keys: dict[str, str]) -> None:
    flood = [BackgroundRequest(appliance, key=keys["flood"], priority=-(2**60)) for _ in range(50)]
    wait_until(lambda: sum(bool(each.text) for each in flood) >= PLACES, 60, "streams in all places of the engine")
    answer = chat(appliance, key=keys["single"], max_tokens=4)
    assert answer.status_code == 200, answer.text
    ended = [each.text[-200:] for each in flood if not each.is_alive() and each.status == 200]
    assert len(ended) < PLACES, ended  # of those that had a place before
    for each in flood:
        each.leave()
    wait_until(lambda: admitted(appliance) == 0, 60, "an idle engine")
