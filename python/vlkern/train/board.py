"""TensorBoard: the numbers of log.jsonl as curves, where the package is installed."""

from pathlib import Path
from typing import Any


class Board:
    """Curves in `folder`, continued after step `step`. Does nothing but say why when tensorboard is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self.hint = ""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
            self.hint = "no TensorBoard curves: tensorboard is not installed (pip install 'vlkern[train]')"
        else:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """One point of each curve."""
        if self._writer:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """The end."""
        if self._writer:
            self._writer.close()
