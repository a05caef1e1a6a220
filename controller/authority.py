"""The cluster's own certificate authority: it makes the certificates by which the parts of a cluster know each other.

Life: `Authority.create` when a cluster is deployed. It is an argument of the controller's actor: Ray keeps it with the actor
and hands it to every restart of the controller, which living workers then trust, and it them. It is never on a disk or in a
log, and ends with the actor; what it has signed is of no use to anybody then. Who can read it out of Ray can run code on the
cluster anyway: Ray's token keeps others out.

ECDSA on P-256. A worker's certificate is in its name, which has its epoch, so it is of no use to a later start. One whose
connection breaks when its certificate has run out is replaced as one that fell silent.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..common.identity import Identity

_DAY = datetime.timedelta(days=1)
_AUTHORITY_LIFE, _PART_LIFE = 3650 * _DAY, 365 * _DAY
_CLOCK_SKEW = _DAY  # how far a node may be behind
_BOTH_WAYS = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """Its own certificate and key, PEM."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)

    @classmethod
    def create(cls) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _x509_name(f"pilotfish cluster {secrets.token_hex(8)}")
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            _builder(name, key.public_key(), issuer=name, life=_AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
        )
        return cls(certificate=_pem(builder.sign(key, hashes.SHA256())), key=_key_pem(key))

    def issue(self, name: str) -> Identity:
        """A certificate for the part of that name, as server and as client."""
        own = x509.load_pem_x509_certificate(self.certificate)
        signing_key = serialization.load_pem_private_key(self.key, password=None)
        assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_x509_name(name), key.public_key(), issuer=own.subject, life=_PART_LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(_BOTH_WAYS), critical=False)
        )
        certificate = builder.sign(signing_key, hashes.SHA256())
        return Identity(name=name, authority=self.certificate, certificate=_pem(certificate), key=_key_pem(key))


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, *, issuer: x509.Name, life: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
    )


def _x509_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
