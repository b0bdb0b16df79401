"""A headless Chromium, driven over the DevTools protocol: only as much of it as the tests of pages need."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

from endcap.errors import TargetError

_SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--disable-dev-shm-usage", "--mute-audio", "--remote-debugging-port=0", "--hide-scrollbars",
)  # fmt: skip
DEADLINE_S = 60.0


def find_chromium() -> str | None:
    """The browser's program, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page in one browser of its own; both are gone when the ``with`` ends.

    ``messages``: what the page wrote to its console or its log. ``requests``: every address it asked for.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._count = 0
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._seen: list[str] = []
        self._session: str | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Browser:
        self._home = tempfile.TemporaryDirectory(prefix="endcap-browser-", ignore_cleanup_errors=True)
        home = Path(self._home.name)
        command = [self._program, *_SWITCHES, f"--user-data-dir={home}", "about:blank"]
        quiet = subprocess.DEVNULL
        environment = {"HOME": str(home), "PATH": os.environ.get("PATH", os.defpath)}
        self._process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment)
        try:
            port_file = home / "DevToolsActivePort"
            self._until(
                lambda: port_file.exists() and len(port_file.read_text().split()) == 2, "the browser did not start"
            )
            port, path = port_file.read_text().split()
            address = f"ws://127.0.0.1:{port}{path}"
            self._socket = self._open.enter_context(connect(address, max_size=None, proxy=None))
            target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
            attached = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._home.cleanup()

    def _until(self, done: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TargetError(otherwise, where=self._program)
            time.sleep(0.02)

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None = None) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message if session is None else {**message, "sessionId": session}))
        while True:
            answer = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise TargetError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        name, values = event.get("method", ""), event.get("params", {})
        self._seen.append(name)
        if name == "Runtime.consoleAPICalled":
            self.messages.append(f"{values['type']}: {[a.get('value') for a in values['args']]}")
        elif name == "Runtime.exceptionThrown":
            self.messages.append(f"exception: {values['exceptionDetails']['text']}")
        elif name == "Log.entryAdded":
            self.messages.append(f"{values['entry']['level']}: {values['entry']['text']}")
        elif name == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def ask(self, method: str, **parameters: Any) -> Any:
        return self._ask(method, parameters, self._session)

    def open(self, address: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a page at a width in CSS pixels and wait until it has loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self._seen.clear()
        self.ask("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._seen:
            self._note(json.loads(self._socket.recv(timeout=DEADLINE_S)))

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise TargetError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole,
                                                   **self._whole() if whole else {})["data"]))  # fmt: skip

    def _whole(self) -> dict[str, Any]:
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def pdf(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"]))
