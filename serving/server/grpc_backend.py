"""The gRPC face's way into the server: the same service, limits, errors and counters that HTTP has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from endcap.errors import EndcapError
from endcap.package import Manifest
from serving.asgi import Headers
from serving.server.app import Asked, NotReadyError, ServerApp, status_of
from serving.server.service import Service

__all__ = ["AppBackend"]


@dataclass(frozen=True, slots=True)
class _Admitted:
    service: Service
    asked: Asked

    @property
    def manifest(self) -> Manifest:
        return self.service.manifest

    async def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        self.service.check(inputs)
        return await self.service.infer(inputs, within_s=self.asked.within_s, priority=self.asked.priority)


class AppBackend:
    """See :class:`serving.server.grpc_server.Backend`."""

    def __init__(self, app: ServerApp, *, version: str) -> None:
        self.version = version
        self._app = app

    @property
    def ready(self) -> bool:
        return self._app.ready

    def _service(self) -> Service:
        service = self._app.service
        if service is None:
            raise NotReadyError("the model is being verified and loaded", where="server",
                                next_step="try another replica, or later")  # fmt: skip
        return service

    def manifest(self) -> Manifest:
        return self._service().manifest

    def admit(self, headers: Headers, *, within_s: float) -> _Admitted:
        asked = Asked.of({"headers": headers})
        asked.within_s = min(asked.within_s, within_s)
        service = self._service()
        service.admit(asked.priority, within_s=asked.within_s)
        return _Admitted(service, asked)

    async def load(self, name: str, headers: Headers) -> None:
        await self._app.repository.load(name, headers)

    async def unload(self, name: str, headers: Headers) -> None:
        await self._app.repository.unload(name, headers)

    @staticmethod
    def status_of(error: EndcapError) -> tuple[int, str]:
        return status_of(error)

    def count(self, headers: Headers, status: int, outcome: str, took_s: float, answer_bytes: int = 0) -> None:
        metrics = self._app.metrics
        if self._app.access is not None:
            self._app.log_access("grpc", Asked.of({"headers": headers}), status, outcome, took_s, answer_bytes)
        metrics.attempts["grpc", outcome].inc()
        metrics.latency["grpc"].observe(took_s)
