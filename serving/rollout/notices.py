"""Notices of a rollout to a webhook (the body that Slack and its like take), which can never hold the rollout up.

What is worth a notice is read off the audit log's own lines, so that an engine that goes on with a rollout sends what
one before it did not get to send. ``notices.jsonl`` in the rollout's folder keeps what was delivered, by ``seq``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from endcap.errors import EndcapError, InputError, StateError
from endcap.files import JsonLines, read_json_lines
from serving.rollout.audit import LOOK, START, Decision, decision_record
from serving.rollout.events import Command
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Outcome, Phase
from serving.rollout.store import DECISIONS_FILE

__all__ = ["NOTICES_FILE", "Figure", "Notice", "Notifier", "Told", "notice_of", "notices_of", "webhook_url"]

NOTICES_FILE = "notices.jsonl"
_QUEUE = 64
_ANSWER_S = 5.0
_BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0, 60.0)
_LONGEST_WAIT_S = 300.0
"""However long a server asks to be left alone."""
_FLUSH_S = 5.0
_SLACK_TEXT = 2900
"""Slack takes 3,000 characters a block."""

logger = logging.getLogger(__name__)


# ---- what is worth a notice, and its words -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """One objective at the moment of a decision; shares 0..1, None where there were no events."""

    objective: str
    verdict: str
    canary: float | None
    canary_events: int
    control: float | None
    margin: float | None

    def __str__(self) -> str:
        if self.canary is None:
            return f"{self.objective}: no data"
        beside = "" if self.control is None else f" against {self.control:.2%}"
        margin = "" if self.margin is None else f" (margin {self.margin:.2%})"
        return f"{self.objective}: {self.verdict}, {self.canary:.2%} of {self.canary_events:,}{beside}{margin}"


@dataclass(frozen=True, slots=True)
class Told:
    """What one line of the audit log tells of where the rollout then stood. ``step`` counts from 1."""

    seq: int
    at_s: float
    rollout: str
    stable: str
    canary: str
    action: str
    phase: Phase
    step: int
    share: float | None
    outcome: Outcome | None
    reason: str
    waiting: str | None
    paused: bool
    """It is by a person's command that it waits."""
    figures: tuple[Figure, ...]

    @staticmethod
    def of(line: Mapping[str, Any]) -> Told:
        """Raises KeyError, TypeError, ValueError or AttributeError on what is no line of the log."""
        event, outcome, share = line["event"], line["outcome"], line["share"]
        return Told(
            seq=int(line["seq"]), at_s=float(line["at_s"]), rollout=str(line["rollout"]), stable=str(line["from"]),
            canary=str(line["to"]), action=str(line["action"]), phase=Phase(line["phase"]), step=int(line["step"]),
            share=None if share is None else float(share), outcome=None if outcome is None else Outcome(outcome),
            reason=str(line["reason"]), waiting=None if line["waiting"] is None else str(line["waiting"]),
            paused=event is not None and event.get("command") == Command.PAUSE,
            figures=tuple(
                Figure(name, str(seen["verdict"]), _share(seen["canary"]), int(seen["canary"]["total"]),
                       _share(seen["control"]), None if seen["margin"] is None else float(seen["margin"]))
                for name, seen in line["evidence"].items()
            ),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Notice:
    """``key``: what it is about; the same is told once a rollout. ``kind``: start, waiting, hold, or the outcome."""

    seq: int
    kind: str
    key: str
    at_s: float
    title: str
    reason: str
    figures: tuple[Figure, ...]
    next_step: str

    def body(self) -> dict[str, Any]:
        """A message as Slack's incoming webhooks take it; ``text`` alone says all that matters."""
        title, reason, following = _plain(self.title), _plain(self.reason), _plain(self.next_step)
        blocks: list[dict[str, Any]] = [_section(f"*{title}*\n{reason}")]
        if self.figures:
            blocks.append(_section("\n".join(_plain(str(figure)) for figure in self.figures)))
        blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": f"Next: {following}"[:_SLACK_TEXT]}]})
        return {"text": f"{title}: {reason}. Next: {following}"[:_SLACK_TEXT], "blocks": blocks}


_ENDINGS = {
    Outcome.PROMOTED: ("is promoted", "all traffic is its own; version {stable} is retired"),
    Outcome.ROLLED_BACK: ("is rolled back", "all traffic goes back to version {stable}"),
    Outcome.REFUSED: ("is refused", "version {stable} keeps all traffic; correct the candidate and roll it out anew"),
    Outcome.HELD: ("is inconclusive", "all traffic goes back to version {stable}; give it more traffic, more time or "
                                      "a wider margin, or leave it"),
    Outcome.ABORTED: ("is aborted", "all traffic goes back to version {stable}"),
}  # fmt: skip


def notice_of(before: Told | None, now: Told) -> Notice | None:
    """What people are told of a decision: ``now``, which came after ``before``; None for what is not worth it.

    Told are the start, the beginning of a hold or of a wait that no person asked for, and what the end will be as soon
    as that is decided: the traffic is still on its way back then.
    """

    def tell(kind: str, key: str, does: str, reason: str, following: str) -> Notice:
        title = f"{now.rollout}: version {now.canary} {does}"
        return Notice(now.seq, kind, key, now.at_s, title, reason, now.figures, following)

    if now.action == START:
        return tell("start", "start", f"begins its rollout beside version {now.stable}", now.reason,
                    "the evidence decides, step by step; endcap rollout status says where it stands")  # fmt: skip
    if now.outcome is not None:
        if before is not None and before.outcome is now.outcome:
            return None
        does, following = _ENDINGS[now.outcome]
        return tell(now.outcome.value, now.outcome.value, does, now.reason, following.format(stable=now.stable))
    if before is not None and now.step < before.step:
        return tell(
            "hold",
            f"compared again {now.seq}",
            f"goes back to {_percent(now.share)}",
            now.reason,
            "beside the old version the evidence decides again; endcap rollout abort decides by hand",
        )
    if now.phase is Phase.HOLDING and (before is None or before.phase is not Phase.HOLDING):
        return tell("hold", f"hold {now.step}", f"holds at {_percent(now.share)}", now.reason,
                    "more evidence may still decide; endcap rollout promote or abort decides by hand; "
                    "else its traffic is returned when the hold is over")  # fmt: skip
    began_to_wait = now.waiting is not None and (before is None or before.waiting != now.waiting)
    if began_to_wait and not now.paused and now.waiting is not None:
        place = "before any traffic" if now.share is None else f"at {_percent(now.share)}"
        return tell("waiting", f"waiting {now.waiting}", f"waits {place}", now.waiting,
                    "endcap rollout approve lets a step begin; a freeze ends by itself")  # fmt: skip
    return None


def notices_of(folder: Path) -> Iterator[Notice]:
    """The notices that a rollout's log is worth, in their order.

    Raises:
        StateError: a line is damaged; the message names the file.
    """
    path, before = folder / DECISIONS_FILE, None
    for number, line in enumerate(read_json_lines(path), 1):
        if line.get("action") == LOOK:
            continue
        try:
            now = Told.of(line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"line {number} is damaged ({error!r})", where=path) from error
        notice = notice_of(before, now)
        if notice is not None:
            yield notice
        before = now


def _share(counts: Mapping[str, Any]) -> float | None:
    return int(counts["good"]) / int(counts["total"]) if counts["total"] else None


def _percent(share: float | None) -> str:
    return "no share" if share is None else f"{share:.0%}"


def _plain(text: str) -> str:
    """Words that a chat shows as they are, with no links, mentions or line breaks of somebody's making."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped[:1200]


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text[:_SLACK_TEXT]}}


# ---- sending them ------------------------------------------------------------------------------------


def webhook_url(variable: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The address that an environment variable holds; None where it is not set. It is a secret: never show it.

    Raises:
        InputError: it holds no http(s) address; the message does not say what it holds.
    """
    held = environment.get(variable, "").strip() if variable else ""
    if not held:
        return None
    try:
        url = httpx.URL(held)
        good = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, UnicodeError):
        good = False
    if not good:
        raise InputError("holds no http(s) address", where=variable, next_step="correct it, or unset it")
    return held


class _Secret(logging.Filter):
    """httpx logs every request's whole address."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = str(httpx.URL(url))

    def filter(self, record: logging.LogRecord) -> bool:
        return self._url not in record.getMessage()


@dataclass(frozen=True, slots=True)
class _Answer:
    """``again_after_s``: when to try again, None where there is no use in it."""

    delivered: bool
    said: str
    again_after_s: float | None = None


class Notifier:
    """Sends a rollout's notices from one thread of its own; :meth:`tell` neither waits nor raises.

    Each is tried again after errors of the server or the network, at growing distances or when the server asks; other
    refusals are final. At least once: one that was sent and not yet kept as delivered is sent again by the next engine.
    Used by one engine: the caller holds the rollout.
    """

    def __init__(
        self, url: str, spec: RolloutSpec, folder: Path, *, answer_s: float = _ANSWER_S,
        backoff_s: tuple[float, ...] = _BACKOFF_S, flush_s: float = _FLUSH_S,
    ) -> None:  # fmt: skip
        parsed = httpx.URL(url)
        self.address = f"{parsed.scheme}://{parsed.host}"
        """As much of the address as may be shown."""
        self._url, self._spec, self._folder = url, spec, folder
        self._answer_s, self._backoff_s, self._flush_s = answer_s, backoff_s, flush_s
        self._before: Told | None = None
        self._told: set[str] = set()
        self._changed = threading.Condition()
        self._waiting: deque[Notice] = deque()
        self._ends_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="endcap-notices", daemon=True)

    def __enter__(self) -> Self:
        """Begin with what an engine before this one did not deliver."""
        try:
            done = _done(self._folder)
            self._told = {key for _, key in done}
            for notice in notices_of(self._folder):
                if (notice.seq, notice.key) not in done:
                    self._put(notice)
        except EndcapError as error:  # the engine says so, and ends, where the rollout's own log is damaged
            logger.warning("notices: %s", error)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        """Wait a little for what is on its way; what stays is sent when the rollout is gone on with."""
        with self._changed:
            self._ends_s = time.monotonic() + self._flush_s
            self._changed.notify_all()
        self._thread.join(self._flush_s + 0.5)

    def tell(self, decided: Decision) -> None:
        """Queue the notice that a decision is worth, if any."""
        if decided.action == LOOK:
            return
        try:
            now = Told.of(decision_record(self._spec, decided))
            before, self._before = self._before, now
            if before is None and decided.before is not None:
                last = decided.before
                before = Told.of(
                    decision_record(self._spec, Decision(last, None, last, decided.at_s, decided.evidence))
                )
            notice = notice_of(before, now)
            if notice is not None:
                self._put(notice)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a notice, the rollout goes on
            logger.warning("notices: %r", error)

    def _put(self, notice: Notice) -> None:
        with self._changed:
            if notice.key in self._told:
                return
            if len(self._waiting) >= _QUEUE:
                logger.warning("notices: too many wait to be sent; %s is left out", notice.kind)
                return
            self._told.add(notice.key)
            self._waiting.append(notice)
            self._changed.notify_all()

    # ---- in the thread ----

    def _run(self) -> None:
        secret = _Secret(self._url)
        logging.getLogger("httpx").addFilter(secret)
        try:
            with httpx.Client(follow_redirects=False) as client:
                while (notice := self._next()) is not None:
                    self._deliver(client, notice)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to
            logger.warning("notices: no more are sent: %s", type(error).__name__)
        finally:
            logging.getLogger("httpx").removeFilter(secret)

    def _next(self) -> Notice | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._ends_s is not None)
            return None if not self._waiting or self._over() else self._waiting.popleft()

    def _deliver(self, client: httpx.Client, notice: Notice) -> None:
        tries, delays = 0, iter(self._backoff_s)
        while True:
            tries += 1
            answer = self._post(client, notice)
            delay_s = next(delays, None)
            if answer.delivered or answer.again_after_s is None or delay_s is None:
                self._keep(notice, answer, tries)
                return
            self._pause(max(delay_s, min(answer.again_after_s, _LONGEST_WAIT_S)))
            if self._over():
                return

    def _post(self, client: httpx.Client, notice: Notice) -> _Answer:
        try:
            # The answer's body is of no use, and need not be waited for.
            with client.stream("POST", self._url, json=notice.body(), timeout=self._answer_s) as response:
                code = response.status_code
                if response.is_success:
                    return _Answer(True, f"HTTP {code}")
                again = code in (408, 429) or code >= 500
                after_s = _retry_after_s(response.headers.get("retry-after")) if again else None
                return _Answer(False, f"HTTP {code}", after_s)
        except httpx.HTTPError as error:
            return _Answer(False, type(error).__name__, 0.0)  # the error's own words may hold the address
        except ValueError as error:  # what cannot be said in UTF-8 can at no time
            return _Answer(False, type(error).__name__)

    def _keep(self, notice: Notice, answer: _Answer, tries: int) -> None:
        result = "delivered" if answer.delivered else "given up" if answer.again_after_s is None else "not delivered"
        if not answer.delivered:
            logger.warning("notices: %s: %s %s: %s", notice.kind, result, self.address, answer.said)
        try:
            with JsonLines(self._folder / NOTICES_FILE) as kept:
                kept.append({"seq": notice.seq, "key": notice.key, "kind": notice.kind, "at_s": time.time(),
                             "result": result, "answer": answer.said, "tries": tries})  # fmt: skip
        except EndcapError as error:  # it is then sent again by the next engine
            logger.warning("notices: %s", error)

    def _pause(self, seconds: float) -> None:
        """Until it is time to try again. At the end there is little time: what waits is tried quickly, then left."""
        with self._changed:
            if self._ends_s is None and not self._changed.wait_for(lambda: self._ends_s is not None, seconds):
                return
            if self._ends_s is not None:
                self._changed.wait(max(0.0, min(seconds, 0.5, self._ends_s - time.monotonic())))

    def _over(self) -> bool:
        return self._ends_s is not None and time.monotonic() >= self._ends_s


def _retry_after_s(value: str | None) -> float:
    """Seconds or a date, as RFC 9110 has it; 0 where there is none or it cannot be read."""
    if value is None:
        return 0.0
    try:
        return (
            max(0.0, float(value))
            if value.strip().isdigit()
            else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _done(folder: Path) -> set[tuple[int, str]]:
    """What needs no sending any more."""
    return {
        (int(line["seq"]), str(line["key"]))
        for line in read_json_lines(folder / NOTICES_FILE)
        if line.get("result") in ("delivered", "given up") and isinstance(line.get("seq"), int) and "key" in line
    }
