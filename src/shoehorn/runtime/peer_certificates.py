"""Mutual TLS between a front and its replicas: a certificate authority that is derived from the cluster's secret.

Rules:
- every container derives the same authority from the secret, and issues its own certificate at each start; no
  certificate is exchanged, and a new secret replaces all of them;
- a certificate names the role (`shoehorn-front`, `shoehorn-replica`): a replica accepts the front's only, so that one
  replica cannot send requests to another;
- the authority's key is never written; the certificate's own key is in a file that only its owner can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Peer = Literal["front", "replica"]

_BEGIN, _END = datetime(2020, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, tzinfo=UTC)
"""The secret limits the validity, not a date: a clock that is wrong must not stop the requests."""
_CURVE = ec.SECP256R1()
_PURPOSE = b"shoehorn replicas, certificate authority, version 1"


class PeerCertificate(NamedTuple):
    """PEM texts: the authority's certificate, and the own certificate followed by its key."""

    authority: bytes
    pair: bytes


def issue(secret: str, peer: Peer) -> PeerCertificate:
    """Issue a certificate for one start of a front or a replica."""
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if peer == "front" else ExtendedKeyUsageOID.SERVER_AUTH
    name = common_name(peer)
    return issue_for(secret, _PURPOSE, "shoehorn-replicas", name, [x509.DNSName(name)], [usage])


def issue_for(secret: str, purpose: bytes, authority: str, subject: str, names: Sequence[x509.GeneralName],
              usages: Sequence[x509.ObjectIdentifier]) -> PeerCertificate:
    """Issue a certificate of an authority that is derived from the secret for one purpose.

    Args:
        authority: its name; subject, names: of the certificate.
        usages: as client, as server, or both.

    Source: RFC 5869 (HKDF) with SHA-256; 48 bytes reduced to the order of the curve, FIPS 186-5 appendix A.2.1.
    """
    seed = derive(secret, purpose, 48)
    authority_key = ec.derive_private_key(int.from_bytes(seed, "big") % (_CURVE.group_order - 1) + 1, _CURVE)
    authority_name = _name(authority)
    usage = x509.BasicConstraints(ca=True, path_length=0)
    root = _builder(authority_name, authority_key.public_key(), authority_name).add_extension(
        usage, critical=True).sign(authority_key, hashes.SHA256())
    key = ec.generate_private_key(_CURVE)
    certificate = (_builder(_name(subject), key.public_key(), authority_name)
                   .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                   .add_extension(x509.SubjectAlternativeName(names), critical=False)
                   .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
                   .sign(authority_key, hashes.SHA256()))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                serialization.NoEncryption())
    pem = serialization.Encoding.PEM
    return PeerCertificate(root.public_bytes(pem), certificate.public_bytes(pem) + private)


def derive(secret: str, purpose: bytes, length: int) -> bytes:
    """Derive bytes for one purpose from the secret."""
    return HKDF(hashes.SHA256(), length=length, salt=None, info=purpose).derive(secret.encode())


def common_name(peer: Peer) -> str:
    """Return the name in the certificates of a role."""
    return f"shoehorn-{peer}"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name) -> x509.CertificateBuilder:
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
            .serial_number(x509.random_serial_number()).not_valid_before(_BEGIN).not_valid_after(_END))
