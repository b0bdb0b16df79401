"""What a model server counts about itself, in Prometheus' terms. No histories, no shoppers.

Counts lie in shared memory, one row of cells a worker process, each written by its own worker alone: whichever worker
is asked for ``/metrics`` answers for all of them, and a restarted worker counts on where the last one ended. It is
also cheaper than a lock a count.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving.server.recommend import FALLBACK_FILLED, FALLBACK_POPULAR

__all__ = ["CACHE_RESULTS", "FALLBACKS", "LATENCY_BUCKETS_S", "ROUTES", "Cell", "Distribution", "ServerMetrics"]

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
QUEUE_BUCKETS_S = (0.0001, 0.0005, *LATENCY_BUCKETS_S)
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
ROUTES = ("recommend", "infer", "predict", "grpc", "shadow")
"""``shadow``: copies of requests for recommendations, of whose answers no shopper sees anything."""
OUTCOMES = ("answered", "refused", "failed", "timed_out", "shed")
CACHE_RESULTS = ("hit", "miss", "joined", "renewed", "bypassed")
"""``joined``: waited for the same answer of another request. ``renewed``: a hit that was made anew before it expired.
``bypassed``: the cache was slow or gone, so a miss too."""
CACHE_TROUBLES = ("timed_out", "failed", "probe_failed", "damaged", "too_large", "dropped")
"""Redis did not answer in time, or with an error, or was not there when looked for; answers that were not whole, or too
large to be kept, or not written."""
FALLBACKS = (FALLBACK_POPULAR, FALLBACK_FILLED)
_ROW_CELLS = 4096


class _Cells:
    """Rows of float64 cells in memory that forked workers share."""

    def __init__(self, processes: int) -> None:
        self._all = memoryview(mmap.mmap(-1, processes * _ROW_CELLS * 8)).cast("d")
        self._processes = processes
        self._used = 0
        self.mine = self._row(0)

    def _row(self, process: int) -> memoryview[float]:
        return self._all[process * _ROW_CELLS : (process + 1) * _ROW_CELLS]

    def use(self, process: int) -> None:
        """Write to the row of worker ``process`` from now on."""
        self.mine = self._row(process)

    def take(self, count: int = 1) -> int:
        """The first of ``count`` fresh cells."""
        first, self._used = self._used, self._used + count
        if self._used > _ROW_CELLS:
            raise ValueError("more series than there is room for")
        return first

    def each(self, cell: int) -> Iterator[float]:
        return (self._all[process * _ROW_CELLS + cell] for process in range(self._processes))


class Cell:
    """A counter or a gauge."""

    __slots__ = ("_cells", "_index")

    def __init__(self, cells: _Cells) -> None:
        self._cells = cells
        self._index = cells.take()

    def inc(self, amount: float = 1.0) -> None:
        self._cells.mine[self._index] += amount

    def set(self, value: float) -> None:
        self._cells.mine[self._index] = value

    def total(self) -> float:
        """Over all workers, as is :meth:`most`."""
        return sum(self._cells.each(self._index))

    def most(self) -> float:
        return max(self._cells.each(self._index))


class Distribution:
    """A histogram."""

    __slots__ = ("_cells", "_edges", "_first")

    def __init__(self, cells: _Cells, edges: Sequence[float]) -> None:
        self._cells = cells
        self._edges = tuple(edges)
        self._first = cells.take(len(self._edges) + 2)

    def observe(self, value: float) -> None:
        mine = self._cells.mine
        mine[self._first + bisect_left(self._edges, value)] += 1.0
        mine[self._first + len(self._edges) + 1] += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Upper edges with the counts up to them, and the sum of the values."""
        found: list[tuple[str, float]] = []
        count = 0.0
        for place, edge in enumerate((*self._edges, float("inf"))):
            count += sum(self._cells.each(self._first + place))
            found.append((floatToGoString(edge), count))  # type: ignore[no-untyped-call]
        return found, sum(self._cells.each(self._first + len(self._edges) + 1))


class ServerMetrics(Collector):
    """All series of a server. Made before the workers are forked; each then calls :meth:`use` once.

    Args:
        thresholds_s: the objectives' latency thresholds, edges of the latency histograms beside the usual ones.
        processes: workers that share the counts.
    """

    def __init__(self, version: str, *, thresholds_s: Iterable[float] = (), processes: int = 1) -> None:
        cells = _Cells(processes)
        self._cells = cells
        self._version = version
        self._families: list[Callable[[], Metric]] = []
        edges = sorted({*LATENCY_BUCKETS_S, *thresholds_s})
        self.attempts = {(route, outcome): Cell(cells) for route in ROUTES for outcome in OUTCOMES}
        self._counter("attempts", "Requests by outcome: answered (2xx), refused (4xx), failed, timed out, shed.",
                      ("route", "outcome"), self.attempts)  # fmt: skip
        self.latency = {route: Distribution(cells, edges) for route in ROUTES}
        self._histogram("latency_seconds", "From the whole request read to the answer handed over.",
                        ("route",), {(route,): one for route, one in self.latency.items()})  # fmt: skip
        self.fallbacks = {reason: Cell(cells) for reason in FALLBACKS}
        self._counter("fallbacks", "Answers that were not the graph's, by reason.",
                      ("fallback",), {(reason,): cell for reason, cell in self.fallbacks.items()})  # fmt: skip
        self.cache = {result: Cell(cells) for result in CACHE_RESULTS}
        self._counter("cache", "Requests for an answer that may be cached, by what came of it.",
                      ("result",), {(result,): cell for result, cell in self.cache.items()})  # fmt: skip
        self.cache_troubles = {trouble: Cell(cells) for trouble in CACHE_TROUBLES}
        self._counter("cache_troubles", "What went wrong with the cache; no request failed by it.",
                      ("trouble",), {(trouble,): cell for trouble, cell in self.cache_troubles.items()})  # fmt: skip
        self.files_refused = Cell(cells)
        self._counter("files_refused", "Stock or key files that changed and could not be used; what they said before "
                      "holds.", (), {(): self.files_refused})  # fmt: skip
        self.loads = {result: Cell(cells) for result in ("loaded", "refused")}
        self._counter("loads", "Loads of the package by request, by what came of them.",
                      ("result",), {(result,): cell for result, cell in self.loads.items()})  # fmt: skip
        self.batch_rows = Distribution(cells, BATCH_BUCKETS)
        self._histogram("batch_rows", "Rows of a run of the graph.", (), {(): self.batch_rows})
        self.run_s = Distribution(cells, QUEUE_BUCKETS_S)
        self._histogram("run_seconds", "Time of a run of the graph.", (), {(): self.run_s})
        self.queue_s = Distribution(cells, QUEUE_BUCKETS_S)
        self._histogram("queue_seconds", "Time that a request waited for its run to begin.", (), {(): self.queue_s})

        def gauge(name: str, text: str, value: Callable[[Cell], float]) -> Cell:
            cell = Cell(cells)
            self._families.append(lambda: self._one_gauge(name, text, value(cell)))
            return cell

        self.verification_s = gauge(
            "verification_seconds", "Time to verify the package's signature and digests.", Cell.most
        )
        self.load_s = gauge("load_seconds", "Time to load and warm the graph.", Cell.most)
        self.ready = gauge("ready", "1 while the server is ready.", Cell.most)
        self.answers_dropped = gauge(
            "answers_dropped", "Answers that the answers log's disk was too slow or full for.", Cell.total
        )
        self.access_dropped = gauge(
            "access_dropped", "Requests that the access log's disk was too slow or full for.", Cell.total
        )
        self.in_flight = gauge("in_flight", "Runs of the graph that are waiting or running.", Cell.total)
        self.admitted = gauge("admitted", "Requests that may be in the server at once, as adapted.", Cell.total)
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def use(self, process: int) -> None:
        """Count as worker ``process``, from 0."""
        self._cells.use(process)
        for left_behind in (self.in_flight, self.admitted):
            left_behind.set(0)

    def ran(self, rows: int, took_s: float) -> None:
        """A run of the graph ended well."""
        self.batch_rows.observe(rows)
        self.run_s.observe(took_s)

    def queued(self, waited_s: float) -> None:
        """A request's run began."""
        self.queue_s.observe(waited_s)

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All series, summed over the workers."""
        return (family() for family in self._families)

    def _one_gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"endcap_server_{name}", text, labels=["version"])
        family.add_metric([self._version], value)
        return family

    def _counter(self, name: str, text: str, labels: tuple[str, ...], cells: Mapping[Any, Cell]) -> None:
        def family() -> Metric:
            found = CounterMetricFamily(f"endcap_server_{name}", text, labels=["version", *labels])
            for values, cell in cells.items():
                found.add_metric([self._version, *values], cell.total())
            return found

        self._families.append(family)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], series: dict[tuple[str, ...], Distribution]
    ) -> None:
        def family() -> Metric:
            found = HistogramMetricFamily(f"endcap_server_{name}", text, labels=["version", *labels])
            for values, one in series.items():
                buckets, total = one.buckets()
                found.add_metric([self._version, *values], buckets=buckets, sum_value=total)
            return found

        self._families.append(family)
