"""The progress bar of the training: loss, step time, time left. In a pipe, a line every tenth."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vlkern.demo.training import Budget, History


class Bar:
    """Context manager; `update` fits `training.train`."""

    def __init__(self, budget: Budget) -> None:
        self._tenths = 0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[ms]:.0f} ms a step  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(),
        )
        self._live = self._progress.console.is_terminal
        self._task = self._progress.add_task("training", total=1.0, loss=float("nan"), ms=float("nan"))

    def update(self, history: History, progress: float) -> None:
        """Show the mean of the last steps."""
        recent = slice(-20, None)
        loss = sum(history.losses[recent]) / len(history.losses[recent])
        ms = 1e3 * sum(history.seconds[recent]) / len(history.seconds[recent])
        if self._live:
            self._progress.update(self._task, completed=min(progress, 1.0), loss=loss, ms=ms)
        elif int(10 * progress) > self._tenths:
            self._tenths = int(10 * progress)
            print(
                f"          {10 * self._tenths:3} %  step {len(history.losses)}  loss {loss:.3f}  {ms:.0f} ms a step",
                flush=True,
            )

    def __enter__(self) -> "Bar":
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._progress.stop()
