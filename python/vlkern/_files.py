"""Files that are whole or not there."""

import contextlib
import os
from pathlib import Path

from vlkern.errors import UserError


def reason(error: BaseException) -> str:
    """Why writing or reading failed, in one line; what the operating system said first, if it said something."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Replace a file at once: all of it is written under another name first.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({reason(error)})") from error


def check_folder(option: str, folder: Path) -> None:
    """Make the folder and see that it takes files: said before the work, not after it. Raises UserError if not."""
    probe = folder / f".vlkern-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot write there ({error.strerror})") from error


def check_file(option: str, path: Path) -> None:
    """See that a file can be written under this name. Raises UserError if not."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, expected a file name")
    check_folder(option, path.parent)
