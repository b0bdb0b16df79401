"""Which namespaces changed: watches, as controllers have (Kubernetes API concepts, "Efficient detection of changes").

To ask for everything again and again instead would take a core from the servers under test.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import orjson
from kubernetes import client, config

_AGAIN_S = 1.0
"""After which a watch that ended is begun again; it then tells of all there is."""


class Changes:
    """Watches ``paths``, lists of the API of ``kubeconfig``, from :meth:`start` to :meth:`stop`."""

    def __init__(self, kubeconfig: Path, paths: Sequence[str]) -> None:
        self._kubeconfig, self._paths = kubeconfig, paths
        self._namespaces: set[str] = set()
        self._lock, self._some = threading.Lock(), threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
        self._thread.join(timeout=30)

    def note(self, namespace: str) -> None:
        """It is to be looked at."""
        with self._lock:
            self._namespaces.add(namespace)
            self._some.set()

    def take(self, *, wait_s: float) -> frozenset[str]:
        """Those that changed since the last call; after ``wait_s`` at the latest, and then perhaps none."""
        self._some.wait(wait_s)
        with self._lock:
            found = frozenset(self._namespaces)
            self._namespaces.clear()
            self._some.clear()
        return found

    def _run(self) -> None:
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._watch_all())

    async def _watch_all(self) -> None:
        settings = client.Configuration()
        config.load_kube_config(config_file=str(self._kubeconfig), client_configuration=settings)
        trusted = ssl.create_default_context(cafile=settings.ssl_ca_cert)
        if settings.cert_file:
            trusted.load_cert_chain(settings.cert_file, settings.key_file)
        headers = {"authorization": key} if (key := settings.api_key.get("authorization")) else {}
        patience = httpx.Timeout(30, read=None)
        async with (
            httpx.AsyncClient(base_url=settings.host, headers=headers, verify=trusted, timeout=patience) as api,
            asyncio.TaskGroup() as group,
        ):
            for path in self._paths:
                group.create_task(self._watch(api, path))

    async def _watch(self, api: httpx.AsyncClient, path: str) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                async with api.stream("GET", path, params={"watch": "1"}) as changes:
                    if changes.status_code == 200:  # else the kind is not there yet
                        async for line in changes.aiter_lines():
                            self.note(orjson.loads(line)["object"]["metadata"].get("namespace", ""))
            await asyncio.sleep(_AGAIN_S)
