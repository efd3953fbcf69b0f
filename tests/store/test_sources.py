"""One commit for a whole pull, a limit to its rate, and the other hub in the place of the chosen one."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest

from fakes.hf_hub import HuggingFaceHub
from fakes.hub import Hub, commit_of
from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub import modelscope
from shoehorn.hub.huggingface import HuggingFaceHub as Client
from shoehorn.hub.rate_limit import Pace
from shoehorn.hub.repository import HubFailedError
from shoehorn.store import pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, stop_when_arrived, write_model, write_weights

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


def newer_than(model: Path, folder: Path) -> Path:
    """The same model with other weights and another tokenizer."""
    shutil.copytree(model, folder)
    write_weights(folder / WEIGHTS, fill=1)
    (folder / "tokenizer.json").write_text("[]")
    return folder


def test_a_branch_that_moves_during_a_pull_does_not_mix_versions(tmp_path: Path, model: Path) -> None:
    newer = newer_than(model, tmp_path / "newer")
    with HuggingFaceHub({MODEL: model}, then={MODEL: newer}) as hub:
        volume = Volume(tmp_path, hub)
        assert volume.pull()[0] == 0
        assert not [request for request in hub.requests if "/main/" in request.path]
    for name in (WEIGHTS, "tokenizer.json"):
        assert (volume.folder / name).read_bytes() == (model / name).read_bytes()
    assert json.loads(volume.manifest.read_text())["commit"] == commit_of(model)


def test_a_branch_that_moves_on_modelscope_does_not_mix_versions_either(tmp_path: Path, model: Path) -> None:
    newer = newer_than(model, tmp_path / "newer")
    with Hub({MODEL: model}, then={MODEL: newer}) as hub:
        volume = Volume(tmp_path, hub)
        with modelscope.Hub(*volume.hub_arguments) as client:
            assert client.names()["tokenizer.json"] == 2
            assert client.read("tokenizer.json") == b"{}"
        hub.models = {MODEL: model}
        assert volume.pull()[0] == 0
    for name in (WEIGHTS, "tokenizer.json"):
        assert (volume.folder / name).read_bytes() == (model / name).read_bytes()
    assert json.loads(volume.manifest.read_text())["commit"] == commit_of(model)


HEAD, EARLIER = "83ee97c66e841048bedc5c02c15ce2f3ed259feb", "f194f50981eaaa6019bbec5049a4c7e1fd294110"


@pytest.mark.parametrize(("latest", "commits", "expected"), [
    ({"Id": HEAD}, [EARLIER], HEAD), ({"Id": "", "ShortId": HEAD[:8]}, [EARLIER, HEAD], HEAD),
    ({"ShortId": HEAD[:8]}, [EARLIER], ""), ({"ShortId": ""}, [EARLIER], ""), ({"ShortId": "83"}, [HEAD], ""),
    (None, [HEAD], ""), ({"Id": "master", "ShortId": "master"}, ["master"], "")])
def test_the_commit_of_a_modelscope_listing_is_worked_out_or_left_open(latest: object, commits: list[str],
                                                                       expected: str) -> None:
    assert modelscope._commit(latest, [{"Revision": commit} for commit in commits] + ["odd"]) == expected


def test_a_revision_that_modelscope_does_not_have_is_told(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as running, pytest.raises(HubFailedError, match=f"no model {MODEL} at revision {HEAD}"):
        modelscope.Hub(*Volume(tmp_path, running, MODEL_REVISION=HEAD).hub_arguments).names()


@pytest.mark.parametrize("sha", ["main", "", None, 7, "A" * 40])
def test_a_commit_that_is_none_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                          sha: object) -> None:
    monkeypatch.setattr("fakes.hf_hub.commit_of", lambda _: sha)
    with HuggingFaceHub({MODEL: model}) as running, pytest.raises(ModelUnavailableError, match="cannot be read"):
        Client(*Volume(tmp_path, running).hub_arguments).names()


def test_a_pace_is_shared_and_a_pause_is_no_credit() -> None:
    now, slept = [100.0], []
    pace = Pace(1000, lambda: now[0], slept.append)
    pace.take(500)
    pace.take(500)
    now[0] = 200.0
    pace.take(1000)
    Pace(None, lambda: now[0], slept.append).take(1 << 40)
    assert slept == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
def test_a_pull_keeps_to_its_limit(tmp_path: Path, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}) as running:
        volume = Volume(tmp_path, running, PULL_RATE_LIMIT="2MB/s")
        begun = time.monotonic()
        assert volume.pull()[0] == 0
        assert time.monotonic() - begun > WEIGHTS_BYTES / 2_000_000
    assert volume.complete()


@pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
@pytest.mark.fault("Others fill the volume while a model is pulled, and what is to come has no room any more",
                   "It stops then, not when the volume is full; exit code 4, and what arrived is gone on with.")
def test_a_pull_stops_once_the_rest_has_no_room(tmp_path: Path, model: Path, kind: type[Hub],
                                                monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    def arrived() -> int:
        return sum(path.stat().st_size for path in pulled.folder.rglob(f"{WEIGHTS}*"))

    def statvfs(path: object) -> os.statvfs_result:
        blocks = 10 if arrived() else 1 << 20
        return os.statvfs_result((4096, 4096, blocks, blocks, blocks, 9, 9, 9, 0, 255))

    with kind({MODEL: model}) as running, mock.patch.dict(os.environ):
        pulled = Volume(tmp_path, running)
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", statvfs)
            patch.setattr(disk, "_CHECK_SECONDS", 0.0)
            with pytest.raises(ModelUnavailableError, match="disk full"):
                pull.pull(pulled.settings, lambda _: None)
        assert "Aborting download" in caplog.text
        assert 0 < arrived() < WEIGHTS_BYTES
        assert pulled.pull()[0] == 0
        assert [span for span in running.downloads(WEIGHTS) if span], "it went on"
    assert pulled.complete()


def test_the_room_is_looked_at_every_few_seconds_only(tmp_path: Path) -> None:
    now, asked = [0.0], []

    def left() -> int:
        asked.append(now[0])
        return 1

    watch = disk.FreeSpaceMonitor(tmp_path, left, lambda: now[0])
    for now[0] in (1.0, 4.9, 5.0, 9.9, 10.0):
        watch.check()
    assert asked == [5.0, 10.0]


def interrupted(home: Path, model: Path) -> Volume:
    """A volume with a pull from ModelScope that was killed."""
    with Hub({MODEL: model}) as hub:
        hub.hold_at_bytes = 2 << 20
        volume = Volume(home, hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1 << 20)
    volume.environment["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:9"
    return volume


def test_the_other_hub_goes_on_where_its_weights_are_the_same(tmp_path: Path, model: Path) -> None:
    volume = interrupted(tmp_path, model)
    with HuggingFaceHub({MODEL: model}) as hub:
        volume.environment["HF_ENDPOINT"] = hub.url
        code, _, err = volume.pull()
        assert code == 4
        assert "cannot be reached" in err
        assert hub.requests == [], "not asked unless the user allows it"
        volume.environment["MODEL_FALLBACK"] = "yes"
        code, out, err = volume.pull()
        assert (code, err) == (0, "")
        assert "it is used instead" in out
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes="), "what had arrived is gone on with"
    assert volume.complete()
    document = json.loads(volume.manifest.read_text())
    assert (document["source"], document["revision"], document["commit"]) == ("modelscope", "master", commit_of(model))
    assert document["endpoint"] == hub.url


def test_the_other_hub_is_refused_where_its_weights_differ_or_nothing_is_known(tmp_path: Path, model: Path) -> None:
    newer = newer_than(model, tmp_path / "newer")
    volume = interrupted(tmp_path, model)
    volume.environment["MODEL_FALLBACK"] = "yes"
    with HuggingFaceHub({MODEL: newer}) as hub:
        volume.environment["HF_ENDPOINT"] = hub.url
        with pytest.raises(ModelUnavailableError, match=f"has other weights.*{WEIGHTS}"):
            volume.pull_here()
        volume.manifest.unlink()
        with pytest.raises(ModelUnavailableError, match="no SHA-256 of the weights") as refusal:
            volume.pull_here()
        assert "MODEL_SOURCE=huggingface" in refusal.value.remedy
        assert hub.downloads(WEIGHTS) == []


@pytest.mark.parametrize("asked", [{"MODEL_REVISION": "v2"}, {"MODEL_SOURCE": "huggingface"}])
def test_what_is_known_of_another_revision_or_hub_does_not_count(tmp_path: Path, model: Path,
                                                                 asked: dict[str, str]) -> None:
    volume = interrupted(tmp_path, model)
    with HuggingFaceHub({MODEL: model}) as one, Hub({MODEL: model}) as other:
        one.faults.add("503" if asked.get("MODEL_SOURCE") else "pages")
        other.faults.add("503" if not asked.get("MODEL_SOURCE") else "slow")
        volume.environment |= {"HF_ENDPOINT": one.url, "MODELSCOPE_ENDPOINT": other.url, "MODEL_FALLBACK": "yes"}
        volume.environment |= asked
        with pytest.raises(ModelUnavailableError, match=r"answered 503.*no SHA-256 of the weights"):
            volume.pull_here()


def test_a_shard_that_only_the_other_hub_has_is_named(tmp_path: Path, model: Path) -> None:
    more = shutil.copytree(model, tmp_path / "more")
    write_weights(more / "more.safetensors")
    volume = interrupted(tmp_path, model)
    volume.environment["MODEL_FALLBACK"] = "yes"
    with HuggingFaceHub({MODEL: more}) as hub:
        volume.environment["HF_ENDPOINT"] = hub.url
        with pytest.raises(ModelUnavailableError, match=r"other weights.*: more\.safetensors"):
            volume.pull_here()


def test_a_hub_that_lists_and_does_not_give_is_replaced_too(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="absent") as chosen, Hub({MODEL: model}) as other:
        volume = Volume(tmp_path, chosen, MODELSCOPE_ENDPOINT=other.url, MODEL_FALLBACK="yes", MODEL_REVISION="main")
        code, out, err = volume.pull()
        assert (code, err) == (0, "")
        assert f"does not have {WEIGHTS}; the weights at {other.url} are the same" in out
        assert chosen.downloads("tokenizer.json")
        assert not other.downloads("tokenizer.json")
    assert volume.complete()


def test_when_both_hubs_fail_both_are_told(tmp_path: Path, model: Path) -> None:
    volume = interrupted(tmp_path, model)
    volume.environment |= {"MODEL_FALLBACK": "yes", "HF_ENDPOINT": "http://127.0.0.1:7"}
    with pytest.raises(HubFailedError, match=r"1:9 cannot be reached.*Nor does .*1:7 cannot be reached"):
        volume.pull_here()
