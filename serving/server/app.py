"""The model server's HTTP face: routes, status codes, headers. What is decided is decided elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from endcap.errors import EndcapError, InputError
from serving import asgi, impressions
from serving.asgi import BodyTooLargeError, EncodedBodyError, Headers, Receive, Scope, Send
from serving.impressions import Keys
from serving.server import oip, tensor_routes
from serving.server.access import Access, AccessLog
from serving.server.admins import Admins, NotAllowedError
from serving.server.answers import AnswerLog, LoggedAnswer
from serving.server.engine import GraphError, GraphTimeoutError
from serving.server.metrics import ServerMetrics
from serving.server.oip import UnknownModelError
from serving.server.recommend import Recommendation, parse_request
from serving.server.repository import (
    REPOSITORY_PATH,
    ForbiddenError,
    Repository,
    UnloadableError,
)
from serving.server.service import OverloadedError, Priority, Service
from serving.tracing import CURRENT
from serving.watched import Watched

if TYPE_CHECKING:
    from serving.spans import Tracing

__all__ = ["Asked", "NotReadyError", "Replica", "ServerApp", "UnknownModelError", "status_of"]

log = logging.getLogger("serving.server")

RECOMMEND_PATH = "/v1/recommend"
_MAX_REQUEST_ID = 128
_MAX_SAID = 200
"""Characters of a caller's own that an error says back."""
_NOTHING = Recommendation([], [])
_TEMPLATES = {"recommend": RECOMMEND_PATH, "shadow": RECOMMEND_PATH, "infer": "/v2/models/{model}/infer",
              "predict": "/v1/models/{model}:predict"}  # fmt: skip
"""What a span calls a route: a path may hold what a client makes up."""


@dataclass(frozen=True, slots=True)
class Replica:
    """Who this process is. ``version`` is the MLflow registry version that it serves."""

    version: str
    zone: str


@dataclass(slots=True)
class Asked:
    """What the headers say of a request.

    ``within_s``: how long its sender waits for this attempt, as Envoy says or ``x-request-deadline-ms`` does.
    ``priority``: ``x-endcap-priority``, a shopper unless it says ``batch``. The others are the gateway's, which lets
    no client set them. ``compared``: a shadow gets a copy too. ``shadow``: this is the
    copy. A client that reaches this server beside the gateway gains nothing by them but an answer that earns no
    impression.
    """

    within_s: float = math.inf
    priority: Priority = Priority.SHOPPER
    compared: bool = False
    shadow: bool = False
    request_id: str = ""

    @staticmethod
    def of(scope: Scope) -> Asked:
        asked = Asked()
        for name, value in scope["headers"]:
            if name in (b"x-envoy-expected-rq-timeout-ms", b"x-request-deadline-ms"):
                asked.within_s = min(asked.within_s, _within_s(value))
            elif name == b"x-endcap-priority":
                asked.priority = Priority.BATCH if value == b"batch" else Priority.SHOPPER
            elif name == b"x-endcap-compare":
                asked.compared = value == b"1"
            elif name == b"x-endcap-shadow":
                asked.shadow = value == b"1"
            elif name == b"x-request-id" and len(value) <= _MAX_REQUEST_ID:
                asked.request_id = value.decode("latin-1")
        return asked


class ServerApp:
    """ASGI. Answers 503 until :meth:`open` was called with a loaded package, and on readiness while draining.

    Args:
        impression_key: None: answers carry no impression.
        answers: where answers that a comparator will look at are logged; None: nowhere.
        admin: what ``/metrics``, load and unload ask for; None: metrics are open, and nobody loads or unloads.
        load: verifies and loads the package again; None: this process cannot.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        impression_key: bytes | Watched[Keys] | None,
        answers: AnswerLog | None = None,
        metrics: ServerMetrics | None = None,
        admin: Admins | None = None,
        load: Callable[[], Service] | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.draining = False
        self.tracing: Tracing | None = None
        """What traces requests; None: nothing does. To be set once, before the first request, as is :attr:`access`."""
        self.access: AccessLog | None = None
        """Where requests that were let in are logged; None: nowhere."""
        self.metrics = metrics or ServerMetrics(replica.version)
        self._replica = replica
        self._key = impression_key
        self._answers = answers
        self._now_s = now_s
        self._service: Service | None = None
        self._admin = admin
        self.repository = Repository(self, load, admin)
        self._shed = 0
        self._shed_said_s = -math.inf
        self._description = tensor_routes.Description(replica.version)
        self._headers: Headers = (
            (b"x-endcap-version", replica.version.encode()),
            (b"x-endcap-zone", replica.zone.encode()),
        )
        # Envoy stops sending to a host that says this, without waiting for its next health check.
        self._draining_headers: Headers = (*self._headers, (b"x-envoy-immediate-health-check-fail", b"true"))

    @property
    def version(self) -> str:
        """The label of the model version."""
        return self._replica.version

    @property
    def service(self) -> Service | None:
        """What is loaded."""
        return self._service

    @property
    def ready(self) -> bool:
        """Loaded, and not draining."""
        return self._service is not None and not self.draining

    def open(self, service: Service) -> None:
        """Begin to answer, or go on with another package; what the old one has begun it finishes."""
        self.metrics.verification_s.set(service.verification_s)
        self.metrics.load_s.set(service.load_s)
        self.metrics.ready.set(1)
        service.batcher.observer = self.metrics
        self._service = service

    def shut(self) -> None:
        """Answer no more until :meth:`open`; what has begun finishes."""
        self.metrics.ready.set(0)
        self._service = None

    @property
    def crowded(self) -> bool:
        """Whether some request might be turned away now; cheap."""
        return self._service is not None and self._service.crowded

    def turn_away(self, path: str, headers: Headers) -> tuple[int, bytes, Headers] | None:
        """The refusal of a POST that would wait in vain, counted; None for one that is let in, or is no model's."""
        asked = Asked.of({"headers": headers})
        if path == RECOMMEND_PATH:
            route = "shadow" if asked.shadow else "recommend"
        else:
            route = tensor_routes.route_of(path) or ""
        if not route or self._service is None:
            return None
        try:
            self._service.admit(asked.priority, within_s=asked.within_s)
        except OverloadedError as error:
            status, outcome = status_of(error)
            self.metrics.attempts[route, outcome].inc()
            self.metrics.latency[route].observe(0.0)
            self._say_shed(route, error)
            own = self._draining_headers if self.draining else self._headers
            return status, self._error(route, error), (*own, _retry_after(error))
        return None

    def _say_shed(self, route: str, error: OverloadedError) -> None:
        """Once a second at most: a line for each would cost as much as answering."""
        self._shed += 1
        now_s = time.monotonic()
        if now_s >= self._shed_said_s + 1.0:
            log.warning("%s: %d turned away since last said; %s", route, self._shed, error.what)
            self._shed, self._shed_said_s = 0, now_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if path == RECOMMEND_PATH:
            asked = Asked.of(scope)
            route = "shadow" if asked.shadow else "recommend"
            answer = self._measured if self.tracing is None else self._traced
            await answer(route, asked, scope, receive, send)
        elif (found := tensor_routes.route_of(path)) is not None:
            answer = self._measured if self.tracing is None else self._traced
            await answer(found, Asked.of(scope), scope, receive, send)
        elif path.startswith(REPOSITORY_PATH) and scope["method"] == "POST":
            await self._repository(path, scope, send)
        else:
            await self._look(path, scope, send)

    async def _repository(self, path: str, scope: Scope, send: Send) -> None:
        try:
            await self._send(send, 200, await self.repository.answer(path, scope["headers"]))
        except EndcapError as error:
            log.warning("repository: %s", error.what)
            await self._send(send, status_of(error)[0], oip.error_text(error), *_challenge(error))

    async def _send(self, send: Send, status: int, body: bytes, *more: tuple[bytes, bytes],
                    content_type: bytes = b"application/json") -> None:  # fmt: skip
        headers = self._draining_headers if self.draining else self._headers
        await asgi.send_answer(send, status, body, (*headers, *more) if more else headers, content_type=content_type)

    async def _traced(self, route: str, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """:meth:`_measured` in a span of its own, which its parts tell the current trace of."""
        assert self.tracing is not None  # noqa: S101 - who calls this looked
        template = _TEMPLATES[route]
        said = {"http.request.method": scope["method"], "http.route": template, "endcap.route": route}
        with self.tracing.request(f"{scope['method']} {template}", scope["headers"], said) as trace:

            async def answer(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    trace.ended({"http.response.status_code": status}, fault=str(status) if status >= 500 else None)
                    message["headers"].append((b"traceresponse", trace.traceresponse))
                await send(message)

            await self._measured(route, asked, scope, receive, answer)

    async def _measured(self, route: str, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of a model and count it, whatever happens."""
        begun_s = time.perf_counter()
        recommended = _NOTHING
        more: Headers = ()
        content_type = b"application/json"
        try:
            if scope["method"] != "POST":
                await self._send(send, 405, self._error(route, _method_error("POST")), (b"allow", b"POST"))
                return
            service = self._service
            if service is None:
                raise NotReadyError("the model is being verified and loaded", where="server",
                                    next_step="try another replica, or later")  # fmt: skip
            service.admit(asked.priority, within_s=asked.within_s)  # what would be turned away is not even read
            body = await asgi.read_body(scope, receive)
            if self.tracing is not None and (trace := CURRENT.get()) is not None:
                trace.add("admission", begun_s, time.perf_counter(), waiting=service.batcher.waiting)
            begun_s = time.perf_counter()
            if route in tensor_routes.ROUTES:
                found = await tensor_routes.ask(route, service, scope, body, asked, version=self._replica.version)
                answer, more, content_type = found.body, found.headers, found.content_type
            else:
                answer, recommended = await self._recommend(service, body, asked)
            status, outcome = 200, "answered"
        except ConnectionError:
            return
        except EndcapError as error:
            status, outcome = status_of(error)
            answer = self._error(route, error)
            if isinstance(error, OverloadedError):
                more = (_retry_after(error),)
                self._say_shed(route, error)
            elif isinstance(error, NotReadyError):
                more = ((b"retry-after", b"1"),)
            elif status >= 500:
                log.warning("%s %d: %s", route, status, error.what)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not kill the replica, nor log a history
            log.error("%s failed by a fault of the server: %s", route, type(error).__name__)
            status, outcome = 500, "failed"
            answer = self._error(route, EndcapError("a fault of the server", where=route))
        await self._send(send, status, answer, *more, content_type=content_type)
        self.metrics.attempts[route, outcome].inc()
        took_s = time.perf_counter() - begun_s
        self.metrics.latency[route].observe(took_s)
        if self.access is not None:
            self.log_access(route, asked, status, outcome, took_s, len(answer))
        if self._answers is not None and asked.compared and asked.request_id and route not in tensor_routes.ROUTES:
            self._answers.add(LoggedAnswer(asked.request_id, self._replica.version, asked.shadow, status,
                                           round(took_s * 1000, 3), recommended.items, recommended.scores))  # fmt: skip

    def log_access(self, route: str, asked: Asked, status: int, outcome: str, took_s: float, answer_bytes: int) -> None:
        """One line, where requests are logged."""
        if self.access is not None:
            self.access.add(Access(self._now_s(), asked.request_id, self._replica.version, self._replica.zone, route,
                                   status, outcome, took_s * 1000, answer_bytes, asked.priority.value))  # fmt: skip

    async def _recommend(self, service: Service, body: bytes, asked: Asked) -> tuple[bytes, Recommendation]:
        if service.catalogue is None:
            raise UnknownModelError(f"{service.manifest.name} is a {service.manifest.task}, not a recommender",
                                    where=RECOMMEND_PATH,
                                    next_step=f"send tensors to /v2/models/{service.manifest.name}/infer")  # fmt: skip
        request = parse_request(body, max_k=service.manifest.top_k)
        answer = await service.recommend(request, within_s=asked.within_s, priority=asked.priority)
        if answer.fallback is not None and not asked.shadow:
            self.metrics.fallbacks[answer.fallback].inc()
        token: str | None = None
        if self._key is not None and not asked.shadow:
            key = self._key.value if isinstance(self._key, Watched) else self._key
            _, token = impressions.mint(
                key, version=self._replica.version, shopper=request.shopper, now_s=self._now_s()
            )
        document = {
            "items": answer.items, "scores": answer.scores, "version": self._replica.version,
            "impression": token, "fallback": answer.fallback,
        }  # fmt: skip
        if answer.steps is not None:
            document["explain"] = [step.to_json() for step in answer.steps]
        return orjson.dumps(document), answer

    async def _look(self, path: str, scope: Scope, send: Send) -> None:
        """Health, metadata and metrics: cheap, never waiting for the graph."""
        if scope["method"] not in ("GET", "HEAD"):
            await self._send(send, 405, oip.error_text(_method_error("GET")), (b"allow", b"GET"))
            return
        service = self._service
        ready = self.ready
        if path == "/v2/health/live":
            await self._send(send, 200, b'{"live":true}')
        elif path == "/v2/health/ready":
            await self._send(send, 200 if ready else 503, b'{"ready":true}' if ready else b'{"ready":false}')
        elif path == "/metrics":
            try:
                if self._admin is not None:
                    self._admin.check(scope["headers"])
            except NotAllowedError as error:
                await self._send(send, 401, oip.error_text(error), *_challenge(error))
                return
            self.metrics.in_flight.set(0 if service is None else service.batcher.waiting)
            self.metrics.admitted.set(0 if service is None else service.batcher.room)
            self.metrics.answers_dropped.set(0 if self._answers is None else self._answers.dropped)
            self.metrics.access_dropped.set(0 if self.access is None else self.access.dropped)
            await self._send(send, 200, self.metrics.text(), content_type=b"text/plain; version=0.0.4; charset=utf-8")
        elif path in ("/v2", "/v2/"):
            await self._send(send, 200, oip.server_metadata(self._replica.version))
        elif path == "/":
            await self._send(send, 200, b'{"status":"alive"}')
        elif service is None:
            await self._send(send, 503, oip.error_text(NotReadyError("the model is being verified and loaded")))
        elif path == "/openapi.json":
            await self._send(send, 200, await self._description.text(service.manifest))
        else:
            try:
                found = tensor_routes.look(path, service.manifest, version=self._replica.version, ready=ready)
                if found is None:
                    raise UnknownModelError("no such path", where=path[:_MAX_SAID])
                await self._send(send, found.status, found.body)
            except UnknownModelError as error:
                await self._send(send, 404, oip.error_text(error))

    @staticmethod
    def _error(route: str, error: EndcapError) -> bytes:
        return oip.error_text(error) if route in tensor_routes.ROUTES else asgi.error_body(error)


class NotReadyError(EndcapError):
    """Nothing is loaded yet."""


def _challenge(error: EndcapError) -> Headers:
    return ((b"www-authenticate", b"Bearer"),) if isinstance(error, NotAllowedError) else ()


def _retry_after(error: OverloadedError) -> tuple[bytes, bytes]:
    return b"retry-after", str(error.retry_after_s).encode()


def _method_error(allowed: str) -> InputError:
    return InputError("method not allowed", where="method", next_step=f"use {allowed}")


def _within_s(value: bytes) -> float:
    """How long the gateway waits for this attempt, as Envoy says; it has given up on what takes longer."""
    return int(value) / 1000 if value.isdigit() and 0 < len(value) < 10 and int(value) else math.inf


def status_of(error: EndcapError) -> tuple[int, str]:
    """HTTP status and outcome of an error."""
    match error:
        case BodyTooLargeError():
            return 413, "refused"
        case EncodedBodyError():
            return 415, "refused"
        case UnknownModelError():
            return 404, "refused"
        case NotAllowedError():
            return 401, "refused"
        case ForbiddenError():
            return 403, "refused"
        case UnloadableError():
            return 409, "refused"
        case InputError():
            return 400, "refused"
        case OverloadedError():
            return 429 if error.priority is Priority.BATCH else 503, "shed"
        case NotReadyError():
            return 503, "shed"
        case GraphTimeoutError():
            return 504, "timed_out"
        case GraphError():
            return 500, "failed"
        case _:
            return 500, "failed"
