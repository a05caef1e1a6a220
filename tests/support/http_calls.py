"""HTTP calls to a cluster under test, over bare sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from local_workers import Cluster


async def raw(cluster: Cluster, request: bytes) -> tuple[int, dict[str, str], Any]:
    """One request over a bare socket: status, headers, JSON body."""
    host, _, port = cluster.service.addresses.http.rpartition(":")
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        writer.close()
    return int(head[0].split()[1]), headers, json.loads(body) if "json" in headers["content-type"] else body


async def post(cluster: Cluster, path: str, body: Any) -> tuple[int, dict[str, str], Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await raw(cluster, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


async def get(cluster: Cluster, path: str) -> tuple[int, dict[str, str], Any]:
    return await raw(cluster, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
