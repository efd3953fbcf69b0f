"""Credentials from the secret of a cluster: equal on all nodes, useless without it, and not readable by others."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

from shoehorn.cluster import credentials
from shoehorn.runtime.run_dir import RunDir

SECRET = "s" * 40


def node(folder: Path, content: str = SECRET) -> RunDir:
    """Install the credentials of a node at 127.0.0.1."""
    folder.mkdir()
    credentials.install(content, "127.0.0.1", RunDir(folder))
    return RunDir(folder)


def connects(server: RunDir, client: RunDir) -> bool:
    """Return True if a client of one node and a server of the other accept each other's certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.node_certificate, server.node_key)
    context.load_verify_locations(server.cluster_authority)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer() -> None:
            try:
                with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                    connection.sendall(b"hello")
            except OSError:
                return

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            trust = credentials.client_context(client)
            with socket.create_connection(listener.getsockname()) as plain, \
                    trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                return connection.recv(16) == b"hello"
        except OSError:
            return False
        finally:
            thread.join()


def test_nodes_with_the_same_secret_accept_each_other_and_no_other(tmp_path: Path) -> None:
    first, second, other = node(tmp_path / "1"), node(tmp_path / "2"), node(tmp_path / "3", "t" * 40)
    assert connects(first, second)
    assert connects(second, first)
    assert not connects(first, other)
    assert not connects(other, first)
    assert first.ray_token.read_text() == second.ray_token.read_text() != other.ray_token.read_text()


def test_files_are_private_and_contain_no_secret(tmp_path: Path) -> None:
    paths = node(tmp_path / "1")
    assert paths.cluster.stat().st_mode & 0o777 == 0o700
    for file in paths.cluster.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file
        assert SECRET not in file.read_text()
