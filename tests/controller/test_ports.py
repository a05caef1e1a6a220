"""A port that is chosen before who listens on it starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pilotfish.common.errors import ConfigError
from pilotfish.controller import ports
from pilotfish.controller.ports import hold

HOST = "127.0.0.1"


def test_a_free_port_is_none_that_the_system_hands_out() -> None:
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    held = [hold(HOST, 0, flag="--port") for _ in range(20)]
    chosen = [listener.getsockname()[1] for listener in held]
    assert len(set(chosen)) == 20
    assert all(20_000 <= port < first_ephemeral for port in chosen)
    for listener in held:
        listener.close()
    with hold(HOST, chosen[0], flag="--port") as listener:
        assert listener.getsockname()[:2] == (HOST, chosen[0])


@pytest.mark.parametrize("written", ["1024 65535", None])
def test_where_all_ports_are_handed_out_it_is_one_of_them(monkeypatch, tmp_path: Path, written: str | None) -> None:
    if written:
        (tmp_path / "range").write_text(written)
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    with hold(HOST, 0, flag="--port") as listener:
        assert listener.getsockname()[1] > 0


def test_a_port_in_use_and_a_host_of_elsewhere_are_named() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: .*in use.*--grpc-port"):
            hold(HOST, port, flag="--grpc-port")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:0: .*--grpc-port"):
        hold("192.0.2.1", 0, flag="--grpc-port")
