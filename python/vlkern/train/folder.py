"""The folder of a run, and who may write there."""

import fcntl
import json
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from vlkern._files import reason
from vlkern.errors import UserError

_LOCK = ".lock"


class RunFolder:
    """`path`, which this process alone writes to until it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._made: list[Path] = []

    def begin(self) -> None:
        """Take a new folder, or an empty one; files whose names begin with a dot do not count.

        Raises:
            UserError: something is there, or it cannot be written.
        """
        self._take()
        if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            hint = "continue it with --resume, or choose another" if self._config.exists() else "choose another"
            raise UserError(f"--out {self.path}: the folder is not empty ({hint})")

    def resume(self) -> dict[str, Any]:
        """Take a folder where a run began: its config.json.

        Raises:
            UserError: there is none.
        """
        if not self._config.is_file():
            raise UserError(f"--resume: nothing to resume in {self.path} (no config.json)")
        self._take()
        try:
            config = json.loads(self._config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self._config}: cannot read ({reason(error)})") from error
        if not isinstance(config, dict):
            raise UserError(f"{self._config}: expected an object, got {type(config).__name__}")
        return config

    def leave(self) -> None:
        """Remove the folders that were made for a run which wrote nothing."""
        with suppress(OSError):
            if self._made and [entry.name for entry in self.path.iterdir()] == [_LOCK]:
                (self.path / _LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    def _take(self) -> None:
        try:
            missing = list(takewhile(lambda folder: not folder.exists(), (self.path, *self.path.parents)))
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = missing
            # A record lock goes with the process, however it ends, and forked workers do not inherit it.
            self._lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot write there ({reason(error)})") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {self.path}: another process is training there") from error
