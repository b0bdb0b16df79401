"""A replica with the model server's command line and no model, to try the gateway and the supervisor alone.

The package folder may hold ``behaviour.json``: ``fail_every`` (every n-th request is answered 500), ``stall_every``
(every n-th never is), ``reset_every`` (every n-th: the connection is cut), ``slow_ms``, ``refuse`` (exit code 3 at
start), ``crash`` (exit code 7 at start), ``never_ready``, ``log`` (each request's x-endcap-* and host headers become
a line of ``seen.jsonl`` there). It is read again when it changes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn

from endcap.processes import bind_to_parent

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Replica:
    def __init__(self, version: str, zone: str, package: Path) -> None:
        self.version, self.zone, self.package, self.seen = version, zone, package, 0
        self.server: uvicorn.Server | None = None

    def behaviour(self) -> dict[str, Any]:
        path = self.package / "behaviour.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def log(self, scope: dict[str, Any]) -> None:
        names = ("host", "x-request-id")
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        kept = {name: value for name, value in headers.items() if name in names or name.startswith("x-endcap-")}
        with (self.package / "seen.jsonl").open("a") as file:
            file.write(json.dumps(kept) + "\n")

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        behaviour = self.behaviour()
        status = 200
        while (await receive()).get("more_body"):
            pass
        if scope["path"].startswith("/v2/health"):
            status = 503 if behaviour.get("never_ready") else 200
        else:
            self.seen += 1
            if behaviour.get("log"):
                self.log(scope)
            if behaviour.get("slow_ms"):
                await asyncio.sleep(behaviour["slow_ms"] / 1000)
            if _hits(behaviour, "stall_every", self.seen):
                await asyncio.sleep(30)
            if _hits(behaviour, "reset_every", self.seen):
                assert self.server is not None
                for connection in list(self.server.server_state.connections):
                    connection.transport.abort()
                return
            if _hits(behaviour, "fail_every", self.seen):
                status = 500
        body = json.dumps({"items": [], "version": self.version}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-endcap-version", self.version.encode()),
            (b"x-endcap-zone", self.zone.encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _hits(behaviour: dict[str, Any], key: str, seen: int) -> bool:
    return bool(behaviour.get(key)) and seen % int(behaviour[key]) == 0


def main() -> int:
    bind_to_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--public-key", type=Path)
    parser.add_argument("--version", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--impression-key", type=Path)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--thresholds-ms")
    parser.add_argument("--host", default="127.0.0.1")
    options = parser.parse_args()
    app = Replica(options.version, options.zone, options.package)
    behaviour = app.behaviour()
    if behaviour.get("refuse"):
        sys.stderr.write(f"{options.package}: the signature does not verify\n")
        return 3
    if behaviour.get("crash"):
        sys.stderr.write("out of cheese\n")
        return 7
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", access_log=False,
        lifespan="off", timeout_graceful_shutdown=2,
    )  # fmt: skip
    app.server = uvicorn.Server(config)
    app.server.run()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
