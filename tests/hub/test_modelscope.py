"""Client of ModelScope against a stand-in hub: listings, ranges, redirects, token and errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fakes.hub import Hub
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub import modelscope
from shoehorn.hub.files import is_plain
from shoehorn.hub.modelscope import ModelScopeRepository
from shoehorn.hub.repository import HubFailedError
from shoehorn.store import pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, write_model

pytestmark = pytest.mark.process

TOKEN = "ms-canary-token"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


def test_header_is_read_with_a_short_range(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        files = pull.hub_files(volume.settings, volume.ref)
        assert files.names()[WEIGHTS] == (model / WEIGHTS).stat().st_size
        length = int.from_bytes(files.read(WEIGHTS, 0, 8), "little")
        assert b"model.norm.weight" in files.read(WEIGHTS, 8, length)
        assert files.read(WEIGHTS, WEIGHTS_BYTES, 0) == b""
        assert hub.downloads(WEIGHTS) == ["bytes=0-7", f"bytes=8-{7 + length}"]


def test_range_is_limited_to_the_file(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub, ModelScopeRepository(*Volume(tmp_path, hub).hub_arguments) as client:
        content = (model / WEIGHTS).read_bytes()
        assert client.read(WEIGHTS, len(content) - 3, 100) == content[-3:]
        assert client.read("config.json") == (model / "config.json").read_bytes()


@pytest.mark.fault("The hub ignores Range", "Planning reads a header and closes the connection.")
def test_response_of_a_hub_that_ignores_ranges_is_not_read_to_its_end(tmp_path: Path, model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    with (Hub({MODEL: model}, fault="norange", bytes_per_second=100_000) as hub,  # 40 s for the whole file
          ModelScopeRepository(*Volume(tmp_path, hub).hub_arguments) as client):
        begun = time.monotonic()
        assert client.read(WEIGHTS, 100_000, 1000) == content[100_000:101_000]
        assert time.monotonic() - begun < 20


@pytest.mark.fault("The hub redirects to another host", "The file comes from there; the token is not sent there.")
def test_token_is_sent_to_the_hub_but_not_to_redirect_targets(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as storage, Hub({MODEL: model}, token=TOKEN, redirect=storage.url.replace(
            "127.0.0.1", "localhost")) as hub:
        volume = Volume(tmp_path, hub, MODELSCOPE_API_TOKEN=TOKEN)
        with ModelScopeRepository(*volume.hub_arguments) as client:
            assert client.read("tokenizer.json") == b"{}"
        code, out, err = volume.pull()
        assert code == 0, err
        assert storage.downloads(WEIGHTS) == [""]
        assert len(storage.requests) >= 5
        assert TOKEN not in str(storage.requests)
    assert TOKEN not in out + err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_missing_token_names_the_setting(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, token=TOKEN) as hub, pytest.raises(ModelUnavailableError) as caught:
        ModelScopeRepository(*Volume(tmp_path, hub).hub_arguments).names()
    assert caught.value.code == "hub_permission_denied"
    assert "MODELSCOPE_API_TOKEN" in caught.value.remedy


@pytest.mark.fault("The hub redirects endlessly, or to another protocol", "An error; nothing is downloaded.")
def test_endless_and_insecure_redirects_are_rejected(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub, ModelScopeRepository(*Volume(tmp_path, hub).hub_arguments) as client:
        hub.redirect = hub.url
        with pytest.raises(ModelUnavailableError, match="too many redirects"):
            client.read("config.json")
        for address in ("file:///etc", "ftp://127.0.0.1"):
            hub.redirect = address
            with pytest.raises(ModelUnavailableError, match="insecure"):
                client.read("config.json")


@pytest.mark.parametrize(("fault", "code", "remedy"), [
    ("401", "hub_permission_denied", "MODELSCOPE_API_TOKEN"), ("403", "hub_permission_denied", "MODELSCOPE_API_TOKEN"),
    ("404", "hub_not_found", "Check MODEL_ID"), ("429", "hub_error", "later"), ("503", "hub_error", "later")])
@pytest.mark.fault("The hub returns 401, 403, 404, 429 or 503", "Exit code 4 with the cause and the setting to change.")
def test_error_status_has_a_code_and_a_remedy(tmp_path: Path, model: Path, fault: str, code: str, remedy: str) -> None:
    with Hub({MODEL: model}, fault=fault) as hub, pytest.raises(ModelUnavailableError) as caught:
        ModelScopeRepository(*Volume(tmp_path, hub).hub_arguments).names()
    assert caught.value.code == code
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://[", "nowhere.invalid", "ftp://127.0.0.1", "http://",
                                     "http://127.0.0.1:port", "http://127.0.0.1:99999"])
@pytest.mark.fault("The endpoint is not a hub", "Exit code 4 with the address.")
def test_invalid_endpoint_is_an_error(tmp_path: Path, address: str) -> None:
    with pytest.raises(HubFailedError) as caught:
        ModelScopeRepository(*Volume(tmp_path, MODELSCOPE_ENDPOINT=address).hub_arguments).names()
    assert caught.value.code == "hub_unavailable"
    assert "MODELSCOPE_ENDPOINT" in caught.value.remedy


def test_endpoint_without_a_scheme_is_https(tmp_path: Path) -> None:
    assert modelscope.endpoint(Volume(tmp_path, MODELSCOPE_ENDPOINT="modelscope.ai/").settings) == "https://modelscope.ai"
    assert modelscope.endpoint(Volume(tmp_path, MODELSCOPE_ENDPOINT="").settings) == "https://modelscope.cn"


@pytest.mark.fault("The hub lists a file but does not have it", "Exit code 4 with the name of the file.")
def test_listed_but_missing_file_is_named(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="absent") as hub:
        volume = Volume(tmp_path, hub)
        with pytest.raises(ModelUnavailableError, match=f"File {WEIGHTS}"):
            pull.hub_files(volume.settings, volume.ref).read(WEIGHTS, 0, 8)
        code, _, err = volume.pull()
    assert code == 4
    assert f"{WEIGHTS}: listed by the hub, but not found" in err
    assert not volume.complete()


def list_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Any) -> list[str]:
    """Return the file names of a listing with these entries."""
    monkeypatch.setattr(ModelScopeRepository, "_entries", lambda self, recursive: entries)
    with ModelScopeRepository(*Volume(tmp_path).hub_arguments) as client:
        return list(client.names())


def entry(path: object, **more: object) -> dict[str, object]:
    return {"Path": path, "Type": "blob", "Size": 1, **more}


@pytest.mark.parametrize("path", [
    "/etc/passwd", "../x.json", "a/../../x.json", "a/..", "..", ".", "", "./a.json", "a//b.json", "a/", "a\\b.json",
    "a\nb.json", "a\x00.json", "a\x7f.json", "a\u202egnp.json", "a\u2028.json", "\ud800.json", " a.json", "a /b.json",
    "x" * 241, "x/" * 600 + "a"])
@pytest.mark.fault("The hub lists unsafe paths: `../`, absolute, unprintable",
                   "Nothing is downloaded, nothing is written outside the model's folder.")
def test_unsafe_path_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    assert not is_plain(path)
    with pytest.raises(ModelUnavailableError) as caught:
        list_names(tmp_path, monkeypatch, [entry("config.json"), entry(path)])
    assert caught.value.code == "hub_unsafe_path"


@pytest.mark.parametrize("path", ["config.json", "a b/c[1].json", "模型.json", "..a.json", "a/...json", "*.json"])
def test_safe_path_is_accepted_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    assert list_names(tmp_path, monkeypatch, [entry(path)]) == [path]


@pytest.mark.parametrize("entries", [
    [{"Path": "a"}], [entry("a", Size=None)], [entry("a", Size="x")], ["a"], [None], [{}], [entry("a", Size={})]])
def test_malformed_listing_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Any]) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        list_names(tmp_path, monkeypatch, entries)
    assert caught.value.code == "hub_invalid_listing"


@pytest.mark.parametrize(("entries", "code"), [
    ([entry(7)], "hub_unsafe_path"), ([entry("a", Size=-1)], "hub_unsafe_path"),
    ([entry("a"), entry("a")], "hub_invalid_listing"), ([entry("a", Sha256="abc")], "hub_invalid_listing")])
@pytest.mark.fault("The hub's listing contradicts itself", "Rejected before a byte is downloaded.")
def test_contradictory_listing_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Any],
                                           code: str) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        list_names(tmp_path, monkeypatch, entries)
    assert caught.value.code == code


def test_truncated_listing_is_requested_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bool] = []

    def entries(_self: ModelScopeRepository, *, recursive: bool) -> list[dict[str, object]]:
        requests.append(recursive)
        return [entry(f"{number}.json") for number in range(3000 if recursive else 2)]

    monkeypatch.setattr(ModelScopeRepository, "_entries", entries)
    with ModelScopeRepository(*Volume(tmp_path).hub_arguments) as client:
        assert len(client.names()) == 2
    assert requests == [True, False]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"Data": null}', b'{"Data": {}}', b"[" * 100_000])
def test_invalid_response_body_is_an_error(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                           body: bytes) -> None:
    monkeypatch.setattr(json, "dumps", lambda _: body.decode())  # the stand-in's listing becomes this
    with Hub({MODEL: model}) as hub, pytest.raises(ModelUnavailableError) as caught:
        ModelScopeRepository(*Volume(tmp_path, hub).hub_arguments).names()
    assert caught.value.code == "hub_invalid_listing"


HEAD, EARLIER = "83ee97c66e841048bedc5c02c15ce2f3ed259feb", "f194f50981eaaa6019bbec5049a4c7e1fd294110"


@pytest.mark.parametrize(("latest", "commits", "expected"), [
    ({"Id": HEAD}, [EARLIER], HEAD), ({"Id": "", "ShortId": HEAD[:8]}, [EARLIER, HEAD], HEAD),
    ({"ShortId": HEAD[:8]}, [EARLIER], ""), ({"ShortId": ""}, [EARLIER], ""), ({"ShortId": "83"}, [HEAD], ""),
    (None, [HEAD], ""), ({"Id": "master", "ShortId": "master"}, ["master"], "")])
def test_commit_of_a_listing_is_derived_or_unknown(latest: object, commits: list[str], expected: str) -> None:
    assert modelscope._commit(latest, [{"Revision": commit} for commit in commits] + ["odd"]) == expected


def test_missing_revision_is_an_error(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub, pytest.raises(HubFailedError, match=f"{MODEL}.*{HEAD}") as caught:
        ModelScopeRepository(*Volume(tmp_path, hub, MODEL_REVISION=HEAD).hub_arguments).names()
    assert caught.value.code == "hub_not_found"
