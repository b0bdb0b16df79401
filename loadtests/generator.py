"""The load itself: one Locust user whose task sends each arrival at its time, in a greenlet of its own.

Everything here runs in the load's process only: Locust and gevent stay out of everybody else's.
"""

from __future__ import annotations

import gc
import random
import resource
import signal
import time
import uuid
from collections.abc import Iterator
from typing import ClassVar

import gevent  # type: ignore[import-untyped]
import orjson
from gevent.event import Event  # type: ignore[import-untyped]
from gevent.pool import Pool  # type: ignore[import-untyped]
from locust import User, task
from locust.env import Environment

from endcap.errors import EndcapError, InputError
from endcap.objectives import Objectives, load_objectives
from endcap.records import RequestRecord, convert_requests, read_request_lines
from loadtests.client import Client
from loadtests.config import LoadConfig, LoadSummary, gateway_url
from loadtests.recording import Progress, RequestWriter
from loadtests.schedule import Stage, arrivals, validate_stages
from loadtests.shoppers import Shopper, read_shoppers, replay
from loadtests.summary import SATURATED, summarise
from serving import impressions

__all__ = ["PROGRESS_FILE", "Session", "ShopperTraffic", "run_load"]

PROGRESS_FILE = "load.json"
RECOMMEND_PATH = "/v1/recommend"
FEEDBACK_PATH = "/v1/feedback"
_BEACON_INTERVAL_S = 0.1
_BEACON_EVENTS = 100
_THINK_TIME_S = (0.1, 0.5)
_DRAIN_SPARE_S = 0.2
_UNFINISHED = "unfinished when the load ended"


class Session:
    """One load from its first arrival to its summary. Made before Locust starts, so that bad input is said at once.

    Raises:
        InputError: a file or a number is wrong. TargetError: there is no target. StorageError: no records folder.
    """

    def __init__(self, config: LoadConfig) -> None:
        stages = (Stage(config.rate_rps, config.duration_s),)
        validate_stages(stages)
        if config.timeout_s <= 0 or config.max_in_flight < 1:
            raise InputError("the timeout and the number of requests in flight are greater than zero")
        url = gateway_url(config)
        shoppers = read_shoppers(config.shoppers)
        self.config = config
        self.objectives: Objectives | None = None
        if config.objectives is not None:
            self.objectives = load_objectives(config.objectives)
        _raise_open_files(config.max_in_flight)
        self._arrivals: Iterator[float] = arrivals(stages, config.seed)
        self._shoppers = replay(shoppers, config.seed)
        self._think = random.Random(f"think-{config.seed}")  # noqa: S311 - a think time, not a secret
        self._client = Client(url, timeout_s=config.timeout_s, concurrency=config.max_in_flight)
        self._beacon_client = Client(url, timeout_s=config.timeout_s, concurrency=64)
        self._bodies: dict[str, bytes] = {}
        self._pool = Pool()
        self._beacons = Pool()
        self._events: list[dict[str, str]] = []
        self._clicks_due = 0
        self._prefix = uuid.uuid4().hex[:16]
        self._count = 0
        self._writer = RequestWriter(config.out)
        self.stopping = Event()
        self.ended = Event()
        self.fatal: EndcapError | None = None
        self.environment: Environment | None = None
        self._started_mono = time.monotonic()
        self._started_at_s = time.time()
        self._offered_s = 0.0
        self.progress = Progress(config.out / PROGRESS_FILE, started_at_s=self._started_at_s)

    # ---- the course of a load ------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send every arrival at its time until the schedule ends or a stop is asked for; then drain."""
        helpers = [gevent.spawn(self._flush_forever), gevent.spawn(self._beacon_forever)]
        self._started_mono = time.monotonic()
        self._started_at_s = time.time()
        try:
            for offset_s in self._arrivals:
                wait_s = self._started_mono + offset_s - time.monotonic()
                if wait_s > 0:
                    if self.stopping.wait(wait_s):
                        break
                elif self.stopping.is_set():
                    break
                self._arrive(self._started_at_s + offset_s)
            else:
                if self.config.duration_s is not None:
                    self.stopping.wait(max(0.0, self._started_mono + self.config.duration_s - time.monotonic()))
        finally:
            self._offered_s = time.monotonic() - self._started_mono
            self.progress.state = "stopping"
            self._drain()
            gevent.killall(helpers)
            self.ended.set()

    def finish(self) -> LoadSummary:
        """Close the records, make the summary of this load, and move its requests into the table."""
        self.progress.state = "ended"
        self._writer.close()
        records = read_request_lines(self._writer.path)
        summary = summarise(records, span_s=self._offered_s, objectives=self.objectives)
        self.progress.write()
        convert_requests(self.config.out)
        return summary

    def _drain(self) -> None:
        """Wait for what is in flight and for clicks already thought of, but no longer than a request may take."""
        drain_s = self.config.timeout_s + _DRAIN_SPARE_S
        deadline = time.monotonic() + drain_s
        self._pool.join(timeout=drain_s)
        self._send_beacons()
        self._beacons.join(timeout=max(0.1, deadline - time.monotonic()))
        # What is left had its time: it is ended, and recorded as a failure.
        self._pool.kill(timeout=1.0)
        self._beacons.kill(timeout=1.0)

    def _now_s(self) -> float:
        """Unix time that never steps: the wall clock at the start, and a monotonic one since."""
        return self._started_at_s + time.monotonic() - self._started_mono

    def _next_id(self) -> str:
        # In the form of a UUID, which Envoy keeps.
        self._count += 1
        joined = f"{self._prefix}{self._count:016x}"
        return f"{joined[:8]}-{joined[8:12]}-{joined[12:16]}-{joined[16:20]}-{joined[20:]}"

    def _record(self, record: RequestRecord) -> None:
        self._writer.add(record)
        self.progress.finished(record)
        if self.environment is not None:
            self.environment.events.request.fire(  # type: ignore[no-untyped-call]
                request_type="POST",
                name=RECOMMEND_PATH if record.kind == "recommend" else FEEDBACK_PATH,
                response_time=record.latency_s * 1000,
                response_length=0,
                exception=EndcapError(record.error or str(record.status)) if record.failed else None,
                context={},
            )

    # ---- one shopper ---------------------------------------------------------------------------------

    def _arrive(self, intended_s: float) -> None:
        self.progress.offered += 1
        shopper = next(self._shoppers)
        request_id = self._next_id()
        if len(self._pool) >= self.config.max_in_flight:
            now_s = self._now_s()
            self.progress.saturated += 1
            self._record(
                RequestRecord(request_id, "recommend", shopper.shopper, intended_s, now_s, now_s, 0, SATURATED)
            )
            return
        # Drawn here, in the order of arrivals, so that a seed means the same think times each run.
        think_s = self._think.uniform(*_THINK_TIME_S)
        self._pool.spawn(self._visit, shopper, request_id, intended_s, think_s)

    def _visit(self, shopper: Shopper, request_id: str, intended_s: float, think_s: float) -> None:
        token, clicked = self._recommend(shopper, request_id, intended_s)
        if token is None or not self.config.feedback:
            return
        self._events.append({"impression": token, "type": "shown"})
        if clicked and shopper.next_item is not None:
            gevent.sleep(think_s)
            self._events.append({"impression": token, "type": "clicked", "item": shopper.next_item})

    def _recommend(self, shopper: Shopper, request_id: str, intended_s: float) -> tuple[str | None, bool]:
        """Ask once and record it; returns the impression's token, and whether the shopper will click."""
        sent_s = self._now_s()
        self.progress.sent += 1
        self.progress.in_flight += 1
        status, clicked = 0, False
        error: str | None = _UNFINISHED
        version: str | None = None
        impression: str | None = None
        fallback: str | None = None
        token: str | None = None
        try:
            answer = self._client.post(RECOMMEND_PATH, self._body(shopper), request_id=request_id,
                                       shopper=shopper.shopper)  # fmt: skip
            status, error = answer.status, answer.error
            if status == 200:
                try:
                    document = orjson.loads(answer.body)
                    version, fallback = str(document["version"]), document.get("fallback")
                    token = document.get("impression")
                    impression = None if token is None else impressions.id_in_clear(token)
                    clicked = shopper.next_item is not None and shopper.next_item in document["items"]
                except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
                    # A 200 that cannot be read is no answer to the shopper.
                    status, error, token, clicked = 0, "unreadable answer", None, False
            elif error is None:
                error = answer.body[:200].decode(errors="replace") or None
        finally:
            self.progress.in_flight -= 1
            self._record(
                RequestRecord(
                    request_id,
                    "recommend",
                    shopper.shopper,
                    intended_s=intended_s,
                    sent_s=sent_s,
                    done_s=self._now_s(),
                    status=status,
                    error=error,
                    version=version,
                    impression=impression,
                    clicked=clicked,
                    fallback=fallback,
                )
            )
        return token, clicked

    def _body(self, shopper: Shopper) -> bytes:
        body = self._bodies.get(shopper.shopper)
        if body is None:
            body = orjson.dumps(
                {"shopper": shopper.shopper, "history": shopper.history, "k": self.config.k, "context": {}}
            )
            self._bodies[shopper.shopper] = body
        return body

    # ---- feedback ------------------------------------------------------------------------------------

    def _send_beacons(self) -> None:
        events, self._events = self._events, []
        for start in range(0, len(events), _BEACON_EVENTS):
            self._beacons.spawn(self._beacon, events[start : start + _BEACON_EVENTS], self._now_s())

    def _beacon(self, events: list[dict[str, str]], intended_s: float) -> None:
        request_id = self._next_id()
        sent_s = self._now_s()
        status = 0
        error: str | None = _UNFINISHED
        try:
            answer = self._beacon_client.post(FEEDBACK_PATH, orjson.dumps({"events": events}), request_id=request_id)
            status = answer.status
            error = answer.error or (None if status == 200 else answer.body[:200].decode(errors="replace"))
        finally:
            self._record(RequestRecord(request_id, "feedback", "", intended_s, sent_s, self._now_s(), status, error))

    # ---- beside the arrivals -------------------------------------------------------------------------

    def _beacon_forever(self) -> None:
        while True:
            gevent.sleep(_BEACON_INTERVAL_S)
            self._send_beacons()

    def _flush_forever(self) -> None:
        ticks = 0
        while True:
            try:
                self._writer.flush()
                if ticks % 5 == 0:
                    self.progress.write()
            except EndcapError as error:
                self.fatal = error
                self.stopping.set()
                return
            ticks += 1
            gevent.sleep(0.2)


def _raise_open_files(connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class ShopperTraffic(User):
    """The one Locust user: its task is the dispatcher of all arrivals."""

    session: ClassVar[Session | None] = None

    @task
    def traffic(self) -> None:
        session = type(self).session
        if session is None:
            raise InputError("no load is set up", next_step="start it with python -m loadtests.run")
        session.environment = self.environment
        if not session.ended.is_set():
            session.dispatch()
        session.ended.wait()
        gevent.sleep(0.5)


def run_load(config: LoadConfig) -> LoadSummary:
    """Run a load to its end, or to SIGTERM or SIGINT, and return its summary.

    Raises:
        EndcapError: bad input, no target, or no space for the records; what was recorded is kept.
    """
    session = Session(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, session.stopping.set)
    ShopperTraffic.session = session
    # What start-up made lives as long as the process: keep the collector from walking it between arrivals.
    gc.collect()
    gc.freeze()
    environment = Environment(user_classes=[ShopperTraffic], stop_timeout=config.timeout_s + 3)
    runner = environment.create_local_runner()
    runner.start(1, spawn_rate=1)
    session.ended.wait()
    runner.quit()
    summary = session.finish()
    if session.fatal is not None:
        raise session.fatal
    return summary
