"""TLS: the certificate and its key, checked and put where nginx reads them.

Rules:
- nginx gets one file, `tls.pem` in RUN_DIR, with the key and the chain: replaced as a whole, so that they always match,
  and only by a pair that was checked. A bad new pair is logged, and the old one goes on;
- nginx reads the file for each new connection, so that a change needs no reload, which would cut long streams;
- the key is copied nowhere else, and the file is its owner's alone.
"""

from __future__ import annotations

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


def install(settings: Settings) -> bool:
    """Check the pair of the settings and put it into force; returns whether it is another than before.

    Raises:
        SettingsError: a file cannot be read, is no PEM, needs a password, or the two do not match.
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
    """Load a file that holds key and chain, as nginx will.

    Raises:
        SettingsError: it cannot be used.
    """
    named = f"TLS_CERT_FILE={settings.tls_cert_file} and TLS_KEY_FILE={settings.tls_key_file}"
    asked: list[bool] = []

    def password() -> str:
        asked.append(True)
        return ""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pair, password=password)
    except ssl.SSLError as error:
        if asked:
            cause, remedy = "the key needs a password", "Give one without: openssl pkey -in KEY -out NEW_KEY"
        elif error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            cause, remedy = "the key does not belong to the certificate", "Put the two that were made together there."
        else:
            cause = f"they are not what they should be ({error.reason or 'no PEM'})"
            remedy = "Give a certificate with its chain, and its key, as PEM."
        raise SettingsError(f"{named}: {cause}.", remedy) from None
    except ValueError as error:
        raise SettingsError(f"{named}: {error}.", "Give a certificate with its chain, and its key, as PEM.") from None


class Watch:
    """Looks at the files again and again, and installs what is new."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = [file for file in (settings.tls_cert_file, settings.tls_key_file) if file]
        self._stamps: list[FileStamp | None] = []  # unlike any, so that the first check compares the contents

    def look(self) -> None:
        """Install the pair when a file changed; what is wrong with it is logged once for each change."""
        stamps = [stamp(file) for file in self._files]
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            if install(self._settings):
                log.info("a new certificate is in force")
        except (SettingsError, OSError) as error:
            log.error("the certificate in force goes on, for the new one cannot be used: %s", error)


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise SettingsError(f"{name}={file} is no PEM file.", "Convert it with: openssl x509 or openssl pkey") from None
    except OSError as error:
        raise SettingsError(f"{name}={file} cannot be read by user {os.geteuid()}: {error.strerror}.",
                            "Mount it readable for that user.") from error
