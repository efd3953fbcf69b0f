"""TLS certificate and key: checked, and installed for nginx.

Rules:
- nginx reads one file, `tls.pem` in RUN_DIR, with the key and the chain: replaced as a whole, so that they always
  match, and only by a checked pair. An invalid new pair is logged, and the current one stays;
- nginx reads the file for each new connection: a change needs no reload, which would interrupt long streams;
- the key is copied to no other file, and only its owner can read this one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.common.file_stamp import FileStamp, stamp
from shoehorn.config.settings import Settings
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("tls")

_CHECK_SECONDS = 2.0
_REMEDY = "Provide a certificate with its chain, and its key, as PEM."


def install(settings: Settings) -> bool:
    """Check the pair of the settings and install it; returns whether it changed.

    Raises:
        SettingsError: a file is unreadable or not PEM, the key needs a password, or the two do not match.
    """
    if not settings.tls_cert_file or not settings.tls_key_file:
        raise ValueError("TLS is off")
    paths = RunDir(settings.run_dir)
    target, candidate = paths.tls_pair, paths.tls_candidate
    texts = [_read(name, file) for name, file in (("TLS_KEY_FILE", settings.tls_key_file),
                                                  ("TLS_CERT_FILE", settings.tls_cert_file))]
    text = "\n".join(part.strip() for part in texts) + "\n"
    if target.exists() and target.read_text(encoding="ascii") == text:
        return False
    write_atomic(candidate, text, 0o600)
    try:
        check(candidate, settings)
        os.replace(candidate, target)
    finally:
        candidate.unlink(missing_ok=True)
    return True


def check(pair: Path, settings: Settings) -> None:
    """Load a file with key and chain, as nginx will.

    Raises:
        SettingsError: it is invalid.
    """
    names = f"TLS_CERT_FILE={settings.tls_cert_file} and TLS_KEY_FILE={settings.tls_key_file}"
    password_requests: list[bool] = []

    def password() -> str:
        password_requests.append(True)
        return ""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair, password=password)
    except ssl.SSLError as error:
        if password_requests:
            problem, remedy = "the key needs a password", "Remove it: openssl pkey -in KEY -out NEW_KEY"
        elif error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            problem, remedy = "mismatch of key and certificate", "Provide the key of this certificate."
        else:
            problem, remedy = f"invalid ({error.reason or 'not PEM'})", _REMEDY
        raise SettingsError(f"{names}: {problem}.", remedy) from None
    except ValueError as error:
        raise SettingsError(f"{names}: {error}.", _REMEDY) from None


class CertificateWatch:
    """Installs the pair whenever its files change."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = [file for file in (settings.tls_cert_file, settings.tls_key_file) if file]
        self._stamps: list[FileStamp | None] = []  # unlike any, so that the first check compares the contents

    async def run(self) -> None:
        """Check every 2 s until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await asyncio.to_thread(self.check)

    def check(self) -> None:
        """Install the pair if a file changed; a problem is logged once per change."""
        stamps = [stamp(file) for file in self._files]
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            if install(self._settings):
                log.info("installed a new TLS certificate")
        except (SettingsError, OSError) as error:
            log.error("rejected the new TLS certificate, keeping the current one: error=%s", error)


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise SettingsError(f"{name}={file}: not a PEM file.", "Convert it: openssl x509 or openssl pkey") from None
    except OSError as error:
        raise SettingsError(f"{name}={file}: user {os.geteuid()} cannot read it ({error.strerror}).",
                            "Mount it readable for that user.") from error
