"""What a long command shows: lines with a label, and a bar that is drawn on terminals only."""

from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn

#: Seconds between two lines where there is no bar.
PAUSE = 10.0

B = TypeVar("B", bound="LiveBar")


def say(label: str, text: str) -> None:
    """A line of a report."""
    print(f"{label:<10}{text}", flush=True)


class LiveBar:
    """Context manager around a bar with these columns; `live` says whether it is drawn. Fields are the columns'."""

    def __init__(
        self, *columns: ProgressColumn, total: float, visible: bool = True, transient: bool = False, **fields: Any
    ) -> None:
        console = Console()
        self.live = visible and console.is_terminal
        self._bar = Progress(*columns, console=console, transient=transient)
        self._task = self._bar.add_task("", total=total, **fields)

    def draw(self, **fields: Any) -> None:
        """Change `completed` or the fields."""
        if self.live:
            self._bar.update(self._task, **fields)

    def __enter__(self: B) -> B:
        if self.live:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self._bar.stop()
