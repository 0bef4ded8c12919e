"""What a user sees while the model trains: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: seconds between two lines
_PAUSE = 10.0


def say(label: str, text: str) -> None:
    """A line of a report, as the other commands write it."""
    print(f"{label:<10}{text}", flush=True)


class Bar:
    """Context manager around the steps from `step` to `steps`; silent unless `visible`."""

    def __init__(self, step: int, steps: int, *, visible: bool) -> None:
        self._steps, self._visible, self._said = steps, visible, -_PAUSE
        console = Console()
        self._live = visible and console.is_terminal
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, text="")

    def advance(self, step: int) -> None:
        """After every step."""
        if self._live:
            self._bar.update(self._task, completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """After a step that is logged."""
        text = f"loss {record['loss']:.4f}  {record['examples_per_second']:.0f} pairs/s"
        now, last = time.monotonic(), record["step"] == self._steps
        if self._live:
            self._bar.update(self._task, text=text)
        elif self._visible and (last or now - self._said >= _PAUSE):
            self._said = now
            say("", f"step {record['step']}/{self._steps}  {text}")

    def __enter__(self) -> "Bar":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()
