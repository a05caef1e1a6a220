"""The sockets of doors, and a port that is chosen before who listens on it starts."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from pilotfish.common.errors import ConfigError
from pilotfish.controller import ports
from pilotfish.controller.ports import hold, listen

HOST = "127.0.0.1"


def test_a_free_port_is_none_that_the_system_hands_out(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "range").write_text("32768\t60999\n")
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    held = [hold(HOST, 0, flag="--port") for _ in range(20)]
    chosen = [listener.getsockname()[1] for listener in held]
    assert len(set(chosen)) == 20
    assert all(20_000 <= port < 32768 for port in chosen)
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


@pytest.mark.parametrize("shared", [False, True])
async def test_what_is_small_leaves_at_once(shared: bool) -> None:
    """Else the second write of an answer waits for its reader's acknowledgement of the first: 40 ms on a kept connection."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = listen(HOST, 0, flag="--http-port", shared=shared)
    server = await asyncio.start_server(note, sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        async with asyncio.timeout(10):
            assert await accepted
        writer.close()
