"""Looking at a model on a stand-in hub: listings, short ranges, redirects, the token, and trouble in words."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fakes.hub import Hub
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub import modelscope as hub_module
from shoehorn.hub.files import is_plain
from shoehorn.hub.modelscope import Hub as Client
from shoehorn.store import pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, write_model

pytestmark = pytest.mark.process

TOKEN = "ms-canary-token"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


def test_a_header_is_read_by_a_short_range(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        files = pull.hub_files(volume.settings, volume.ref)
        assert files.names()[WEIGHTS] == (model / WEIGHTS).stat().st_size
        length = int.from_bytes(files.read(WEIGHTS, 0, 8), "little")
        assert b"model.norm.weight" in files.read(WEIGHTS, 8, length)
        assert files.read(WEIGHTS, WEIGHTS_BYTES, 0) == b""
        assert hub.downloads(WEIGHTS) == ["bytes=0-7", f"bytes=8-{7 + length}"]


def test_a_range_ends_where_the_file_ends(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub, Client(*Volume(tmp_path, hub).hub_arguments) as client:
        content = (model / WEIGHTS).read_bytes()
        assert client.read(WEIGHTS, len(content) - 3, 100) == content[-3:]
        assert client.read("config.json") == (model / "config.json").read_bytes()


@pytest.mark.fault("The hub ignores Range", "Planning reads a header and leaves the rest.")
def test_a_hub_that_ignores_ranges_is_understood_and_not_read_to_its_end(tmp_path: Path, model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    with (Hub({MODEL: model}, fault="norange", bytes_per_second=100_000) as hub,  # 40 s for the whole file
          Client(*Volume(tmp_path, hub).hub_arguments) as client):
        begun = time.monotonic()
        assert client.read(WEIGHTS, 100_000, 1000) == content[100_000:101_000]
        assert time.monotonic() - begun < 20


@pytest.mark.fault("The hub redirects to another host", "The file comes from there; the token does not go there.")
def test_the_token_goes_to_the_hub_and_not_where_it_redirects(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as storage, Hub({MODEL: model}, token=TOKEN, redirect=storage.url.replace(
            "127.0.0.1", "localhost")) as hub:
        volume = Volume(tmp_path, hub, MODELSCOPE_API_TOKEN=TOKEN)
        with Client(*volume.hub_arguments) as client:
            assert client.read("tokenizer.json") == b"{}"
        code, out, err = volume.pull()
        assert code == 0, err
        assert storage.downloads(WEIGHTS) == [""]
        assert len(storage.requests) >= 5
        assert TOKEN not in str(storage.requests)
    assert TOKEN not in out + err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_without_the_token_the_setting_is_named(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, token=TOKEN) as hub, pytest.raises(ModelUnavailableError) as refusal:
        Client(*Volume(tmp_path, hub).hub_arguments).names()
    assert "MODELSCOPE_API_TOKEN" in refusal.value.remedy


@pytest.mark.fault("The hub redirects for ever, or to another protocol", "Refused in words.")
def test_a_redirect_without_end_and_one_to_elsewhere_are_refused(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub, Client(*Volume(tmp_path, hub).hub_arguments) as client:
        hub.redirect = hub.url
        with pytest.raises(ModelUnavailableError, match="without end"):
            client.read("config.json")
        for address in ("file:///etc", "ftp://127.0.0.1"):
            hub.redirect = address
            with pytest.raises(ModelUnavailableError, match="unsafe"):
                client.read("config.json")


@pytest.mark.parametrize(("fault", "cause", "remedy"), [
    ("401", "does not let us read", "MODELSCOPE_API_TOKEN"), ("403", "does not let us read", "MODELSCOPE_API_TOKEN"),
    ("404", f"no model {MODEL} at revision master", "Check MODEL_ID"), ("429", "answered 429", "later"),
    ("503", "answered 503", "later")])
@pytest.mark.fault("The hub refuses: 401, 403, 404, 429, 503", "Exit code 4 with the cause and the setting to change.")
def test_a_refusal_says_what_to_do(tmp_path: Path, model: Path, fault: str, cause: str, remedy: str) -> None:
    with Hub({MODEL: model}, fault=fault) as hub, pytest.raises(ModelUnavailableError, match=cause) as refusal:
        Client(*Volume(tmp_path, hub).hub_arguments).names()
    assert remedy in refusal.value.remedy


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://[", "nowhere.invalid", "ftp://127.0.0.1", "http://",
                                     "http://127.0.0.1:port", "http://127.0.0.1:99999"])
@pytest.mark.fault("The address is no hub", "Exit code 4 with the address.")
def test_a_hub_that_is_none_is_told_in_words(tmp_path: Path, address: str) -> None:
    with pytest.raises(ModelUnavailableError, match="cannot be reached") as refusal:
        Client(*Volume(tmp_path, MODELSCOPE_ENDPOINT=address).hub_arguments).names()
    assert "MODELSCOPE_ENDPOINT" in refusal.value.remedy


def test_an_address_without_a_scheme_is_https(tmp_path: Path) -> None:
    assert hub_module.endpoint(Volume(tmp_path, MODELSCOPE_ENDPOINT="modelscope.ai/").settings) == "https://modelscope.ai"
    assert hub_module.endpoint(Volume(tmp_path, MODELSCOPE_ENDPOINT="").settings) == "https://modelscope.cn"


@pytest.mark.fault("The hub lists a file and does not give it", "Exit code 4, and the file's name.")
def test_a_file_that_is_listed_but_not_given_is_named(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="absent") as hub:
        volume = Volume(tmp_path, hub)
        with pytest.raises(ModelUnavailableError, match=f"no file {WEIGHTS}"):
            pull.hub_files(volume.settings, volume.ref).read(WEIGHTS, 0, 8)
        code, _, err = volume.pull()
    assert code == 4
    assert f"does not have {WEIGHTS}" in err
    assert not volume.complete()


def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Any) -> list[str]:
    """The names in a listing with these entries."""
    monkeypatch.setattr(Client, "_entries", lambda self, recursive: entries)
    with Client(*Volume(tmp_path).hub_arguments) as client:
        return list(client.names())


def entry(path: object, **more: object) -> dict[str, object]:
    return {"Path": path, "Type": "blob", "Size": 1, **more}


@pytest.mark.parametrize("path", [
    "/etc/passwd", "../x.json", "a/../../x.json", "a/..", "..", ".", "", "./a.json", "a//b.json", "a/", "a\\b.json",
    "a\nb.json", "a\x00.json", "a\x7f.json", "a\u202egnp.json", "a\u2028.json", "\ud800.json", " a.json", "a /b.json",
    "x" * 241, "x/" * 600 + "a"])
@pytest.mark.fault("The hub lists `../`, absolute and other paths that are none",
                   "Nothing is fetched, nothing written outside.")
def test_a_path_that_is_not_plain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    assert not is_plain(path)
    with pytest.raises(ModelUnavailableError, match="a path that no model has"):
        listed(tmp_path, monkeypatch, [entry("config.json"), entry(path)])


@pytest.mark.parametrize("path", ["config.json", "a b/c[1].json", "模型.json", "..a.json", "a/...json", "*.json"])
def test_a_plain_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    assert listed(tmp_path, monkeypatch, [entry(path)]) == [path]


@pytest.mark.parametrize("entries", [
    [{"Path": "a"}], [entry("a", Size=None)], [entry("a", Size="x")], ["a"], [None], [{}], [entry("a", Size={})]])
def test_a_listing_that_makes_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  entries: list[Any]) -> None:
    with pytest.raises(ModelUnavailableError, match="cannot be read"):
        listed(tmp_path, monkeypatch, entries)


@pytest.mark.parametrize(("entries", "words"), [
    ([entry(7)], "no model has"), ([entry("a", Size=-1)], "no model has"),
    ([entry("a"), entry("a")], "twice"), ([entry("a", Sha256="abc")], "checksum that is none")])
@pytest.mark.fault("The hub's listing contradicts itself", "Refused before a byte is fetched.")
def test_a_listing_that_lies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Any],
                                        words: str) -> None:
    with pytest.raises(ModelUnavailableError, match=words):
        listed(tmp_path, monkeypatch, entries)


def test_a_cut_listing_is_asked_for_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def entries(_self: Client, *, recursive: bool) -> list[dict[str, object]]:
        asked.append(recursive)
        return [entry(f"{number}.json") for number in range(3000 if recursive else 2)]

    monkeypatch.setattr(Client, "_entries", entries)
    with Client(*Volume(tmp_path).hub_arguments) as client:
        assert len(client.names()) == 2
    assert asked == [True, False]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"Data": null}', b'{"Data": {}}', b"[" * 100_000])
def test_a_body_that_is_no_listing_is_told(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                           body: bytes) -> None:
    monkeypatch.setattr(json, "dumps", lambda _: body.decode())  # of the stand-in: its listing becomes this
    with Hub({MODEL: model}) as hub, pytest.raises(ModelUnavailableError, match="cannot be read"):
        Client(*Volume(tmp_path, hub).hub_arguments).names()
