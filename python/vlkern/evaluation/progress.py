"""What a user sees while embeddings are computed: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: seconds between two lines
_PAUSE = 10.0


def say(label: str, text: str) -> None:
    """A line of a report, as the other commands write it."""
    print(f"{label:<10}{text}", flush=True)


class Bar:
    """Context manager around the embedding of `total` things; `update(done)` fits `Encoder`'s `show`."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._said = label, total, time.monotonic()
        console = Console()
        self._live = console.is_terminal
        columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(label, total=total)

    def update(self, done: int) -> None:
        """After a batch."""
        if self._live:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._said >= _PAUSE:
            self._said = time.monotonic()
            say("", f"{self._label} {done}/{self._total}")

    def __enter__(self) -> "Bar":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()
