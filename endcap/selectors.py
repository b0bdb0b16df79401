"""Prometheus' vector selectors: the names and labels of counters, and nothing computed from them.

Rates, sums and quotients forget resets, gaps and the number of events; raw counters keep them, so only selectors
are taken (https://prometheus.io/docs/prometheus/latest/querying/basics/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from endcap.errors import InputError

__all__ = ["MAX_SELECTOR_CHARS", "Matcher", "Operator", "Selector", "parse_selector"]

MAX_SELECTOR_CHARS = 1000
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OPERATOR = re.compile(r"=~|!~|!=|=")
_TEXT = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'')
_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "r": "\r"}
_NEXT = 'give the counter\'s name and labels, as http_requests_total{service="$service"}'


class Operator(StrEnum):
    """How a label's value is compared."""

    EQUAL = "="
    NOT_EQUAL = "!="
    MATCH = "=~"
    NO_MATCH = "!~"


@dataclass(frozen=True, slots=True, order=True)
class Matcher:
    """One condition on a label. A label that is not there is the empty text, as in Prometheus."""

    label: str
    operator: Operator
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.label, "")
        if self.operator in (Operator.EQUAL, Operator.NOT_EQUAL):
            return (found == self.value) is (self.operator is Operator.EQUAL)
        return (re.fullmatch(self.value, found, re.DOTALL) is not None) is (self.operator is Operator.MATCH)

    def __str__(self) -> str:
        text = self.value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'{self.label}{self.operator}"{text}"'


@dataclass(frozen=True, slots=True)
class Selector:
    """The series of one counter. ``str()`` is the text that Prometheus takes."""

    name: str
    matchers: frozenset[Matcher] = frozenset()

    def matches(self, name: str, labels: Mapping[str, str]) -> bool:
        return name == self.name and all(matcher.matches(labels) for matcher in self.matchers)

    def narrows(self, other: Selector) -> frozenset[Matcher] | None:
        """What this asks beyond ``other``, where its series are all among the other's; else None."""
        if self.name != other.name or not other.matchers <= self.matchers:
            return None
        return self.matchers - other.matchers

    def __str__(self) -> str:
        return self.name + ("{" + ",".join(str(matcher) for matcher in sorted(self.matchers)) + "}"
                            if self.matchers else "")  # fmt: skip


def parse_selector(text: str) -> Selector:
    """``name`` or ``name{label="value", other=~"regular expression"}``.

    Raises:
        InputError: anything else: an expression (``rate(...)``, ``a / b``), a range (``[5m]``), ``offset``, no name.
    """
    if len(text) > MAX_SELECTOR_CHARS:
        raise InputError(f"a selector of more than {MAX_SELECTOR_CHARS} characters", next_step=_NEXT)
    stripped = text.strip()
    name = _NAME.match(stripped)
    if name is None:
        raise InputError(f"not a selector of a counter: {text!r}", next_step=_NEXT)
    rest = stripped[name.end() :].strip()
    if not rest:
        return Selector(name.group())
    if not rest.startswith("{") or not rest.endswith("}"):
        raise InputError(f"an expression, not a selector: {text!r}; rates and sums forget how many events there were",
                         next_step=_NEXT)  # fmt: skip
    return Selector(name.group(), frozenset(_matchers(rest[1:-1], text)))


def _matchers(inside: str, text: str) -> Iterator[Matcher]:
    wrong = InputError(f"not labels of a selector: {text!r}", next_step=_NEXT)
    position = _blank(inside, 0)
    while position < len(inside):
        label = _LABEL.match(inside, position)
        operator = _OPERATOR.match(inside, _blank(inside, label.end())) if label else None
        value = _TEXT.match(inside, _blank(inside, operator.end())) if operator else None
        if label is None or operator is None or value is None or label.group() == "__name__":
            raise wrong
        matcher = Matcher(label.group(), Operator(operator.group()), _unescaped(value[1] or value[2] or "", wrong))
        if matcher.operator in (Operator.MATCH, Operator.NO_MATCH):
            try:
                re.compile(matcher.value)
            except re.error as error:
                raise InputError(f"not a regular expression in {text!r}: {error}", next_step=_NEXT) from error
        yield matcher
        position = _blank(inside, value.end())
        if position < len(inside):
            if inside[position] != ",":
                raise wrong
            position = _blank(inside, position + 1)


def _blank(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _unescaped(text: str, wrong: InputError) -> str:
    def one(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise wrong
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.)", one, text)
