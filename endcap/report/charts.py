"""Charts as inline SVG under HTML text, with no script.

The drawing stretches to its box while strokes keep their width, and every word is an HTML element beside or over it:
one rendering is then sharp and legible at any width, follows the reader's light or dark scheme, and prints. Colours
are CSS classes, never values. Coordinates in the drawing are thousandths of the width and of the height.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

__all__ = ["Axis", "Chart", "linear_ticks", "log_ticks", "plain", "time_ticks"]

Floats = NDArray[np.float64]


def plain(value: float) -> str:
    """A number as a person writes it: ``0.05``, ``1.2``, ``12,500``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.12g}" if abs(value) >= 1 else f"{value:.6f}".rstrip("0")
    return text.rstrip(".").replace("-", "−")


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) inside ``low`` to ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 3 between them where fewer than three would fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**p for p in powers if low * 0.999 <= 10.0**p <= high * 1.001]
    if len(found) < 3:
        found = sorted(found + [3 * 10.0**p for p in powers if low <= 3 * 10.0**p <= high])
    return found


def time_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Whole steps of clock time, in seconds."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)
    step = next((s for s in steps if (high - low) / s <= count), 604800)
    return [float(t) for t in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values and its labelled ticks."""

    low: float
    high: float
    ticks: tuple[float, ...] = ()
    log: bool = False
    format: Callable[[float], str] = plain

    def at(self, values: ArrayLike) -> Floats:
        """Where values lie, 0 at ``low`` and 1 at ``high``; clipped to a little outside, NaN kept."""
        raw = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                raw = np.log10(np.maximum(raw, low * 1e-3))
            low, high = math.log10(low), math.log10(high)
        span = high - low
        placed: Floats = np.clip((raw - low) / span if span > 0 else raw * 0 + 0.5, -0.02, 1.02)
        return placed

    def one(self, value: float) -> float:
        return float(self.at([value])[0])


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


@dataclass
class Chart:
    """One plot. Draw into it, then take :meth:`html`. ``says`` is the main figure in words, for who cannot see it."""

    says: str
    x: Axis
    y: Axis
    height_px: int = 120
    title: str = ""
    show_x: bool = True
    kind: str = ""
    _drawn: list[str] = field(default_factory=list)
    _texts: list[Markup] = field(default_factory=list)

    def _points(self, xs: ArrayLike, ys: ArrayLike) -> Iterable[tuple[str, str] | None]:
        placed_x, placed_y = self.x.at(xs), self.y.at(ys)
        for px, py in zip(placed_x, placed_y, strict=True):
            if math.isnan(px) or math.isnan(py):
                yield None
            else:
                yield _number(1000 * px), _number(1000 * (1 - py))

    def _path(self, shape: str, css: str) -> None:
        if shape:
            self._drawn.append(f'<path class="{css}" d="{shape}"/>')

    def line(self, xs: ArrayLike, ys: ArrayLike, css: str, *, step: bool = False) -> None:
        """A line with a gap wherever a value is NaN; ``step`` holds each value until the next."""
        shape: list[str] = []
        last: tuple[str, str] | None = None
        for point in self._points(xs, ys):
            if point is None:
                last = None
                continue
            if last is None:
                shape.append(f"M{point[0]} {point[1]}")
            elif step:
                shape.append(f"H{point[0]}V{point[1]}")
            else:
                shape.append(f"L{point[0]} {point[1]}")
            last = point
        self._path("".join(shape), f"line {css}")

    def band(self, xs: ArrayLike, lows: ArrayLike, highs: ArrayLike, css: str) -> None:
        """The area between two lines; points where either is NaN are left out."""
        upper = list(self._points(xs, highs))
        lower = list(self._points(xs, lows))
        pairs = [(u, v) for u, v in zip(upper, lower, strict=True) if u is not None and v is not None]
        if len(pairs) < 2:
            return
        shape = "M" + "L".join(f"{u[0]} {u[1]}" for u, _ in pairs)
        shape += "".join(f"L{v[0]} {v[1]}" for _, v in reversed(pairs)) + "Z"
        self._path(shape, f"area {css}")

    def bars(self, starts: ArrayLike, ends: ArrayLike, lows: ArrayLike, highs: ArrayLike, css: str) -> None:
        """Upright bars; those of no height are left out."""
        left, right = self.x.at(starts), self.x.at(ends)
        bottom, top = self.y.at(lows), self.y.at(highs)
        shape = [
            f"M{_number(1000 * a)} {_number(1000 * (1 - b))}V{_number(1000 * (1 - c))}"
            f"H{_number(1000 * d)}V{_number(1000 * (1 - b))}Z"
            for a, d, b, c in zip(left, right, bottom, top, strict=True)
            if c > b
        ]
        self._path("".join(shape), f"area {css}")

    def dots(self, xs: ArrayLike, ys: ArrayLike, css: str) -> None:
        """Round dots of a fixed size whatever the stretch: strokes of no length with round ends."""
        shape = "".join(f"M{p[0]} {p[1]}h0" for p in self._points(xs, ys) if p is not None)
        self._path(shape, f"dots {css}")

    def whiskers(self, xs: ArrayLike, lows: ArrayLike, highs: ArrayLike, css: str) -> None:
        pairs = zip(self._points(xs, lows), self._points(xs, highs), strict=True)
        self._path("".join(f"M{a[0]} {a[1]}V{b[1]}" for a, b in pairs if a and b), f"line {css}")

    def hline(self, y: float, css: str, text: str = "") -> None:
        """A level across the plot, with its name at the right end."""
        place = _number(1000 * (1 - self.y.one(y)))
        self._path(f"M0 {place}H1000", f"line {css}")
        if text:
            self.text(self.x.high, y, text, f"end above {css}")

    def vline(self, x: float, css: str) -> None:
        self._path(f"M{_number(1000 * self.x.one(x))} 0V1000", f"line {css}")

    def vband(self, start: float, end: float, css: str) -> None:
        left, right = 1000 * self.x.one(start), 1000 * self.x.one(end)
        self._path(f"M{_number(left)} 0H{_number(right)}V1000H{_number(left)}Z", f"area {css}")

    def text(self, x: float, y: float, text: str, css: str = "") -> None:
        """Words over the drawing at a place in the plot's own values."""
        place = f"left:{100 * self.x.one(x):.2f}%;bottom:{100 * self.y.one(y):.2f}%"
        self._texts.append(Markup('<span class="note {}" style="{}">{}</span>').format(css, place, text))

    def html(self) -> Markup:
        grid = "".join(f'<path class="grid" d="M0 {_number(1000 * (1 - self.y.one(t)))}H1000"/>' for t in self.y.ticks)
        y_labels = Markup("").join(
            Markup('<span style="bottom:{:.2f}%">{}</span>').format(100 * self.y.one(t), self.y.format(t))
            for t in self.y.ticks
        )
        x_labels = Markup("")
        if self.show_x:
            x_labels = Markup('<div class="x">{}</div>').format(_x_labels(self.x))
        title = Markup('<div class="chart-title">{}</div>').format(self.title) if self.title else Markup("")
        return Markup(
            '<div class="chart {kind}" role="img" aria-label="{says}">{title}'
            '<div class="y" style="height:{height}px">{y}</div>'
            '<div class="plot" style="height:{height}px">'
            '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true" focusable="false">{drawn}</svg>'
            "{texts}</div>{x}</div>"
        ).format(
            kind=self.kind, says=self.says, title=title, height=self.height_px, y=y_labels, x=x_labels,
            drawn=Markup(grid + "".join(self._drawn)),  # noqa: S704 - numbers and class names of ours only
            texts=Markup("").join(self._texts),
        )  # fmt: skip


def _x_labels(axis: Axis) -> Markup:
    """Every second label gives way on narrow pages; the last one ends at the edge rather than past it."""
    found = []
    for index, tick in enumerate(axis.ticks):
        place = axis.one(tick)
        css = ("minor" if index % 2 else "") + (" last" if place > 0.96 else "") + (" first" if place < 0.03 else "")
        label = escape(axis.format(tick))
        found.append(Markup('<span class="{}" style="left:{:.2f}%">{}</span>').format(css.strip(), 100 * place, label))
    return Markup("").join(found)


def stack(layers: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """Lower and upper edges of layers put on top of each other."""
    base = np.zeros_like(layers[0]) if layers else np.zeros(0)
    edges = []
    for layer in layers:
        edges.append((base, base + layer))
        base = base + layer
    return edges
