"""Credentials of a node, derived from the secret of the cluster: Ray's token, and a TLS certificate.

Rules:
- every node derives the same token and the same certificate authority from the secret (`runtime.peer_certificates`),
  and issues a certificate for its own address: a node without the secret cannot make one;
- the files are in RUN_DIR, readable by this user only; no argument, log line or environment variable contains the
  secret or what is derived from it.
"""

from __future__ import annotations

import ipaddress
import ssl

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from shoehorn.common.atomic_file import write_atomic
from shoehorn.runtime import peer_certificates
from shoehorn.runtime.run_dir import RunDir

_AUTHORITY_PURPOSE = b"shoehorn nodes, certificate authority, version 1"
_TOKEN_PURPOSE = b"shoehorn nodes, token of Ray, version 1"
_LOOPBACK = "127.0.0.1"


def install(secret: str, address: str, paths: RunDir) -> None:
    """Write the credentials of the node at `address`."""
    paths.cluster.mkdir(mode=0o700, exist_ok=True)
    write_atomic(paths.ray_token, peer_certificates.derive(secret, _TOKEN_PURPOSE, 32).hex(), 0o600)
    names = [*(x509.IPAddress(ipaddress.ip_address(each)) for each in (address, _LOOPBACK)), x509.DNSName("localhost")]
    certificate = peer_certificates.issue_for(
        secret, _AUTHORITY_PURPOSE, "shoehorn-nodes", address, names,
        [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    write_atomic(paths.cluster_authority, certificate.authority.decode(), 0o600)
    write_atomic(paths.node_certificate, certificate.pair.decode(), 0o600)
    write_atomic(paths.node_key, certificate.pair.decode(), 0o600)


def client_context(paths: RunDir) -> ssl.SSLContext:
    """Return the TLS context of a client: trusts nodes of this cluster only, and shows this node's certificate."""
    context = ssl.create_default_context(cafile=str(paths.cluster_authority))
    context.load_cert_chain(paths.node_certificate, paths.node_key)
    return context
