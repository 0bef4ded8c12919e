"""What a user sees while the model trains: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from vlkern._progress import PAUSE, LiveBar, say


class Bar(LiveBar):
    """Context manager around the steps from `step` to `steps`; silent unless `visible`."""

    def __init__(self, step: int, steps: int, *, visible: bool) -> None:
        self._steps, self._visible, self._said = steps, visible, -PAUSE
        left = TextColumn("{task.fields[text]}  left"), TimeRemainingColumn(elapsed_when_finished=True)
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(), *left
        super().__init__(*columns, visible=visible, total=steps, completed=step, text="")

    def advance(self, step: int) -> None:
        """After every step."""
        self.draw(completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """After a step that is logged."""
        text = f"loss {record['loss']:.4f}  {record['examples_per_second']:.0f} pairs/s"
        now, last = time.monotonic(), record["step"] == self._steps
        self.draw(text=text)
        if self._visible and not self.live and (last or now - self._said >= PAUSE):
            self._said = now
            say("", f"step {record['step']}/{self._steps}  {text}")
