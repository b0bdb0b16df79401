"""Prometheus' text format, read as it is written.

``prometheus_client.parser`` renames counters whose name lacks ``_total`` as OpenMetrics does, so that Envoy's
``envoy_cluster_upstream_rq`` and ``envoy_cluster_upstream_rq_total`` become one; here each sample keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from endcap.errors import SourceError

__all__ = ["TextSample", "parse_exposition"]

_LINE = re.compile(
    r"\s*(?P<name>[a-zA-Z_:][\w:]*)\s*(?:\{(?P<labels>(?:[^\"}]|\"(?:[^\"\\]|\\.)*\")*)\})?\s*"
    r"(?P<value>[^\s{}]+)(?:\s+-?\d+)?\s*(?:#.*)?",
    re.ASCII,
)
_LABEL = re.compile(r'\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)', re.ASCII)
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class TextSample:
    """One line: a metric's name, its labels and its value now."""

    name: str
    labels: dict[str, str]
    value: float


def parse_exposition(body: bytes, *, names: frozenset[str], max_series: int, where: str) -> list[TextSample]:
    """The samples of the metrics in ``names``.

    Raises:
        SourceError: not that format, one series twice, or more than ``max_series``.
    """
    found: list[TextSample] = []
    seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    for sample in _samples(body, names, where):
        series = (sample.name, frozenset(sample.labels.items()))
        if series in seen:
            raise SourceError(f"the same series twice: {sample.name}", where=where)
        seen.add(series)
        found.append(sample)
        if len(found) > max_series:
            raise SourceError(f"more than {max_series} series", where=where, next_step="select fewer series")
    return found


def _samples(body: bytes, names: frozenset[str], where: str) -> Iterator[TextSample]:
    for line in body.decode("utf-8", "replace").split("\n"):
        if not line or line.isspace() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise _wrong(line, where)
        if match["name"] in names:
            try:
                value = float(match["value"])
            except ValueError as error:
                raise _wrong(line, where) from error
            yield TextSample(match["name"], _labels(match["labels"] or "", line, where), value)


def _labels(text: str, line: str, where: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    position = 0
    while text[position:].strip():
        match = _LABEL.match(text, position)
        if match is None:
            raise _wrong(line, where)
        labels[match[1]] = _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], match[2])
        position = match.end()
    return labels


def _wrong(line: str, where: str) -> SourceError:
    return SourceError(f"not Prometheus' text format: {line[:80]!r}", where=where,
                       next_step="see whether the URL is that of a metrics endpoint")  # fmt: skip
