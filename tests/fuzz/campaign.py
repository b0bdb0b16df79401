"""Fuzzed requests at a real server process, one task's package after the other, each answer checked."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import orjson

from endcap.errors import OutcomeError
from endcap.package import Task
from endcap.processes import bind_to_parent, free_port, last_line, spawn, stop
from serving.server import grpc_messages
from tests.fuzz.mutations import changed_bytes, changed_json, grpc_frames, http_bytes
from tests.fuzz.packages import VERSION, Subject, make_subject
from tests.fuzz.wire import GrpcClient, HangError, HttpClient, exchange, http_request

__all__ = ["KINDS", "Findings", "Server", "again", "campaign", "growth_mb", "judge", "served"]

SHARES: dict[Task, float] = {
    Task.SESSION_RECOMMENDER: 0.4, Task.ENCODER: 0.15, Task.RANKER: 0.15, Task.CLASSIFIER: 0.15, Task.GENERATOR: 0.15,
}  # fmt: skip
KINDS: dict[str, float] = {"schema": 0.15, "json": 0.3, "http": 0.2, "call": 0.2, "frames": 0.15}
"""How much of all requests each kind is: schemathesis' own from the OpenAPI document; bodies made wrong; raw bytes at
the HTTP port; gRPC calls made wrong; raw frames and bytes at the gRPC port."""

_ROUNDS = 6
_CACHED = ("--cache", "memory:500")
"""One of the servers keeps answers; the others' graphs run for every request that is good."""
_MOST_GROWTH_MB = 8.0
_GRPC = f"/{grpc_messages.SERVICE}/"
_METHODS = (*[f"{_GRPC}ModelInfer"] * 12, *[_GRPC + name for name in grpc_messages.METHODS],
            "/grpc.health.v1.Health/Check", "/x/y", "")  # fmt: skip
_DEADLINES = (b"x-request-deadline-ms", b"x-envoy-expected-rq-timeout-ms")
_START_S = 120.0


@dataclass
class Findings:
    """What was found. ``problems``: the first few of all kinds of trouble, in words, with how to send them again."""

    requests: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    status_5xx: int = 0
    hangs: int = 0
    unusable: int = 0
    undocumented: int = 0
    problems: list[str] = field(default_factory=list)
    rss_mb: dict[str, list[float]] = field(default_factory=dict)

    def say(self, what: str) -> None:
        if len(self.problems) < 40:
            self.problems.append(what)

    def add(self, other: Findings) -> None:
        """What was found elsewhere too."""
        self.requests += other.requests
        self.answers += other.answers
        self.status_5xx += other.status_5xx
        self.hangs += other.hangs
        self.unusable += other.unusable
        self.undocumented += other.undocumented
        for problem in other.problems:
            self.say(problem)
        self.rss_mb |= other.rss_mb


def judge(found: Findings) -> list[str]:
    """What is not as it must be.

    Memory: the median of the last third of a server's samples is at most 8 MB above that of the middle third; the first
    third is left out, because arenas and caches fill in it.
    """
    wrong = []
    for count, what in (
        (found.status_5xx, "answers of 500, or of 503 and 504 without a cause"), (found.hangs, "hangs"),
        (found.unusable, "times the server did not answer a good request afterwards"),
        (found.undocumented, "answers that are not as the OpenAPI document says"),
    ):  # fmt: skip
        if count:
            wrong.append(f"{count} {what}")
    for name, samples in found.rss_mb.items():
        grown = growth_mb(samples)
        if grown > _MOST_GROWTH_MB:
            wrong.append(f"{name}: memory grew by {grown:.1f} MB over the last two thirds")
    return wrong


def growth_mb(samples: Sequence[float]) -> float:
    """From the middle third's median to the last third's; 0 with fewer than six samples."""
    third = len(samples) // 3
    if third < 2:
        return 0.0
    return statistics.median(samples[-third:]) - statistics.median(samples[third : 2 * third])


@dataclass(frozen=True, slots=True)
class Server:
    pid: int
    http: tuple[str, int]
    grpc: tuple[str, int]
    log: Path
    alive: Callable[[], bool]

    @property
    def rss_mb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096 / 1e6


@contextmanager
def served(subject: Subject, folder: Path) -> Iterator[Server]:
    """A server process of the package, ready.

    Raises:
        OutcomeError: it did not start.
    """
    own = folder / subject.task.value  # others start beside this one
    own.mkdir(parents=True, exist_ok=True)
    keys = {name: own / f"{name}.key" for name in ("admin", "impression")}
    for key in keys.values():
        key.touch(mode=0o600)
        key.write_text("ab" * 32)
    http, grpc = free_port(), free_port()
    log = folder / f"{subject.task.value}.log"
    log.unlink(missing_ok=True)
    process = spawn(
        [sys.executable, "-m", "serving.server", "--package", str(subject.package), "--public-key",
         str(subject.public_key), "--version", VERSION, "--zone", "a", "--port", str(http), "--grpc-port", str(grpc),
         "--timeout-s", "30", "--drain-s", "0", "--admin-key", str(keys["admin"]),
         "--impression-key", str(keys["impression"]), *(_CACHED if subject.task is Task.CLASSIFIER else ())],
        log=log, env={"OMP_NUM_THREADS": "1"}, leash=True,
    )  # fmt: skip
    server = Server(process.pid, ("127.0.0.1", http), ("127.0.0.1", grpc), log, lambda: process.poll() is None)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        stop(process)


def _wait_until_ready(server: Server) -> None:
    until_s = time.monotonic() + _START_S
    ask = http_request("/v2/health/ready", b"", method="GET")
    while time.monotonic() < until_s and server.alive():
        client = HttpClient(server.http)
        try:
            if client.ask(ask).status == 200 and "grpc: port" in server.log.read_text():
                return
        except (HangError, OSError, EOFError):
            pass
        finally:
            client.close()
        time.sleep(0.05)
    raise OutcomeError(f"the server did not start: {last_line(server.log)}", where=server.log)


def campaign(folder: Path, requests: int, *, seed: int, jobs: int, say: Callable[[str], None]) -> Findings:
    """So many requests over all tasks and kinds, ``jobs`` tasks at a time, each with processes of its own.

    All requests follow from ``seed``, the task, the kind and their number.
    """
    for task in SHARES:
        make_subject(folder, task)  # here, one after the other: they share a signing key
    found = Findings()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_with_parent, initargs=(os.getpid(),)) as pool:
        parts = [pool.submit(_one_task, folder, task, round(requests * share), seed) for task, share in SHARES.items()]
        for part in as_completed(parts):
            told, more = part.result()
            say(told)
            found.add(more)
    return found


def _with_parent(pid: int) -> None:
    """End when the campaign does, however that ends."""
    bind_to_parent(parent_pid=pid)


def _one_task(folder: Path, task: Task, requests: int, seed: int) -> tuple[str, Findings]:
    begun_s = time.monotonic()
    found = Findings()
    subject = make_subject(folder, task)
    with served(subject, folder) as server:
        _Run(subject, server, seed, found).run(requests)
    samples = found.rss_mb[task.value]
    return (f"{task.value}: {found.requests.total()} requests in {time.monotonic() - begun_s:.0f} s, memory "
            f"{samples[0]:.0f} to {samples[-1]:.0f} MB (last two thirds {growth_mb(samples):+.1f})"), found  # fmt: skip


def again(folder: Path, task: Task, kind: str, number: int, *, seed: int) -> Findings:
    """One request once more."""
    found = Findings()
    subject = make_subject(folder, task)
    with served(subject, folder) as server:
        one = _Run(subject, server, seed, found)
        one.send(kind, number)
        one.end()
    return found


class _Run:
    """The requests to one server."""

    def __init__(self, subject: Subject, server: Server, seed: int, found: Findings) -> None:
        self._subject = subject
        self._server = server
        self._seed = seed
        self._found = found
        self._http = HttpClient(server.http)
        self._call = GrpcClient(server.grpc)
        self._good = http_request(subject.infer_path, orjson.dumps(subject.good[subject.infer_path]))
        self._message = b"\0" + len(subject.message).to_bytes(4, "big") + subject.message
        self._schema: Any = None
        self._rss = found.rss_mb.setdefault(subject.task.value, [])

    def run(self, requests: int) -> None:
        counts = {kind: round(requests * share) for kind, share in KINDS.items()}
        numbers = dict.fromkeys(KINDS, 0)
        for turn in range(_ROUNDS):
            self._from_schema(counts["schema"] // _ROUNDS, turn)
            kinds = [kind for kind in KINDS if kind != "schema" for _ in range(counts[kind] // _ROUNDS)]
            Random(f"{self._seed}:{self._subject.task}:{turn}").shuffle(kinds)
            for place, kind in enumerate(kinds):
                self.send(kind, numbers[kind])
                numbers[kind] += 1
                if place % max(1, len(kinds) // 10) == 0:
                    self._rss.append(self._server.rss_mb)
        others = cycle([kind for kind in KINDS if kind != "schema"])
        while self._found.requests.total() < requests:  # schemathesis makes fewer than it is asked for
            kind = next(others)
            self.send(kind, numbers[kind])
            numbers[kind] += 1
        self.end()

    def send(self, kind: str, number: int) -> None:
        """Request ``number`` of a kind, and the look at what comes back."""
        random = Random(f"{self._seed}:{self._subject.task}:{kind}:{number}")
        name = f"{self._subject.task.value}:{kind}:{number}"
        self._found.requests[kind] += 1
        try:
            getattr(self, f"_{kind}_request")(random, name)
        except HangError as error:
            self._found.hangs += 1
            self._found.say(f"{name}: {error}")
            self._http.close()
            self._call.close()
        except (OSError, EOFError) as error:
            self._unusable(name, f"{type(error).__name__}: {error}")
        if number % 50 == 0:
            self._look(name)
        elif kind == "http":
            self._good_http(HttpClient(self._server.http), name)
        elif kind == "frames":
            self._good_call(GrpcClient(self._server.grpc), name)
        else:  # what is kept goes on: the next request of its kind is on the same connection
            self._check_alive(name)

    def _look(self, name: str) -> None:
        """Good requests on new connections, and on those that are kept, are answered."""
        for http, call in ((HttpClient(self._server.http), GrpcClient(self._server.grpc)), (self._http, self._call)):
            self._good_http(http, name)
            self._good_call(call, name)

    def _good_http(self, client: HttpClient, name: str) -> None:
        try:
            answer = client.ask(self._good)
            if answer.status != 200:
                self._unusable(name, f"{answer.status} {answer.text[:200]}")
        except (HangError, OSError, EOFError) as error:
            self._check_alive(name)
            self._unusable(name, f"{type(error).__name__}: {error}")
        if client is not self._http:
            client.close()

    def _good_call(self, client: GrpcClient, name: str) -> None:
        try:
            answer = client.call(f"{_GRPC}ModelInfer", self._message)
            if answer.grpc != 0:
                self._unusable(name, f"gRPC {answer}")
        except (HangError, OSError, EOFError) as error:
            self._check_alive(name)
            self._unusable(name, f"{type(error).__name__}: {error}")
        if client is not self._call:
            client.close()

    def _check_alive(self, name: str) -> None:
        if not self._server.alive():
            raise OutcomeError(f"the server ended after {name}: {last_line(self._server.log)}", where=self._server.log)

    def _unusable(self, name: str, what: str) -> None:
        self._found.unusable += 1
        self._found.say(f"{name}: a good request after it: {what}")

    def end(self) -> None:
        """What the server counted and logged."""
        self._look("the last one")
        log = self._server.log.read_text()
        if "Traceback" in log or "fault of the server" in log:
            self._found.unusable += 1
            self._found.say(f"the log tells of a fault: {self._server.log}")
        metrics = self._http.ask(http_request("/metrics", b"", ("Authorization", "Bearer " + "ab" * 32), method="GET"))
        for line in metrics.text.splitlines():
            if line.startswith("endcap_server_attempts") and '"failed"' in line and not line.endswith(" 0.0"):
                self._found.status_5xx += 1
                self._found.say(f"counted as failed: {line}")
        self._http.close()
        self._call.close()

    def _counted(self, name: str, status: int, *, caused: bool, text: str) -> None:
        self._found.answers[str(status)] += 1
        if status >= 500 and not (status in (503, 504) and caused):
            self._found.status_5xx += 1
            self._found.say(f"{name}: {status} {text[:300]}")

    # ---- the kinds

    def _json_request(self, random: Random, name: str) -> None:
        path = random.choice(list(self._subject.good))
        answer = self._http.ask(http_request(path, changed_json(random, self._subject.good[path])))
        self._counted(name, answer.status, caused="retry-after" in answer.headers, text=answer.text)
        if 400 <= answer.status < 500:
            error = orjson.loads(answer.body)["error"]
            where = error["where"] if isinstance(error, dict) else error.partition(": ")[0]
            if not where:
                self._unusable(name, f"the refusal names no field: {answer.text[:200]}")

    def _http_request(self, random: Random, name: str) -> None:
        path = random.choice(list(self._subject.good))
        parts = http_bytes(random, path, orjson.dumps(self._subject.good[path]))
        ending = random.choice(("half", "half", "half", "close", "reset"))
        answer = exchange(self._server.http, parts, ending=ending)
        caused = any(name in b"".join(parts) for name in _DEADLINES)
        for found in re.finditer(rb"(?:^|\n|\}|\])HTTP/1\.1 (\d\d\d) [^\r]*\r\n((?:[^\r]+\r\n)*)", answer):
            shed = caused or b"retry-after" in found[2]
            self._counted(name, int(found[1]), caused=shed, text=str(answer[found.start() :][:300]))

    def _call_request(self, random: Random, name: str) -> None:
        path, message, fields = random.choice(_METHODS), self._subject.message, []
        if random.random() < 0.5:
            message = _changed_message(random, message)
        if random.random() < 0.5:
            message = changed_bytes(random, message)
        body = b"\0" + len(message).to_bytes(4, "big") + message
        if random.random() < 0.1:
            body = changed_bytes(random, body)
        if random.random() < 0.2:
            fields.append(random.choice((
                ("grpc-timeout", "1m"), ("grpc-timeout", "0n"), ("grpc-timeout", "x"), ("x-endcap-priority", "batch"),
                ("content-length", "3"), ("authorization", "Bearer x"), ("Upper", "x"), ("te", "gzip"),
                ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("connection", "close"),
                ("x", "y" * 9000),
            )))  # fmt: skip
        drop = (random.choice((":method", ":path", "content-type", "te")),) if random.random() < 0.05 else ()
        answer = self._call.call(path, body, *fields, drop=drop)
        self._found.answers[f"grpc {answer.grpc}"] += 1
        caused = any(field == "grpc-timeout" for field, _ in fields)
        if answer.status >= 500 or answer.grpc in (2, 13) or (answer.grpc in (4, 14) and not caused):
            self._found.status_5xx += 1
            self._found.say(f"{name}: gRPC {answer.grpc} {answer.text[:300]}")

    def _frames_request(self, random: Random, name: str) -> None:
        parts = grpc_frames(random, random.choice(_METHODS), self._subject.message)
        ending = random.choice(("half", "half", "half", "close", "reset"))
        answer = exchange(self._server.grpc, parts, ending=ending)
        if b"\x0bgrpc-status\x0213" in answer:
            self._found.status_5xx += 1
            self._found.say(f"{name}: INTERNAL")
        self._found.answers["frames " + ("answered" if answer else "unanswered")] += 1

    def _from_schema(self, count: int, turn: int) -> None:
        """Requests of schemathesis', over all operations of the server's own document."""
        if self._schema is None:
            from tests.fuzz.schema import Schema

            self._schema = Schema(self._server.http)
        for case in self._schema.send(count, seed=self._seed * 1000 + turn):
            name = f"{self._subject.task.value}:schema:{turn}"
            self._found.requests["schema"] += 1
            if case.hang:
                self._found.hangs += 1
                self._found.say(f"{name}: {case.hang}")
                continue
            self._counted(f"{name}: {case.command}", case.status, caused=case.caused, text=case.text)
            if case.undocumented:
                self._found.undocumented += 1
                self._found.say(f"{name}: {case.undocumented}")
        self._look(f"{self._subject.task.value}:schema:{turn}")
        self._rss.append(self._server.rss_mb)


_Infer = grpc_messages.message("ModelInferRequest")
_CONTENTS = ("bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents", "fp32_contents",
             "fp64_contents", "bytes_contents")  # fmt: skip


def _changed_message(random: Random, good: bytes) -> bytes:
    """A ModelInferRequest with some of its fields changed."""
    request = _Infer.FromString(good)
    for _ in range(random.randrange(1, 4)):
        tensor = random.choice(list(request.inputs)) if request.inputs else request.inputs.add()
        way = random.randrange(11)
        if way == 0:
            request.model_name = random.choice(("", "x", "é" * 300))
        elif way == 1:
            request.model_version = random.choice(("", VERSION, "9", "x" * 300))
        elif way == 2:
            request.id = "i" * random.choice((0, 5, 257, 5000))
        elif way == 3:
            del tensor.shape[:]
            tensor.shape.extend(random.choice(([], [0, 3], [-1, 3], [2**62, 2**62], [1 << 30, 1 << 30], [6], [3, 2],
                                               [1] * 9, [1] * 5000)))  # fmt: skip
        elif way == 4:
            tensor.datatype = random.choice(("", "INT64", "FP32", "FP16", "BYTES", "BOOL", "INT8", "x"))
        elif way == 5:
            tensor.name = random.choice(("", "history", "input_ids", "query", "x"))
        elif way == 6:
            del request.raw_input_contents[:]
            values = random.choice(([1] * 6, [-1, 2**31 - 1], [0] * 3000, []))
            field = random.choice(_CONTENTS)
            typed = [b"\xff" if field == "bytes_contents" else bool(one) if field == "bool_contents" else abs(one)
                     if field.startswith("uint") else one for one in values]  # fmt: skip
            getattr(tensor.contents, field).extend(typed)
        elif way == 7:
            request.raw_input_contents.append(random.randbytes(random.choice((0, 1, 48, 5000))))
        elif way == 8 and request.raw_input_contents:
            at = random.randrange(len(request.raw_input_contents))
            request.raw_input_contents[at] = random.choice((
                random.randbytes(48), b"\xff" * 48, bytes(47), b"\x00\x00\xc0\x7f" * 12, b"\x00\x00\x80\x7f" * 12,
            ))  # fmt: skip
        elif way == 9:
            request.outputs.add(name=random.choice(("", "scores", "items", "x")))
        else:
            request.inputs.add().CopyFrom(tensor)
    found: bytes = request.SerializeToString()
    return found
