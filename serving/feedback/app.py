"""The collector's HTTP face."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from urllib.parse import parse_qs

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from endcap.errors import EndcapError, InputError, StorageError
from serving import asgi
from serving.asgi import BodyTooLargeError, Headers, Receive, Scope, Send
from serving.feedback.attribution import Outcome, to_us
from serving.feedback.events import parse_feedback
from serving.feedback.store import Evidence, export
from serving.feedback.writer import Writer
from serving.impressions import Keys
from serving.watched import Watched

__all__ = ["FeedbackApp", "FeedbackMetrics"]

log = logging.getLogger("serving.feedback")

_SECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?", re.ASCII)


class FeedbackMetrics:
    """What the collector counts about itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        events = Counter("endcap_feedback_events", "Events by outcome.", ["outcome"], registry=self.registry)
        self.events = {name: events.labels(name) for name in (*Outcome, "refused")}
        self.failed = Counter("endcap_feedback_failed_requests", "Requests that could not be kept.",
                              registry=self.registry)  # fmt: skip
        self.keys_refused = Counter(
            "endcap_feedback_keys_refused", "Key files that changed and could not be used; the keys before hold.",
            registry=self.registry,
        )  # fmt: skip
        self._commits = Histogram(
            "endcap_feedback_commit_seconds", "Time to bring one commit to disk.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0), registry=self.registry,
        )  # fmt: skip
        self._requests = Histogram("endcap_feedback_commit_requests", "Requests a commit.",
                                   buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), registry=self.registry)  # fmt: skip

    def committed(self, seconds: float, requests: int) -> None:
        """Count one commit."""
        self._commits.observe(seconds)
        self._requests.observe(requests)

    def text(self, evidence: Evidence | None = None) -> bytes:
        """The exposition text; with ``evidence`` also what became of the impressions, by version."""
        text = generate_latest(self.registry)
        if evidence is None:
            return text
        closed = CounterMetricFamily("endcap_feedback_impressions", "Shown impressions whose window has closed.",
                                     labels=["version"])  # fmt: skip
        clicked = CounterMetricFamily("endcap_feedback_clicked_impressions", "Those of them that were clicked.",
                                      labels=["version"])  # fmt: skip
        for version, counts in sorted(evidence.versions.items()):
            closed.add_metric([version], counts.closed)
            clicked.add_metric([version], counts.clicked)
        registry = CollectorRegistry()
        registry.register(_Families([closed, clicked]))
        return text + generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class NotReadyError(EndcapError):
    """The database is not open yet."""


class FeedbackApp:
    """ASGI. Answers 503 until :meth:`open` was called.

    Args:
        key: what verifies impressions; a watched key file is looked at again before an event is refused.
    """

    def __init__(self, database: Path, key: bytes | Watched[Keys], metrics: FeedbackMetrics) -> None:
        self.draining = False
        self._database = database
        self._key = key
        self._metrics = metrics
        self._writer: Writer | None = None
        self._trouble: str | None = None

    crowded = False
    """Nothing is turned away before it is read (see :class:`~serving.server.http.Turnstile`)."""

    def turn_away(self, path: str, headers: Headers) -> None:
        """Nothing is."""

    def open(self, writer: Writer) -> None:
        """Begin to answer."""
        self._writer = writer

    @property
    def writer(self) -> Writer:
        """The one writer."""
        if self._writer is None:
            raise NotReadyError("the collector is starting", next_step="try again")
        return self._writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            status, body = await self._route(scope, receive, send)
        except ConnectionError:
            return
        except EndcapError as error:
            status, body = _status(error), asgi.error_body(error)
            if status >= 500:
                self._metrics.failed.inc()
                log.warning("%d: %s", status, asgi.one_line(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours must not kill the collector
            log.error("a fault of the collector: %s", type(error).__name__)
            status, body = 500, asgi.error_body(EndcapError("a fault of the collector"))
        if status:
            await asgi.send_answer(send, status, body)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> tuple[int, bytes]:
        """(status, JSON body), or (0, b"") when the answer was sent already."""
        path, method = scope["path"], scope["method"]
        if path == "/v1/feedback":
            if method != "POST":
                return 405, asgi.error_body(InputError("method not allowed", where="method", next_step="use POST"))
            return await self._feedback(await asgi.read_body(scope, receive))
        if method not in ("GET", "HEAD"):
            return 405, asgi.error_body(InputError("method not allowed", where="method", next_step="use GET"))
        if path == "/v1/evidence":
            since_us = _shoppers_since_us(scope)
            return 200, _evidence(await self.writer.evidence(shoppers_since_us=since_us), since_us)
        if path == "/v1/export":
            await self._export(scope, send)
            return 0, b""
        if path == "/healthz":
            health = {"status": "draining" if self.draining else "ok", "storage": self._trouble or "ok"}
            return 503 if self.draining else 200, orjson.dumps(health)
        if path == "/metrics":
            await asgi.send_answer(send, 200, self._metrics.text(await self._impressions()),
                                   content_type=b"text/plain; version=0.0.4; charset=utf-8")  # fmt: skip
            return 0, b""
        return 404, asgi.error_body(InputError("no such path", where=path))

    async def _impressions(self) -> Evidence | None:
        """For the metrics, which are there also where the database is not."""
        try:
            return await self.writer.evidence()
        except EndcapError:
            return None

    async def _feedback(self, body: bytes) -> tuple[int, bytes]:
        key = self._key
        events, refused = parse_feedback(body, key.value if isinstance(key, Watched) else key)
        if refused and isinstance(key, Watched) and key.refresh():
            events, refused = parse_feedback(body, key.value)  # a server may have signed with a key younger than ours
        self._metrics.events["refused"].inc(len(refused))
        answer: dict[str, object] = {
            "accepted": 0, "repeated": 0, "late": 0,
            "refused": [{"index": refusal.index, "reason": refusal.reason} for refusal in refused],
        }  # fmt: skip
        if not events:
            error = InputError("no event could be taken", where="events", next_step="see refused, one reason an event")
            return 400, orjson.dumps(answer | orjson.loads(asgi.error_body(error)))
        try:
            outcomes = await self.writer.record(events)
        except EndcapError as error:
            self._trouble = error.what
            raise
        self._trouble = None
        for outcome in Outcome:
            count = outcomes.count(outcome)
            answer[outcome.value] = count
            self._metrics.events[outcome].inc(count)
        return 200, orjson.dumps(answer)

    async def _export(self, scope: Scope, send: Send) -> None:
        """JSON lines, as many as there are; memory for one part at a time."""
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        after = query.get("after", ["0"])[0]
        if not (after.isascii() and after.isdigit() and len(after) < 19):
            raise InputError("after must be the seq of the last event you have", where="after")
        parts = export(self._database, after=int(after))
        part = await asyncio.to_thread(next, parts, None)  # before the first byte, so that an error has its status
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-type", b"application/jsonl")]})  # fmt: skip
        while part is not None:
            lines = b"".join(orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE) for event in part)
            await send({"type": "http.response.body", "body": lines, "more_body": True})
            try:
                part = await asyncio.to_thread(next, parts, None)
            except EndcapError as error:
                log.warning("an export broke off: %s", asgi.one_line(error))
                raise ConnectionError from error  # the answer stays without its end, and the client sees that
        await send({"type": "http.response.body", "body": b""})


def _evidence(evidence: Evidence, since_us: int | None) -> bytes:
    document: dict[str, object] = {
        "at_s": evidence.at_us / 1e6,
        "window_s": evidence.window_us / 1e6,
        "versions": {
            version: {"closed": counts.closed, "clicked": counts.clicked, "open": counts.open}
            | ({} if since_us is None else {"shoppers": counts.shoppers, "shoppers_clicked": counts.shoppers_clicked})
            for version, counts in evidence.versions.items()
        },
    }
    if since_us is not None:
        document["shoppers_since_s"] = since_us / 1e6
    return orjson.dumps(document)


def _shoppers_since_us(scope: Scope) -> int | None:
    """``?shoppers_since_s=``: Unix seconds, with a fraction or without."""
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    if "shoppers_since_s" not in query:
        return None
    text = query["shoppers_since_s"][-1]
    if _SECONDS.fullmatch(text) is None:
        raise InputError("shoppers_since_s must be Unix seconds", where="shoppers_since_s",
                         next_step="send them like 1760000000.25")  # fmt: skip
    return to_us(float(text))


def _status(error: EndcapError) -> int:
    if isinstance(error, BodyTooLargeError):
        return 413
    if isinstance(error, InputError):
        return 400
    if isinstance(error, NotReadyError):
        return 503
    return 507 if isinstance(error, StorageError) else 500
