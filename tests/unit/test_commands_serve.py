"""What a start says about keys: all that a person needs, and no key that was not just made."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from shoehorn.commands.serve import first_key_line, no_core_dumps, welcome
from shoehorn.key_store import KeyStore, NewKey
from shoehorn.settings import load

BASE = {"MODEL_ID": "a/b", "PORT": "7001"}


@pytest.fixture
def made(tmp_path: Path) -> NewKey:
    new = KeyStore(tmp_path).first(0.0)
    assert new is not None
    return new


def test_a_key_just_made_is_shown_ready_to_paste(made: NewKey) -> None:
    text = welcome(load(BASE), made)
    assert f'curl -N http://127.0.0.1:7001/v1/chat/completions -H "Authorization: Bearer {made.token}"' in text
    assert made.token in first_key_line(made)
    assert "shoehorn keys rotate default" in first_key_line(made)


def test_a_given_key_is_not_shown() -> None:
    text = welcome(load({**BASE, "API_KEY": "sk-canary-key"}), None)
    assert "Bearer $API_KEY" in text
    assert "canary" not in text


def test_a_key_of_before_is_not_known_and_the_way_to_a_new_one_is() -> None:
    text = welcome(load(BASE), None)
    assert "Bearer YOUR_KEY" in text
    assert "shoehorn keys add NAME" in text


def test_with_a_certificate_the_address_is_https() -> None:
    text = welcome(load({**BASE, "API_KEY": "sk-canary-key", "TLS_CERT_FILE": "/c", "TLS_KEY_FILE": "/k"}), None)
    assert "curl -k -N https://127.0.0.1:7001/" in text


@pytest.mark.parametrize(("most", "limit"), [(resource.RLIM_INFINITY, 1), (4096, 1), (1, 1), (0, 0)])
def test_core_dumps_are_kept_from_files_and_from_pipes(monkeypatch: pytest.MonkeyPatch, most: int, limit: int) -> None:
    made: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, most))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: made.append((which, limits)))
    no_core_dumps()
    assert made == [(resource.RLIMIT_CORE, (limit, limit))]
