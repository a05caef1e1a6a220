"""Parts of a cluster for tests: one authority for all of them, and channels as the controller opens them."""

from __future__ import annotations

import grpc
from pilotfish.controller.authority import Authority
from pilotfish.proto.credentials import channel_credentials, channel_options

AUTHORITY = Authority.create()
LEADER_NAME = "replica-0.3.0"
LEADER = AUTHORITY.issue(LEADER_NAME)
CONTROLLER = AUTHORITY.issue("controller")


def open_channel(address: str) -> grpc.aio.Channel:
    """To the worker that has the LEADER's identity."""
    return grpc.aio.secure_channel(address, channel_credentials(CONTROLLER), options=channel_options(LEADER_NAME))
