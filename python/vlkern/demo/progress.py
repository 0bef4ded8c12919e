"""The progress bar of the training: loss, step time, time left. In a pipe, a line every tenth."""

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vlkern._progress import LiveBar, say
from vlkern.demo.training import History


class Bar(LiveBar):
    """Context manager; `update` fits `training.train`."""

    def __init__(self) -> None:
        self._tenths = 0
        loss = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[ms]:.0f} ms a step  left")
        left = TimeRemainingColumn(elapsed_when_finished=True)
        columns = TextColumn("training"), BarColumn(), TaskProgressColumn(), loss, left
        super().__init__(*columns, total=1.0, loss=float("nan"), ms=float("nan"))

    def update(self, history: History, progress: float) -> None:
        """Show the mean of the last steps."""
        recent = slice(-20, None)
        loss = sum(history.losses[recent]) / len(history.losses[recent])
        ms = 1e3 * sum(history.seconds[recent]) / len(history.seconds[recent])
        progress = min(progress, 1.0)
        self.draw(completed=progress, loss=loss, ms=ms)
        if not self.live and int(10 * progress) > self._tenths:
            self._tenths = int(10 * progress)
            say("", f"{10 * self._tenths:3} %  step {len(history.losses)}  loss {loss:.3f}  {ms:.0f} ms a step")
