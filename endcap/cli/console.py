"""How commands speak: progress on a terminal, plain lines elsewhere, one JSON document with ``--json``.

Everything for people goes to standard error when ``--json`` asks for a document on standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Console", "Page", "Task"]

_PLAIN_LINE_EVERY_S = 5.0
_PLAIN_WIDTH = 200
"""Tables in a file or a pipe are not broken to a terminal's width."""


@dataclass
class Task:
    """Something that takes a while. ``update`` says how far it is; cheap to call often."""

    _progress: Progress | None
    _title: str
    _console: RichConsole
    _id: int = 0
    _last_s: float = 0.0

    def update(self, text: str, *, done: float | None = None, total: float | None = None, now: bool = False) -> None:
        """``now``: worth a plain line of its own, however soon after the last."""
        if self._progress is not None:
            self._progress.update(self._id, description=f"{self._title}  [dim]{text}", completed=done, total=total)  # type: ignore[arg-type]
        elif now or time.monotonic() - self._last_s >= _PLAIN_LINE_EVERY_S:
            self._last_s = time.monotonic()
            self._console.print(f"  {self._title}: {text}", markup=False, highlight=False)


@dataclass(frozen=True)
class Page:
    """What is drawn as one: lines, each with its style, and a table under them where it has rows."""

    lines: tuple[tuple[str, str | None], ...]
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()


class Console:
    """``json_output``: the command will end in one JSON document; people's lines then go to standard error."""

    has_answered: ClassVar[bool] = False
    """Whether this process has written its JSON document."""

    def __init__(self, *, json_output: bool = False) -> None:
        self.json_output = json_output
        self._rich = RichConsole(stderr=json_output, highlight=False, soft_wrap=True)
        if not self._rich.is_terminal:
            self._rich.width = max(self._rich.width, _PLAIN_WIDTH)
        self._errors = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str, *, style: str | None = None) -> None:
        self._rich.print(Text(text, style=style or ""))

    def heading(self, text: str) -> None:
        self._rich.print(Text(text, style="bold"))

    def good(self, text: str) -> None:
        self._rich.print(Text("  ok    ", style="green").append(Text(text, style="default")))

    def bad(self, text: str) -> None:
        self._rich.print(Text("  NOT   ", style="red bold").append(Text(text, style="default")))

    def error(self, text: str) -> None:
        self._errors.print(Text("error: ", style="red bold").append(Text(text, style="default")))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self._rich.print(_table(columns, rows))

    def page(self, page: Page) -> None:
        self._rich.print(_drawn(page))

    @contextmanager
    def live(self) -> Iterator[Callable[[Page], None] | None]:
        """Draws a page anew in its place; the last one stays. None where there is no terminal."""
        if not self._rich.is_terminal:
            yield None
            return
        with Live(console=self._rich, auto_refresh=False) as live:
            yield lambda page: live.update(_drawn(page), refresh=True)

    def result(self, document: Mapping[str, object] | Sequence[object]) -> None:
        """The machine's answer, on standard output; only with ``--json``. One a command: an error is then told to
        people alone.
        """
        if self.json_output:
            Console.has_answered = True
            sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")
            sys.stdout.flush()

    @contextmanager
    def task(self, title: str) -> Iterator[Task]:
        """Progress on a terminal; elsewhere a plain line now and then."""
        if not self._rich.is_terminal:
            self.say(f"  {title} ...")
            yield Task(None, title, self._rich, _last_s=time.monotonic())
            return
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
            console=self._rich, transient=True,
        ) as progress:  # fmt: skip
            yield Task(progress, title, self._rich, _id=progress.add_task(title, total=None))


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(table.columns):  # where a terminal is narrow, words wrap and no label or number
        column.no_wrap = not any(" " in str(row[index]) for row in rows)
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    return table


def _drawn(page: Page) -> RenderableType:
    lines = [Text(text, style=style or "") for text, style in page.lines]
    return Group(*lines, *([_table(page.columns, page.rows)] if page.rows else []))
