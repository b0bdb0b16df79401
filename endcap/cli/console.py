"""How commands speak: progress on a terminal, plain lines elsewhere, one JSON document with ``--json``.

Everything for people goes to standard error when ``--json`` asks for a document on standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Console", "Task"]

_PLAIN_LINE_EVERY_S = 5.0


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


class Console:
    """``json_output``: the command will end in one JSON document; people's lines then go to standard error."""

    def __init__(self, *, json_output: bool = False) -> None:
        self.json_output = json_output
        self._rich = RichConsole(stderr=json_output, highlight=False, soft_wrap=True)
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
        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
        self._rich.print(table)

    def result(self, document: Mapping[str, object] | Sequence[object]) -> None:
        """The machine's answer, on standard output; only with ``--json``."""
        if self.json_output:
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
