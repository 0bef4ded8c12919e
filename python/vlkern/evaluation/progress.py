"""What a user sees while embeddings are computed: a bar on a terminal, a line now and then elsewhere."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from vlkern._progress import PAUSE, LiveBar, say


class Bar(LiveBar):
    """Context manager around the embedding of `total` things; `update(done)` fits `Encoder`'s `show`."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._said = label, total, time.monotonic()
        columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()
        super().__init__(*columns, total=total, transient=True)

    def update(self, done: int) -> None:
        """After a batch."""
        self.draw(completed=done)
        if not self.live and time.monotonic() - self._said >= PAUSE:
            self._said = time.monotonic()
            say("", f"{self._label} {done}/{self._total}")
