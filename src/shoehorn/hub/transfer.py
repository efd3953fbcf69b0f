"""File transfer parts that both hub clients share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.hub.rate_limit import Pace
from shoehorn.hub.repository import HubFailedError, HubFiles


def arrivals(settings: Settings, directory: Path, needed: Sequence[ModelFile]) -> Callable[[int], None]:
    """What is to be called with the bytes that arrived, by any thread: holds them to the limit, and watches the volume.

    It raises OSError (ENOSPC) where the volume would be full before the end.
    """
    pace, total = Pace(settings.pull_rate_limit), sum(file.size_bytes for file in needed)
    monitor = disk.FreeSpaceMonitor(directory, lambda: total - bytes_there(directory, needed))

    def arrived(count_bytes: int) -> None:
        pace.take(count_bytes)
        monitor.check()

    return arrived


def bytes_there(directory: Path, files: Sequence[ModelFile]) -> int:
    """How many bytes of `files` lie in `directory`, those of partial files with them."""
    there = 0
    for file in files:
        path = directory / file.path
        for candidate in (path, partial_path(path)):
            try:
                there += min(file.size_bytes, candidate.stat().st_size)
                break
            except OSError:
                continue  # not there, or just renamed
    return there


def partial_path(path: Path) -> Path:
    """Where the library keeps what it has of a file."""
    return path.with_name(f"{path.name}.incomplete")


def private_home(settings: Settings, name: str) -> Path:
    """A folder under RUN_DIR for what a hub's library keeps, entered by its owner only."""
    home = settings.run_dir / name
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)  # fails where it belongs to another user
    except OSError as error:
        raise ModelUnavailableError(f"{home} cannot be made or kept private: {error.strerror}.",
                                    "Set RUN_DIR to a folder that this user may write.") from error
    return home


def wrong_size(names: str, hub: type[HubFiles]) -> ModelUnavailableError:
    """What to say of files that come longer or shorter than listed."""
    return ModelUnavailableError(f"The hub sends another size than it lists: {names}.",
                                 f"Try again later, or another {hub.endpoint_setting}.")


def not_let(names: str, hub: type[HubFiles]) -> ModelUnavailableError:
    """What to say of files that this token does not open."""
    return ModelUnavailableError(f"The hub does not let us read {names}.",
                                 f"Set {hub.token_setting} to a token that may.")


def gone(names: str) -> HubFailedError:
    """What to say of files that are listed and not given."""
    return HubFailedError(f"The hub lists but does not have {names}.", "Try again later, or another MODEL_REVISION.")


def stopped(names: str, status: int | None, cause: BaseException) -> HubFailedError:
    """What to say of a download that ended early, by an HTTP status or another error."""
    what = f"the hub answered {status}" if status else f"the connection failed ({type(cause).__name__})"
    return HubFailedError(f"The download of {names} stopped: {what}.",
                          "Start again: what has arrived is kept and gone on with.")
