"""gRPC between the parts of one cluster: encrypted always, and each side shows a certificate of the cluster's authority.

There is no other way in: a peer without such a certificate, or with another cluster's, is refused before any call.
"""

from __future__ import annotations

import grpc

from ..common.identity import Identity

_OF_TRUST = ("handshake", "verification", "certificate")


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)], root_certificates=identity.authority, require_client_auth=True
    )


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=identity.authority, private_key=identity.key, certificate_chain=identity.certificate
    )


def channel_options(peer: str) -> list[tuple[str, str | int]]:
    """Of a channel to the part of that name: its certificate has to say it, whatever the address is."""
    return [
        ("grpc.ssl_target_name_override", peer),
        ("grpc.enable_http_proxy", 0),  # a proxy in the environment is for the world outside
    ]


def peer_name(context: grpc.ServicerContext | grpc.aio.ServicerContext) -> str:
    """The name in the certificate that a call's other end has shown; "" if none."""
    names = context.auth_context().get("x509_common_name", ())
    return next(iter(names)).decode(errors="replace") if names else ""


def explain(details: str | None) -> str:
    """What gRPC says of a call that failed, with what to look at where one end does not trust the other."""
    details = details or "no details"
    if any(word in details.lower() for word in _OF_TRUST):
        details += " (it is no part of this cluster: another cluster's certificate, none, or a clock that is a day off)"
    return details
