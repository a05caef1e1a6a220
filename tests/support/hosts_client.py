"""Asks a server from another host, as a script: `python hosts_client.py ADDRESS COMMAND [ARGUMENTS]`; a JSON line an event."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

from pilotfish.client import Client

_TIMEOUT_S = 150.0


def main() -> None:
    address, command, *arguments = sys.argv[1:]
    with Client(address, timeout_s=_TIMEOUT_S) as client:
        {"stream": _stream, "watch": _watch}[command](client, *arguments)


def _stream(client: Client, prompt: str, max_tokens: str) -> None:
    """A line a piece: its text, and how many tokens there are; then the token ids and the usage."""
    stream = client.stream_generate(prompt, temperature=0, max_tokens=int(max_tokens), ignore_eos=True)
    for piece in stream:
        _print(text=piece.text, num_tokens=len(piece.token_ids))
    done = stream.completion
    assert done.usage is not None
    _print(token_ids=list(done.token_ids), text=done.text, usage=dataclasses.asdict(done.usage))


def _watch(client: Client) -> None:
    """A line whenever a replica's state changes, with the time since the start."""
    start, last = time.monotonic(), None
    while True:
        now = [(replica.name, str(replica.state), replica.message, replica.restarts) for replica in client.status().replicas]
        if now != last:
            _print(time_s=time.monotonic() - start, replicas=now)
        last = now
        time.sleep(0.1)


def _print(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
