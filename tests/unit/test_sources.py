"""Sources against a fake HTTP server on loopback that answers well, badly, slowly or nonsense.

The real Prometheus and the real Envoy are in tests/local (test_prometheus.py, test_sources_attempts.py).
"""

from __future__ import annotations

import gzip
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError, SourceError
from endcap.evidence import Counts
from endcap.objectives import CountedBy, EnvoyCounters, Good, Objective, Objectives, SeriesCounters
from endcap.selectors import parse_selector
from serving.sources import (
    EnvoySource,
    MetricsEndpoint,
    MetricsSource,
    PrometheusAccess,
    PrometheusSource,
    Sources,
    envoy_attempts,
    measured,
    read_all,
)
from serving.sources.composed import Paced
from serving.sources.exposition import parse_exposition
from serving.sources.prometheus import parse_answer
from serving.targets.base import Observation, VersionObservation


@dataclass
class Asked:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Fake:
    """Answers every GET with ``answer(asked)``: status and body, or None to answer nothing until it is closed."""

    answer: Callable[[Asked], tuple[int, bytes] | None]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float | None = None
    """Bytes are sent one by one, so far apart."""


@contextmanager
def fake(answer: Callable[[Asked], tuple[int, bytes] | None]) -> Iterator[Fake]:
    served = Fake(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            asked = Asked(parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}, dict(self.headers.items()))
            served.asked.append(asked)
            found = served.answer(asked)
            if found is None:
                served.closing.wait(30)
                return
            self.send_response(found[0])
            for name, value in served.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(found[1])))
            self.end_headers()
            try:
                if served.drip_s is None:
                    self.wfile.write(found[1])
                for number in range(0 if served.drip_s is None else len(found[1])):
                    self.wfile.write(found[1][number : number + 1])
                    if served.closing.wait(served.drip_s):
                        return
            except OSError:
                return

        def log_message(self, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield served
        finally:
            served.closing.set()
            server.shutdown()
            thread.join()


def objectives(**counted: SeriesCounters | EnvoyCounters) -> Objectives:
    return Objectives(
        "shop", "shop",
        tuple(Objective(name, 0.99, Good.COUNTED, None, None, 0.01, None, where) for name, where in counted.items()),
    )  # fmt: skip


def counters(good: str = 'rq{code!~"5.."}', total: str = "rq", by: CountedBy = CountedBy.PROMETHEUS,
             prefix: str = "") -> SeriesCounters:  # fmt: skip
    return SeriesCounters(by, parse_selector(good), parse_selector(total), "version", prefix,
                          ("prometheus_replica", "replica"))  # fmt: skip


def matrix(*series: tuple[dict[str, str], list[tuple[float, str]]], **more: object) -> bytes:
    result = [{"metric": metric, "values": [list(pair) for pair in values]} for metric, values in series]
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}, **more}).encode()


def rq(code: str, *values: tuple[float, str], **labels: str) -> tuple[dict[str, str], list[tuple[float, str]]]:
    return {"__name__": "rq", "version": "7", "job": "j", "instance": "i", "code": code, **labels}, list(values)


def prometheus(url: str, *, declared: Objectives | None = None, **options: Any) -> PrometheusSource:
    access = PrometheusAccess(url, **{"timeout_s": 5.0, **options})
    return PrometheusSource(access, declared or objectives(errors=counters()))


def two_reads(first: bytes, second: bytes) -> tuple[object, object]:
    bodies = iter([first, second])
    with fake(lambda _: (200, next(bodies))) as served:
        source = prometheus(served.url)
        try:
            return source.read(102.0), source.read(103.0)
        finally:
            source.close()


def test_samples_since_the_first_read_count() -> None:
    first = matrix(rq("200", (90, "5"), (99, "10")), rq("500", (90, "0"), (99, "1")))
    second = matrix(rq("200", (99, "10"), (101, "15")), rq("500", (99, "1"), (101, "3")))
    assert two_reads(first, second) == ({"errors": {"7": Counts(0, 0)}}, {"errors": {"7": Counts(5, 7)}})


def test_one_query_at_an_explicit_time_where_good_is_part_of_total() -> None:
    with fake(lambda _: (200, matrix(rq("200", (99, "10"))))) as served:
        source = prometheus(served.url, lag_s=2.0, stale_after_s=60.0)
        source.read(1_000.0)
        source.close()
    (asked,) = served.asked
    assert asked.path == "/api/v1/query"
    assert (asked.query["query"], asked.query["time"]) == ("rq[60s]", "998.000")


def test_the_window_reaches_back_to_the_last_scrape_and_is_bounded() -> None:
    with fake(lambda _: (200, matrix(rq("200", (990, "10"))))) as served:
        source = prometheus(served.url, stale_after_s=60.0, max_window_s=300.0)
        for now_s in (1_000.0, 1_002.0, 1_100.0, 90_000.0, 5.0):
            source.read(now_s)
        source.close()
    assert [asked.query["query"] for asked in served.asked] == ["rq[60s]", "rq[40s]", "rq[138s]", "rq[300s]", "rq[30s]"]


def test_a_clock_that_jumps_loses_and_invents_nothing() -> None:
    scrapes = [(float(at_s), str(at_s * 10)) for at_s in range(90, 120)]

    def answer(asked: Asked) -> tuple[int, bytes]:
        end_s, window_s = float(asked.query["time"]), float(asked.query["query"][3:-2])
        inside = [pair for pair in scrapes if end_s - window_s <= pair[0] <= end_s]
        return 200, matrix(rq("200", *inside)) if inside else matrix()

    with fake(answer) as served:
        source = prometheus(served.url)
        assert source.read(102.0) == {"errors": {"7": Counts(0, 0)}}
        assert source.read(105.0) == {"errors": {"7": Counts(30, 30)}}
        assert source.read(1e6) == {}  # far ahead: nothing is fresh
        assert source.notes
        assert source.read(-1e6) == {"errors": {"7": Counts(30, 30)}}  # far back: nothing new
        assert source.read(110.0) == {"errors": {"7": Counts(80, 80)}}
        source.close()


def test_what_is_old_is_no_data_and_says_so() -> None:
    with fake(lambda _: (200, matrix(rq("200", (100, "10"))))) as served:
        source = prometheus(served.url, stale_after_s=30.0)
        assert source.read(110.0) == {"errors": {"7": Counts(0, 0)}}
        assert source.read(200.0) == {}
        assert "100 s old" in source.notes["errors"]
        source.close()


def test_looks_in_between_get_the_last_answer_and_the_last_error() -> None:
    clock = iter([0.0, 0.0, 4.9, 5.0, 8.0, 19.9, 20.0, 20.0, 24.9])
    with fake(lambda _: (500, b"no")) as served:
        source = Paced(prometheus(served.url), every_s=5.0, clock=lambda: next(clock))
        for _ in range(2):
            with pytest.raises(SourceError, match="answers 500"):
                source.read(100.0)
        assert len(served.asked) == 1
        served.answer = lambda _: (200, matrix(rq("200", (103, "1"))))
        for asked in (2, 2, 3, 3):  # the second took 3 s, so that it rests for 12
            assert source.read(105.0) == {"errors": {"7": Counts(0, 0)}}
            assert len(served.asked) == asked
        source.close()


million = b'{"status":"success","data":{"resultType":"matrix","result":[' + b"," * (17 << 20)
BAD_ANSWERS = {
    "500": (500, b"<html>down</html>", "it answers 500: <html>down"),
    "503": (503, b"", r"it answers 503: \(nothing\)"),
    "a login page": (200, b"<!doctype html><title>Sign in</title>", "not an answer of Prometheus: <!doctype"),
    "a redirect": (302, b"", "it answers 302"),
    "nothing": (200, b"", "not an answer of Prometheus"),
    "a number": (200, b"5", "not an object"),
    "another document": (200, b'{"items": []}', "refuses the query"),
    "a vector": (200, b'{"status":"success","data":{"resultType":"vector","result":[]}}', "no matrix"),
    "no result": (200, b'{"status":"success","data":null}', "no matrix"),
    "a result of the wrong kind": (
        200, b'{"status":"success","data":{"resultType":"matrix","result":{}}}', "no matrix",
    ),
    "an error of its own": (
        422, b'{"status":"error","errorType":"execution","error":"query timed out"}', "422.*query timed out",
    ),
    "warnings": (200, matrix(warnings=["a store did not answer"]), "warns.*a store did not answer"),
    "a value that is no number": (200, matrix(rq("200", (1, "many"))), "a sample of 'many'"),
    "a value that is no text": (200, matrix(rq("200", (1, 5))), "not a time and a text"),  # type: ignore[arg-type]
    "native histograms": (
        200,
        b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{"__name__":"rq"},"histograms":[]}]}}',
        "native histogram",
    ),
    "too many series": (200, matrix(*(rq(str(number), (1, "1")) for number in range(2001))), "2001 series"),
    "a huge body": (200, million, "larger than 16777216 bytes"),
    "no version": (200, matrix(({"__name__": "rq", "code": "200"}, [(99, "1")])), "tells a version by its label"),
    "a label that is nowhere": (
        200, matrix(({"__name__": "rq", "version": "7", "status": "200"}, [(99, "1")])), "asks for the label 'code'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_is_an_error_and_no_data(name: str) -> None:
    status, body, says = BAD_ANSWERS[name]
    with fake(lambda _: (status, body)) as served:
        source = prometheus(served.url)
        with pytest.raises(SourceError, match=says) as caught:
            source.read(100.0)
        assert len(str(caught.value)) < 500
        reading = read_all([source], 101.0)
        assert reading.measured == {}
        assert reading.notes.keys() == {source.name}
        assert "\n" not in reading.notes[source.name], "it becomes a part of one line's reason"
        source.close()


def test_after_a_bad_answer_nothing_is_lost() -> None:
    good = {100.0: matrix(rq("200", (98, "10"))), 102.0: matrix(rq("200", (98, "10"), (100, "30")))}
    with fake(lambda asked: (200, good[float(asked.query["time"]) + 2])) as served:
        source = prometheus(served.url)
        source.read(100.0)
        served.answer = lambda _: (200, b"<html>")
        with pytest.raises(SourceError):
            source.read(101.0)
        served.answer = lambda asked: (200, good[float(asked.query["time"]) + 2])
        assert source.read(102.0) == {"errors": {"7": Counts(20, 20)}}
        source.close()


def test_an_answer_that_does_not_come_ends_in_time() -> None:
    with fake(lambda _: None) as served:
        source = prometheus(served.url, timeout_s=0.05)
        with pytest.raises(SourceError, match=r"within 0\.05 s"):
            source.read(100.0)
        served.answer, served.drip_s = lambda _: (200, b" " * 10_000), 0.01
        with pytest.raises(SourceError, match=r"within 0\.05 s"):
            source.read(101.0)
        source.close()


def test_nobody_there_and_a_packed_answer_are_errors() -> None:
    with fake(lambda _: (200, gzip.compress(matrix()))) as served:
        served.headers["content-encoding"] = "gzip"
        source = prometheus(served.url)
        with pytest.raises(SourceError, match="packed"):
            source.read(100.0)
    with pytest.raises(SourceError, match="does not answer"):
        source.read(101.0)
    source.close()


def test_an_objective_s_own_trouble_does_not_take_the_others_away() -> None:
    declared = objectives(fine=counters(), wrong=counters(good="other_ok", total="other"))
    empty = matrix()
    with fake(lambda asked: (200, matrix(rq("200", (99, "1"))) if "rq" in asked.query["query"] else empty)) as served:
        source = prometheus(served.url, declared=declared)
        assert source.read(100.0) == {"fine": {"7": Counts(0, 0)}}
        assert "no series of other" in source.notes["wrong"]
        served.answer = lambda asked: (
            (200, matrix(rq("200", (99, "1")))) if "rq" in asked.query["query"] else (400, b"{}")
        )
        assert source.read(101.0) == {"fine": {"7": Counts(0, 0)}}
        assert "refuses the query" in source.notes["wrong"]
        source.close()


def test_a_latency_objective_is_a_bucket_out_of_the_count() -> None:
    declared = objectives(latency=counters(good='rq_bucket{le="0.1"}', total="rq_count"))

    def answer(asked: Asked) -> tuple[int, bytes]:
        name, value = ("rq_bucket", "90") if "bucket" in asked.query["query"] else ("rq_count", "100")
        labels = {"__name__": name, "version": "7", "job": "j", "instance": "i"}
        if name == "rq_bucket":
            labels["le"] = "0.1"
        return 200, matrix((labels, [(90, "0"), (95, value), *([(97.0, "200")] if name == "rq_count" else [])]))

    with fake(answer) as served:
        source = PrometheusSource(PrometheusAccess(served.url), declared)
        source._folders.began_s = 91.0  # as if its first look had been then
        # The count has a newer scrape than the bucket: what only one of them tells waits.
        assert source.read(100.0) == {"latency": {"7": Counts(90, 100)}}
        assert "where good has none" in source.notes["latency"]
        source.close()


def test_the_token_is_sent_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_TEST", "s3cret")
    file = tmp_path / "token"
    file.write_text("from-file\n")
    with fake(lambda _: (500, b"")) as served:
        for access, expected in (
            (PrometheusAccess(served.url, token_env="TOKEN_OF_TEST"), "Bearer s3cret"),
            (PrometheusAccess(served.url, token_file=file, headers={"X-Scope-OrgID": "shop"}), "Bearer from-file"),
        ):
            source = PrometheusSource(access, objectives(errors=counters()))
            with pytest.raises(SourceError) as caught:
                source.read(100.0)
            sent = {name.lower(): value for name, value in served.asked[-1].headers.items()}
            assert sent["authorization"] == expected
            assert expected not in f"{access!r}{source.name}{caught.value}"
            source.close()
    assert sent["x-scope-orgid"] == "shop"
    monkeypatch.delenv("TOKEN_OF_TEST")
    with pytest.raises(InputError, match="no token"):
        PrometheusSource(PrometheusAccess(served.url, token_env="TOKEN_OF_TEST"), objectives(errors=counters()))


@pytest.mark.parametrize("url", ["prometheus:9090", "http://", "ftp://a", "http://me:secret@host", "http://a:b:c"])
def test_what_is_no_url_or_holds_a_password_is_refused(url: str) -> None:
    with pytest.raises(InputError) as caught:
        PrometheusAccess(url)
    assert "secret" not in str(caught.value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["status", "data", "resultType", "result", "metric", "values", "__name__"]), inner, max_size=4
    ),
    max_leaves=15,
)  # fmt: skip


@given(anything | st.builds(lambda result: {"status": "success", "data": {"resultType": "matrix", "result": result}},
                            anything))  # fmt: skip
def test_any_json_is_series_or_a_clear_error(document: object) -> None:
    try:
        parse_answer(json.dumps(document).encode(), status=200, where="here", max_series=10)
    except SourceError as error:
        assert error.where == "here"


# Text endpoints


values = st.floats(min_value=0, allow_infinity=True) | st.just(float("nan"))


@given(st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_what_the_client_library_writes_is_read_back(by_label: dict[str, float]) -> None:
    registry = prometheus_client.CollectorRegistry()
    gauge = prometheus_client.Gauge("some", "With\nlines and \\.", ["what"], registry=registry)
    for label, value in by_label.items():
        gauge.labels(label).set(value)
    body = prometheus_client.generate_latest(registry)
    found = parse_exposition(body, names=frozenset({"some"}), max_series=10, where="here")
    assert {sample.labels["what"]: str(sample.value) for sample in found} == {k: str(v) for k, v in by_label.items()}


@given(st.binary(max_size=60) | st.text(alphabet='ab{}=", 19.\n#\\NaN', max_size=60).map(str.encode))
def test_any_bytes_are_samples_or_a_clear_error(body: bytes) -> None:
    try:
        parse_exposition(body, names=frozenset({"a", "b", "ab"}), max_series=3, where="here")
    except SourceError as error:
        assert error.where == "here"


def test_names_are_kept_as_they_are_written() -> None:
    body = b"# TYPE rq counter\nrq 1\n# TYPE rq_total counter\nrq_total 2 1700000000\n"
    found = parse_exposition(body, names=frozenset({"rq", "rq_total"}), max_series=9, where="here")
    assert [(sample.name, sample.value) for sample in found] == [("rq", 1), ("rq_total", 2)]


@pytest.mark.parametrize("body", [b"<html>\n", b'rq{a="b" 1\n', b"rq one\n", b'rq{a="1"} 1\nrq{a="1"} 2\n', b"\x00"])
def test_what_is_no_exposition_is_an_error(body: bytes) -> None:
    with pytest.raises(SourceError):
        parse_exposition(body, names=frozenset({"rq"}), max_series=9, where="here")


def exposed(ok: float, bad: float, version: str = "7") -> bytes:
    return f'rq{{code="200",version="{version}"}} {ok}\nrq{{code="500",version="{version}"}} {bad}\n'.encode()


def test_endpoints_are_summed_and_one_that_is_silent_is_left_out() -> None:
    declared = objectives(errors=counters(by=CountedBy.METRICS))
    with fake(lambda _: (200, exposed(10, 1))) as one, fake(lambda _: (200, exposed(20, 2, "x"))) as other:
        endpoints = [MetricsEndpoint(one.url), MetricsEndpoint(other.url, version="8")]
        source = MetricsSource(lambda: endpoints, declared)
        assert source.read(100.0) == {"errors": {"7": Counts(), "8": Counts()}}
        one.answer = lambda _: (200, exposed(13, 2))
        other.answer = lambda _: (200, exposed(21, 2, "x"))
        # The local clock went back: a later read is still later.
        assert source.read(50.0) == {"errors": {"7": Counts(3, 4), "8": Counts(1, 1)}}
        other.answer = lambda _: (503, b"")
        assert source.read(51.0) == {"errors": {"7": Counts(3, 4)}}
        assert "1 of 2 endpoints" in source.notes["metrics"]
        one.answer = lambda _: (200, b"<html>")
        with pytest.raises(SourceError):
            source.read(52.0)
        endpoints.clear()
        with pytest.raises(SourceError, match="no endpoint"):
            source.read(53.0)
        source.close()


ENVOY = """# TYPE envoy_cluster_upstream_rq counter
envoy_cluster_upstream_rq{envoy_response_code="200",envoy_cluster_name="version-7"} 90
envoy_cluster_upstream_rq{envoy_response_code="404",envoy_cluster_name="version-7"} 2
envoy_cluster_upstream_rq{envoy_response_code="429",envoy_cluster_name="version-7"} 3
envoy_cluster_upstream_rq{envoy_response_code="503",envoy_cluster_name="version-7"} 4
envoy_cluster_retry_upstream_rq{envoy_response_code="503",envoy_cluster_name="version-7"} 9
envoy_cluster_upstream_rq_retry{envoy_cluster_name="version-7"} 10
envoy_cluster_upstream_rq_total{envoy_cluster_name="version-7"} 110
envoy_cluster_upstream_rq_total{envoy_cluster_name="version-8"} 0
envoy_cluster_upstream_rq{envoy_response_code="200",envoy_cluster_name="feedback"} 50
"""


def test_envoy_s_attempts_hold_those_that_were_tried_again() -> None:
    assert envoy_attempts(ENVOY.encode()) == {"7": Counts(92, 109), "8": Counts(0, 0)}
    with pytest.raises(SourceError, match="nan"):
        envoy_attempts(ENVOY.replace(" 110", " NaN").encode())


def test_envoy_restarted_counts_once_and_silent_is_an_error() -> None:
    with fake(lambda _: (200, ENVOY.encode())) as served:
        source = EnvoySource(served.url, objectives(attempts=EnvoyCounters("version-")))
        assert source.read(1.0) == {"attempts": {"7": Counts(), "8": Counts()}}
        served.answer = lambda _: (200, ENVOY.replace(" 90", " 95").encode())
        assert source.read(2.0) == {"attempts": {"7": Counts(5, 5), "8": Counts()}}
        served.answer = lambda _: (200, ENVOY.replace(" 90", " 1").encode())
        assert source.read(3.0)["attempts"]["7"] == Counts(5 + 3, 5 + 20)
    with pytest.raises(SourceError, match="does not answer"):
        source.read(4.0)
    source.close()


def test_what_is_measured_joins_the_versions_that_the_target_knows() -> None:
    seen = Observation(1.0, {"7": 1.0}, {"7": VersionObservation(attempts=Counts(1, 1)), "8": VersionObservation()})
    joined = measured(seen, {"errors": {"7": Counts(2, 3), "9": Counts(5, 5)}})
    assert joined.versions["7"].measured == {"errors": Counts(2, 3)}
    assert joined.versions["7"].attempts == Counts(1, 1)
    assert joined.versions["8"].measured == {}
    assert set(joined.versions) == {"7", "8"}


def test_sources_together_fail_apart_and_say_what_they_lack() -> None:
    declared = objectives(errors=counters(), servers=counters(by=CountedBy.METRICS), attempts=EnvoyCounters("version-"))
    shown = {"at_s": 99.0, "errors": "10"}
    with (
        fake(lambda _: (200, matrix(rq("200", (99, "10"), (shown["at_s"], shown["errors"]))))) as one,
        fake(lambda _: (200, exposed(5, 1))) as two,
    ):
        options: dict[str, Any] = {
            "prometheus": PrometheusAccess(one.url, every_s=0.0), "endpoints": lambda: [MetricsEndpoint(two.url)],
            "envoy_url": two.url + "/nothing",
        }  # fmt: skip
        ticks = itertools.count(1)
        sources = Sources(declared, **options, clock=lambda: 1000.0 * next(ticks))
        assert set(sources.read(100.0).measured) == {"errors", "servers"}
        shown.update(at_s=101.0, errors="12")
        two.answer = lambda _: (500, b"")
        reading = sources.read(102.0)
        assert reading.measured == {"errors": {"7": Counts(2, 2)}}
        assert {"metrics", f"envoy {two.url}/nothing"} <= set(reading.notes)
        sources.close()
        for missing, says in (
            ("prometheus", "spec.prometheus.url"),
            ("endpoints", "servers show"),
            ("envoy_url", "an Envoy"),
        ):
            with pytest.raises(InputError, match=says):
                Sources(declared, **{**options, missing: None})


def test_objectives_that_the_target_counts_need_no_source() -> None:
    answered = Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None)
    sources = Sources(Objectives("o", "s", (answered,)))
    assert sources.read(1.0).measured == {}
