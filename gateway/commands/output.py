"""How commands print: tables for people, one JSON document for scripts, messages on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_WIDTH_IN_A_PIPE = 160


def console() -> Console:
    """Rich's console: as wide as the terminal or COLUMNS; into a file or a pipe wide enough for our tables."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, soft_wrap=False, width=None if known else _WIDTH_IN_A_PIPE)


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(message: str) -> None:
    """A line for the person at the terminal; never mixed into --json output."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, whole: Collection[str] = ()) -> None:
    """`whole` are columns whose cells stay on one line, to be copied and searched for, however narrow the terminal."""
    if title:
        console().print(title, markup=False)
    made = Table(show_lines=False, pad_edge=False)
    for column in columns:
        longest = max((len(str(row[columns.index(column)])) for row in rows), default=0)
        is_whole = column in whole
        made.add_column(column, overflow="fold", no_wrap=is_whole, min_width=longest if is_whole else None)
    for row in rows:
        made.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    console().print(made, crop=not whole)


@contextmanager
def progress_bar(what: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while the block runs; yields what is to be called with (done, total)."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class WorkBar:
    """A bar on standard error over work in parts of unequal size, with the share that is done and the time left."""

    def __init__(self, bar: Progress, total: float, *, hidden: bool) -> None:
        self._bar, self._hidden = bar, hidden
        self._task = bar.add_task("", total=total)

    def show(self, text: str, completed: float) -> None:
        self._bar.update(self._task, description=text, completed=completed)

    def say(self, message: str) -> None:
        """A line above the bar."""
        if self._hidden:
            say(message)
        else:
            self._bar.console.print(printable(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def work_bar(total: float, *, hidden: bool) -> Iterator[WorkBar]:
    """A `WorkBar` while the block runs; nothing but what it is told to say where it is hidden."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # Windows of a large case take seconds: a speed over half a minute would jump.
    made = Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True, speed_estimate_period=600.0)
    with made as bar:
        yield WorkBar(bar, total, hidden=hidden)


def print_json_line(document: Any) -> None:
    """One of several documents, each on a line of its own, at once."""
    sys.stdout.write(json.dumps(document, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def printable(text: str) -> str:
    """Text of unknown origin for a terminal: control characters (escape sequences) are made visible, not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def local(at: datetime | None) -> str:
    """A time in the reader's own zone, to the second."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else ""


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)
