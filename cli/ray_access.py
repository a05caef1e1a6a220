"""Whether a Ray cluster would take us, asked before Ray is: in a second, with what to do.

Ray by itself tries for 20 s with a token that is refused, and for minutes where nobody answers.
"""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from ..common.errors import Unavailable

_TIMEOUT_S = 5.0
_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # what Ray's own clients ask first
_HOW = "Run `pilotfish` on the cluster's head, or copy the head's ~/.ray/auth_token here"


def check_access(address: str, *, was_found: bool) -> None:
    """Of a cluster at "host:port".

    Args:
        was_found: on this machine, and not named: Ray sends such a cluster its token without RAY_AUTH_MODE.

    Raises:
        Unavailable: nobody answers there, or it asks for a token that this process does not have.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # encrypted: Ray's own business
    if _ask(address, token=None):
        return
    token, place = _own_token()
    if token is None:
        raise Unavailable(f"Ray at {address} asks for a token, and there is none in {place}. {_HOW}")
    if not _ask(address, token=token):
        raise Unavailable(f"Ray at {address} asks for a token, and the one in {place} is not its. {_HOW}")
    mode = os.environ.get("RAY_AUTH_MODE", "token" if was_found else "unset")
    if mode.lower() != "token":
        raise Unavailable(
            f"Ray at {address} asks for a token: set RAY_AUTH_MODE=token (it is {mode}), and the one in {place} is sent"
        )


def _ask(address: str, *, token: str | None) -> bool:
    """Whether the cluster answers to that token. What else it may say is Ray's to understand."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_METHOD)(b"", timeout=_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unavailable(f"nobody answers at {address}: {error.details()}") from error
    return True


def _own_token() -> tuple[str | None, str]:
    """The token that Ray would send, in Ray's order of places, and where it is or should be."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None, str(path)
    except OSError:
        return None, str(path)
