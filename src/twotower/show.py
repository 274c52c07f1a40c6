"""What a person sees: short tables that fit a terminal, and a line while something takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

console = Console(highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns whose name begins with '>' are right-aligned."""
    out = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for name in columns:
        right = name.startswith(">")
        out.add_column(
            name.lstrip(">"), justify="right" if right else "left", overflow="fold",
            no_wrap=right,
        )  # fmt: skip
    for row in rows:
        out.add_row(*(value if isinstance(value, str) else f"{value}" for value in row))
    console.print(out)


@contextmanager
def long_work(title: str) -> Iterator[Callable[[str, float], None]]:
    """Show a bar while something takes long; yields what is told of stage and share done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0)

        def report(stage: str, share: float) -> None:
            progress.update(task, description=f"{title}: {stage}", completed=share)

        yield report


def facts(title: str, values: dict[str, Any]) -> None:
    """Print what a step did, one fact a line."""
    out = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    out.add_column(style="dim")
    out.add_column(overflow="fold")
    for name, value in values.items():
        out.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(out)
