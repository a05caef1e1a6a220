"""The certificates themselves; tests/workers/test_server.py and test_plan_stream.py have what they are for."""

from __future__ import annotations

import datetime
import pickle

from cryptography import x509
from pilotfish.controller.authority import Authority


def test_a_certificate_has_its_parts_name_and_the_authoritys_signature() -> None:
    authority = Authority.create()
    identity = authority.issue("replica-0.7.1")
    certificate, own = (x509.load_pem_x509_certificate(pem) for pem in (identity.certificate, identity.authority))
    certificate.verify_directly_issued_by(own)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["replica-0.7.1"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc < own.not_valid_after_utc


def test_keys_are_in_no_representation_and_survive_a_restart() -> None:
    authority = Authority.create()
    identity = authority.issue("controller")
    assert repr(authority) == "Authority()"
    assert repr(identity) == "Identity(name='controller')"
    restarted = pickle.loads(pickle.dumps(authority))  # as Ray keeps an actor's arguments, inside of its cluster
    assert restarted.issue("controller").authority == identity.authority
