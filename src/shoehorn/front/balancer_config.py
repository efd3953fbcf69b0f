"""HAProxy's configuration in a front."""

from __future__ import annotations

import re
import resource
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import GATEWAY
from shoehorn.config.settings import Settings
from shoehorn.front.names import AFFINITY_HEADER, REPLICA_HEADER
from shoehorn.runtime import peer_certificates
from shoehorn.runtime.run_dir import RunDir

BALANCE_PERCENT = 200
"""Load of one replica, in percent of the average, above which its requests go to the next one. An engine serves several
requests in one batch, so a low bound costs more prefixes than it saves time: with four conversations on three replicas
150 moved 12 % of the requests."""
ANSWER_SECONDS = 6 * 3600
"""Time limit between two reads of an answer, as of nginx (`gateway.nginx_config.READ_SECONDS`)."""
MAX_CONNECTIONS = 16384
"""As of the gateway; fewer where the system permits fewer open files."""
_FILES_PER_CONNECTION = 2
_FILES_PER_REPLICA = 2
_OTHER_FILES = 64
_PLAIN_PATH = re.compile(r"[\w./+-]{1,90}", re.ASCII)


def render(settings: Settings) -> str:
    """Render `haproxy.cfg`.

    Raises:
        SettingsError: HAProxy would misread the path of RUN_DIR.
    """
    paths = RunDir(settings.run_dir.absolute())
    if not _PLAIN_PATH.fullmatch(str(paths.path)):
        raise SettingsError(f"RUN_DIR={paths.path}: too long for a socket, or contains a character that HAProxy "
                            "treats specially.", "Set another RUN_DIR, for example /run/shoehorn.")
    # The output is not HTML, and every value is checked.
    environment = Environment(loader=FileSystemLoader(GATEWAY), undefined=StrictUndefined, autoescape=False,  # noqa: S701
                              trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("haproxy.cfg.j2").render(
        paths=paths, replicas=settings.replicas, balance_percent=BALANCE_PERCENT,
        connections=max_connections(len(settings.replicas), resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        answer_seconds=ANSWER_SECONDS, affinity_header=AFFINITY_HEADER, replica_header=REPLICA_HEADER,
        replica_name=peer_certificates.common_name("replica"),
        resolves_names=any(replica.is_name for replica in settings.replicas))


def max_connections(replicas: int, open_files: int) -> int:
    """Return the number of connections that fits into the limit on open files, at least 1."""
    if open_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    free = open_files - _OTHER_FILES - replicas * _FILES_PER_REPLICA
    return max(1, min(MAX_CONNECTIONS, free // _FILES_PER_CONNECTION))


def write(settings: Settings, secret: str) -> Path:
    """Write the configuration and the certificates; return the configuration's path."""
    paths = RunDir(settings.run_dir.absolute())
    certificate = peer_certificates.issue(secret, "front")
    write_atomic(paths.peer_authority, certificate.authority.decode(), 0o600)
    write_atomic(paths.peer_pair, certificate.pair.decode(), 0o600)
    write_atomic(paths.balancer_config, render(settings), 0o600)
    return paths.balancer_config
