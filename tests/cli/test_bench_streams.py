"""What the load of `bench serve` makes of a server that does not answer as it should."""

from __future__ import annotations

import json

import pytest
from pilotfish.cli.bench_streams import StreamTrace, connect_http
from pilotfish.common.errors import InternalError, Overloaded, PilotfishError

web = pytest.importorskip("aiohttp.web")
test_utils = pytest.importorskip("aiohttp.test_utils")


@pytest.mark.parametrize(("status", "error_class"), [(200, InternalError), (429, Overloaded), (502, InternalError)])
async def test_what_ends_an_http_stream_is_not_taken_for_its_end(status: int, error_class: type[PilotfishError]) -> None:
    """A line of the stream, a refusal of pilotfish's, and what a proxy says in its own words."""

    async def answer(_):
        error = json.dumps({"error": {"message": "the worker has died"}})
        text = {200: f'data: {{"choices": [{{}}]}}\n\ndata: {error}\n\n', 429: error, 502: "the worker has died"}
        return web.Response(text=text[status], status=status)

    async def models(_):
        return web.json_response({"data": [{"id": "tiny"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/completions", answer), web.get("/v1/models", models)])
    async with (
        test_utils.TestServer(app) as server,
        connect_http(f"127.0.0.1:{server.port}", output_len=2, timeout_s=10) as run_stream,
    ):
        with pytest.raises(error_class, match="the worker has died"):
            await run_stream([1], StreamTrace(start_s=0.0))
