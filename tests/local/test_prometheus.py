"""Objectives counted by a real Prometheus server (Debian's package) that scrapes counters which the test moves."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from endcap.errors import SourceError
from endcap.evidence import Counts
from endcap.objectives import CountedBy, Good, Objective, Objectives, SeriesCounters
from endcap.selectors import parse_selector
from serving.sources import PrometheusAccess, PrometheusSource
from tests.process import Program, wait_until

SCRAPE_S = 0.1


@dataclass
class Exporter:
    """What the scraped process shows, by path; None: it answers 500."""

    port: int = 0
    shown: dict[str, str | None] = field(default_factory=dict)
    scrapes: dict[str, int] = field(default_factory=dict)

    def show(self, path: str, series: Mapping[str, object]) -> None:
        """Show exactly these, and return once more scrapes have begun: those before the last are then stored."""
        self.shown[path] = "".join(f"{name} {value}\n" for name, value in series.items())
        self.wait(path)

    def fail(self, path: str) -> None:
        self.shown[path] = None
        self.wait(path)

    def wait(self, path: str) -> None:
        begun = self.scrapes.get(path, 0)
        wait_until(lambda: self.scrapes.get(path, 0) >= begun + 4, f"Prometheus scrapes {path}")


@contextmanager
def exporting() -> Iterator[Exporter]:
    exporter = Exporter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = exporter.shown.get(self.path, "")
            exporter.scrapes[self.path] = exporter.scrapes.get(self.path, 0) + 1
            body = (text or "").encode()
            self.send_response(500 if text is None else 200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        exporter.port = server.server_port
        try:
            yield exporter
        finally:
            server.shutdown()
            thread.join()


class Prometheus:
    """One server that can be stopped and started again on its data."""

    def __init__(self, folder: Path, exporter: Exporter) -> None:
        binary = shutil.which("prometheus")
        assert binary, "install Debian's package prometheus (.ci/run does)"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "prometheus.log"
        config = folder / "prometheus.yml"
        config.write_text(json.dumps(scrape_config(exporter.port)))  # JSON is YAML
        self._argv = [
            binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._argv, stdout=output, stderr=subprocess.STDOUT)
        Program(self._process, self.url, self._log).wait_for("/-/ready")

    def stop(self, *, kill: bool = False) -> None:
        assert self._process is not None
        (self._process.kill if kill else self._process.terminate)()
        self._process.wait(30)


PATHS = ("/counts", "/reset", "/down", "/restart", "/nan", "/renamed", "/refused")


def scrape_config(port: int) -> dict[str, object]:
    def job(name: str, path: str, labels: Mapping[str, str]) -> dict[str, object]:
        target = {"targets": [f"127.0.0.1:{port}"], "labels": {**labels}}
        return {"job_name": name, "metrics_path": path, "static_configs": [target]}

    pair = [job(f"pair-{copy}", "/pair", {"job": "pair", "prometheus_replica": copy}) for copy in "ab"]
    return {
        "global": {"scrape_interval": f"{SCRAPE_S * 1000:.0f}ms", "scrape_timeout": f"{SCRAPE_S * 1000:.0f}ms"},
        "scrape_configs": [*(job(path[1:], path, {}) for path in PATHS), *pair],
    }


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    with exporting() as exporter:
        yield exporter


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, exporter: Exporter) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), exporter)
    server.start()
    yield server
    server.stop()


def source_of(server: Prometheus, path: str, *, good: str | None = None, total: str | None = None,
              stale_after_s: float = 60.0) -> PrometheusSource:  # fmt: skip
    job = f'job="{path[1:]}"'
    counters = SeriesCounters(
        CountedBy.PROMETHEUS,
        parse_selector(good or f'rq_total{{{job},code!~"5.."}}'), parse_selector(total or f"rq_total{{{job}}}"),
        "version", "", ("prometheus_replica",),
    )  # fmt: skip
    declared = Objectives("o", "s", (Objective("errors", 0.99, Good.COUNTED, None, None, 0.01, None, counters),))
    access = PrometheusAccess(server.url, lag_s=0.0, stale_after_s=stale_after_s)
    return PrometheusSource(access, declared)


def rq(good: object, bad: object, *, version: str = "7", more: str = "") -> dict[str, object]:
    return {f'rq_total{{version="{version}",code="{code}"{more}}}': n for code, n in (("200", good), ("503", bad))}


def counted(source: PrometheusSource) -> Mapping[str, Counts]:
    return source.read(time.time()).get("errors", {})


def becomes(source: PrometheusSource, expected: Mapping[str, Counts]) -> None:
    wait_until(lambda: counted(source) == expected, f"it counts {expected}", deadline_s=20)


def stays(source: PrometheusSource, exporter: Exporter, path: str, expected: Mapping[str, Counts]) -> None:
    exporter.wait(path)
    assert counted(source) == expected


def test_increments_of_each_version_count_once(server: Prometheus, exporter: Exporter) -> None:
    path = "/counts"
    exporter.show(path, rq(1000, 50) | rq(10, 0, version="8"))
    source = source_of(server, path)
    assert counted(source) == {"7": Counts(), "8": Counts()}
    exporter.show(path, rq(1030, 51) | rq(15, 5, version="8"))
    expected = {"7": Counts(30, 31), "8": Counts(5, 10)}
    becomes(source, expected)
    stays(source, exporter, path, expected)
    source.close()


def test_a_counter_that_was_reset_counts_what_it_holds_since(server: Prometheus, exporter: Exporter) -> None:
    path = "/reset"
    exporter.show(path, rq(1000, 50))
    source = source_of(server, path)
    counted(source)
    exporter.show(path, rq(3, 1))
    becomes(source, {"7": Counts(3, 4)})
    exporter.show(path, rq(3, 2))
    becomes(source, {"7": Counts(3, 5)})
    source.close()


def test_a_process_that_is_down_is_no_data_and_its_gap_counts_once(server: Prometheus, exporter: Exporter) -> None:
    path = "/down"
    exporter.show(path, rq(1000, 50))
    source = source_of(server, path, stale_after_s=1.0)
    counted(source)
    exporter.fail(path)
    wait_until(lambda: counted(source) == {}, "the last scrape is too old", deadline_s=20)
    assert "errors" in source.notes
    exporter.show(path, rq(1200, 60))
    becomes(source, {"7": Counts(200, 210)})
    source.close()


def test_values_that_are_no_counts_are_passed_over(server: Prometheus, exporter: Exporter) -> None:
    path = "/nan"
    exporter.show(path, rq(1000, 50))
    source = source_of(server, path)
    counted(source)
    for nonsense in ("NaN", "+Inf", "-5"):
        exporter.show(path, rq(nonsense, 60))
        stays(source, exporter, path, {"7": Counts()})
    assert "holds no count" in source.notes["errors"]
    exporter.show(path, rq(1001, 60))
    becomes(source, {"7": Counts(1, 11)})
    source.close()


def test_renamed_series_count_from_their_first_scrapes_on(server: Prometheus, exporter: Exporter) -> None:
    path = "/renamed"
    exporter.show(path, rq(1000, 50))
    source = source_of(server, path)
    counted(source)
    exporter.show(path, rq(2000, 70, more=',zone="a"'))
    exporter.show(path, rq(2000, 70, more=',zone="a"'))
    counted(source)
    exporter.show(path, rq(2004, 71, more=',zone="a"'))
    becomes(source, {"7": Counts(4, 5)})
    source.close()


def test_a_pair_of_scrapers_counts_once(server: Prometheus, exporter: Exporter) -> None:
    exporter.show("/pair", rq(1000, 50))
    source = source_of(server, "/pair")
    counted(source)
    exporter.show("/pair", rq(1100, 60))
    becomes(source, {"7": Counts(100, 110)})
    exporter.wait("/pair")
    stays(source, exporter, "/pair", {"7": Counts(100, 110)})
    source.close()


def test_prometheus_killed_and_started_again_loses_nothing(server: Prometheus, exporter: Exporter) -> None:
    path = "/restart"
    exporter.show(path, rq(1000, 50))
    source = source_of(server, path)
    counted(source)
    exporter.show(path, rq(1010, 50))
    becomes(source, {"7": Counts(10, 10)})
    server.stop(kill=True)
    try:
        with pytest.raises(SourceError, match="does not answer"):
            counted(source)
        exporter.shown[path] = "".join(f"{name} {value}\n" for name, value in rq(1500, 90).items())
    finally:
        server.start()
    exporter.wait(path)
    becomes(source, {"7": Counts(500, 540)})
    source.close()


def test_what_prometheus_refuses_is_told_in_its_words(server: Prometheus, exporter: Exporter) -> None:
    source = source_of(server, "/refused", good='rq_total{code=~"(?=x)"}')
    with pytest.raises(SourceError, match=r"refuses the query \(400\).*error parsing regexp"):
        counted(source)
    source.close()


def test_series_that_are_not_there_are_no_data(server: Prometheus, exporter: Exporter) -> None:
    source = source_of(server, "/refused")
    assert counted(source) == {}
    assert "no series" in source.notes["errors"]
    source.close()
