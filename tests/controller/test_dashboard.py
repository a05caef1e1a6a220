"""The live page: what it serves, and what a real browser makes of it (Chromium, where this machine has one)."""

from __future__ import annotations

import asyncio
import html.parser
import re
import shutil
from pathlib import Path

import pytest
from http_calls import get, post
from local_workers import Cluster, StartCluster

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


async def open_in_browser(cluster: Cluster, profile: Path, *, virtual_ms: int) -> str:
    """The page's elements after its script has run for so long on the browser's clock."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        f"--virtual-time-budget={virtual_ms}", "--dump-dom", f"http://{cluster.service.addresses.http}/dashboard",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, err.decode()
    return out.decode()


def text_of(page: str, element_id: str) -> str:
    match = re.search(rf'id="{element_id}"[^>]*>([^<]*)<', page)
    assert match is not None, page
    return match[1]


async def test_the_state_has_what_the_page_shows(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    await post(cluster, "/v1/completions", {"model": "tiny", "prompt": list(range(40)), "max_tokens": 5, "n": 2})
    status, headers, state = await get(cluster, "/dashboard/state")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert (state["num_prompt_tokens"], state["num_generated_tokens"], state["num_requests"]) == (40, 10, 1)
    (replica,) = state["replicas"]
    assert (replica["name"], replica["state"], replica["num_generated_tokens"]) == ("replica-0", "ready", 10)
    assert replica["num_used_blocks"] + replica["num_cached_blocks"] + replica["num_free_blocks"] == 256


async def test_the_page_needs_nothing_from_elsewhere(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    status, headers, page = await get(cluster, "/dashboard")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert len(page) < 16_000
    links: list[str] = []
    open_tags: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value or "" for name, value in attrs if name in ("src", "href"))
            if tag not in ("meta", "link", "polyline"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag == "polyline"

    Reader().feed(page.decode())
    assert links == ["data:,"]
    assert open_tags == []
    assert b"prefers-color-scheme: dark" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
async def test_a_browser_shows_the_cluster(start_cluster: StartCluster, tmp_path: Path) -> None:
    cluster = await start_cluster(step_s=0.02)
    running = asyncio.create_task(
        post(cluster, "/v1/completions", {"model": "tiny", "prompt": list(range(40)), "max_tokens": 3000, "ignore_eos": True})
    )
    try:
        page = await open_in_browser(cluster, tmp_path, virtual_ms=4500)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert text_of(page, "model") == "tiny"
    assert text_of(page, "health").startswith("1 of 1 replicas ready")
    assert text_of(page, "running") == "1"
    assert float(text_of(page, "rate")) > 0
    assert '<th scope="row">replica-0</th><td>ready</td><td>1</td><td>0</td>' in page
    points = re.search(r'<polyline points="([^"]+)"', page)
    assert points is not None
    assert len(points[1].split()) >= 2
    assert "Tokens per second over the last" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
async def test_a_replicas_message_stays_text_in_a_browser(start_cluster: StartCluster, tmp_path: Path) -> None:
    cluster = await start_cluster(fleet={"max_restarts": 0})
    cluster.controller._fleet._replicas[0].message = "<b id=owned>it is lost</b>"
    page = await open_in_browser(cluster, tmp_path, virtual_ms=500)
    assert "ready: &lt;b id=owned&gt;it is lost&lt;/b&gt;" in page
