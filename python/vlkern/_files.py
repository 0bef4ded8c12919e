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


def _is_special(path: Path) -> bool:
    """Whether it is there and neither a file nor a folder: a pipe, a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_file(path: Path, content: bytes) -> None:
    """Replace a file at once: all of it is written under another name first.

    A link stays one, to the new file. A pipe or a device such as /dev/null is written to.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if _is_special(path):
            path.write_bytes(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from error


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except BaseException:  # an interrupt, too
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(path.parent)


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
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: cannot write there (Permission denied)")
    else:
        check_folder(option, Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent)
