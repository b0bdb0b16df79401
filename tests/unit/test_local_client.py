"""The local target's client outlives the supervisor that it was made for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from endcap.errors import TargetError
from endcap.files import write_json
from serving.targets import LocalTarget, open_target
from serving.targets.config import TARGET_FILE, TargetFile


@contextmanager
def supervisor(folder: Path, *, pid: int, token: int) -> Iterator[None]:
    """As much of one as gives a fencing token out, to whoever knows this one's secret."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            known = self.headers["authorization"] == f"Bearer secret {token}"
            body = b'{"token": %d}' % token
            self.send_response(200 if known else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    found = TargetFile(pid=pid, gateway_url=url, control_url=url, control_token=f"secret {token}", envoy_admin_url=url,
                       feedback_url=None, records=folder, public_key=folder / "key", started_at_s=1.0)  # fmt: skip
    write_json(folder / TARGET_FILE, found.model_dump(mode="json"))
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_supervisor_that_died_and_was_started_again_is_found(tmp_path: Path) -> None:
    with supervisor(tmp_path, pid=os.getpid(), token=1):
        target: LocalTarget = open_target(tmp_path)
        assert target.acquire("an engine") == 1
    with pytest.raises(TargetError, match="does not answer"):
        target.acquire("an engine")
    with supervisor(tmp_path, pid=os.getppid(), token=2):
        assert target.acquire("an engine") == 2
        assert target.found.pid == os.getppid()
    with pytest.raises(TargetError, match="does not answer"):
        target.acquire("an engine")
    target.close()
