"""What a run writes down: log.jsonl, TensorBoard curves, and the bar."""

import json
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vlkern._files import reason, write_file
from vlkern._progress import say
from vlkern.errors import UserError
from vlkern.train.board import Board
from vlkern.train.progress import Bar


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class JsonLines:
    """The log at `path`, continued after step `step`; what was written of later steps is cut off.

    So it has no gaps and no repetitions, however often the run was killed and resumed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        try:
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                write_file(path, "".join(line + "\n" for line in lines if _step(line) <= step).encode())
            self._out = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot write ({reason(error)})") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append; from then on it survives the end of this process."""
        try:
            self._out.write(json.dumps(record) + "\n")
            self._out.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot write ({reason(error)})") from error

    def sync(self) -> None:
        """Make it survive a power cut."""
        os.fsync(self._out.fileno())

    def close(self) -> None:
        """The end."""
        self._out.close()


def _step(line: str) -> float:
    """Of a record; infinite for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Log:
    """All of them together, from step `step` to `steps`; on ranks other than the first it does nothing."""

    def __init__(self, folder: Path, step: int, steps: int, *, first: bool) -> None:
        self._first = first
        if first:
            self._lines = JsonLines(folder / "log.jsonl", step)
            self._board = Board(folder / "tensorboard", step)
            if self._board.hint:
                say("", self._board.hint)
        self._bar = Bar(step, steps, visible=first)

    def advance(self, step: int) -> None:
        """After every step."""
        self._bar.advance(step)

    def write(self, record: dict[str, Any]) -> None:
        """After a step that is logged."""
        if self._first:
            self._lines.write(record)
            self._board.write(record)
        self._bar.show(record)

    def sync(self) -> None:
        """Before a checkpoint of the same step becomes complete."""
        if self._first:
            self._lines.sync()

    def __enter__(self) -> "Log":
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, value, trace)
        if self._first:
            self._lines.close()
            self._board.close()
