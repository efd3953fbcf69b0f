"""File transfer: rate limit, partial files, private library folders and errors, for both hubs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.rate_limit import RateLimiter
from shoehorn.hub.repository import HubFailedError, RemoteRepository


def receive_callback(settings: Settings, directory: Path, needed: Sequence[ModelFile]) -> Callable[[int], None]:
    """Return a thread-safe function to call with the number of received bytes.

    It enforces the rate limit and raises OSError (ENOSPC) if the volume would be full before the download ends.
    """
    limiter, total = RateLimiter(settings.pull_rate_limit), sum(file.size_bytes for file in needed)
    monitor = disk.FreeSpaceMonitor(directory, lambda: total - stored_bytes(directory, needed))

    def receive(count_bytes: int) -> None:
        limiter.acquire(count_bytes)
        monitor.check()

    return receive


def stored_bytes(directory: Path, files: Sequence[ModelFile]) -> int:
    """Count the bytes of `files` in `directory`, including partial files."""
    total = 0
    for file in files:
        path = directory / file.path
        for candidate in (path, partial_path(path)):
            try:
                total += min(file.size_bytes, candidate.stat().st_size)
                break
            except OSError:
                continue  # missing, or just renamed
    return total


def partial_path(path: Path) -> Path:
    """Return the path of a partially downloaded file."""
    return path.with_name(f"{path.name}.incomplete")


def private_home(settings: Settings, name: str) -> Path:
    """Create a private folder under RUN_DIR for the files of a hub's library."""
    home = settings.run_dir / name
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)  # fails if another user owns it
    except OSError as error:
        raise ModelUnavailableError(f"{home}: cannot be created or made private: {error.strerror}.",
                                    "Set RUN_DIR to a folder that this user may write.",
                                    code="run_dir_not_writable") from error
    return home


def size_mismatch_error(names: str, hub: type[RemoteRepository]) -> ModelUnavailableError:
    """Return the error for files whose size differs from the listing."""
    return ModelUnavailableError(f"{names}: size mismatch between download and hub listing.",
                                 f"Retry later, or set another {hub.endpoint_setting}.", code="hub_size_mismatch")


def permission_error(names: str, hub: type[RemoteRepository]) -> ModelUnavailableError:
    """Return the error for files that the token does not grant access to."""
    return ModelUnavailableError(f"{names}: permission denied by the hub.",
                                 f"Set {hub.token_setting} to a token with access.", code="hub_permission_denied")


def missing_file_error(names: str) -> HubFailedError:
    """Return the error for files that the hub lists but does not have."""
    return HubFailedError(f"{names}: listed by the hub, but not found.", "Retry later, or set another MODEL_REVISION.",
                          code="hub_file_not_found")


def interrupted_error(names: str, status: int | None, cause: BaseException) -> HubFailedError:
    """Return the error for a download that ended early, with an HTTP status or another cause."""
    reason = f"the hub returned status {status}" if status else f"connection failed ({type(cause).__name__})"
    return HubFailedError(f"Download of {names}: {reason}.", "Retry: downloaded data is kept and resumed.",
                          code="hub_download_interrupted")
