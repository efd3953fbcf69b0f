"""Installation and rejection of TLS certificates. With nginx: tests/gateway/test_gateway_network.py."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from fakes import certificates
from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import Settings, load
from shoehorn.gateway import tls
from shoehorn.runtime.run_dir import RunDir


def _settings(home: Path) -> Settings:
    cert, key = certificates.write(home)
    return load({"MODELS_DIR": str(home), "RUN_DIR": str(home), "MODEL_ID": "a/b", "TLS_CERT_FILE": str(cert),
                 "TLS_KEY_FILE": str(key)})


def _encrypt(file: Path) -> None:
    key = serialization.load_pem_private_key(file.read_bytes(), None)
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                       serialization.BestAvailableEncryption(b"password")))


def test_valid_pair_is_installed_once_and_privately(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert tls.install(settings)
    assert not tls.install(settings)
    assert RunDir(tmp_path).tls_pair.stat().st_mode & 0o777 == 0o600
    tls.check(RunDir(tmp_path).tls_pair, settings)
    certificates.write(tmp_path)
    assert tls.install(settings)


@pytest.mark.parametrize(("damage", "match"), [
    (lambda cert, key: key.write_text(""), "invalid"),
    (lambda cert, key: cert.write_text(""), "invalid"),
    (lambda cert, key: cert.write_text(cert.read_text()[:200]), "invalid"),
    (lambda cert, key: key.write_text(key.read_text()[:100]), "invalid"),
    (lambda cert, key: shutil.copy(certificates.write(_folder(cert))[1], key), "mismatch of key and certificate"),
    (lambda cert, key: _encrypt(key), "needs a password"),
    (lambda cert, key: cert.write_bytes(b"\x30\x82\xff"), "TLS_CERT_FILE=.*: not a PEM"),
    (lambda cert, key: key.unlink(), "TLS_KEY_FILE=.* cannot read it")])
def test_invalid_pair_is_reported_and_the_current_one_stays(tmp_path: Path, damage: object, match: str) -> None:
    settings = _settings(tmp_path)
    tls.install(settings)
    before = RunDir(tmp_path).tls_pair.read_bytes()
    assert callable(damage)
    damage(settings.tls_cert_file, settings.tls_key_file)
    with pytest.raises(SettingsError, match=match) as caught:
        tls.install(settings)
    assert caught.value.remedy
    assert "PRIVATE" not in str(caught.value)
    assert RunDir(tmp_path).tls_pair.read_bytes() == before
    assert not RunDir(tmp_path).tls_candidate.exists()


def test_watch_installs_changes_and_logs_a_problem_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = _settings(tmp_path)
    tls.install(settings)
    watch = tls.CertificateWatch(settings)
    with caplog.at_level(logging.INFO):
        watch.check()
        assert not caplog.records
        certificates.write(tmp_path)
        watch.check()
        assert "installed a new TLS certificate" in caplog.text
        assert settings.tls_cert_file is not None
        settings.tls_cert_file.unlink()
        for _ in range(3):
            watch.check()
        assert caplog.text.count("rejected the new TLS certificate") == 1


def _folder(beside: Path) -> Path:
    folder = beside.with_name("other")
    folder.mkdir()
    return folder
