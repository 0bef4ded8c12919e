"""Pictures to embed: those of a folder, or of WebDataset shards. Reading them is thread-safe."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from vlkern.data import DataError, PairShards, decode_image
from vlkern.data.images import Size, check_size
from vlkern.data.pairs import IMAGES
from vlkern.errors import UserError


class Stamp(NamedTuple):
    """Time of the last change in nanoseconds, and size in bytes: other contents, another stamp."""

    changed: int
    size: int


class Pictures(Protocol):
    """A sequence of pictures, each with a name of its own."""

    place: str

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """Where it comes from."""

    def caption(self, index: int) -> str:
        """What a reader sees below it."""

    def stamp(self, index: int) -> Stamp:
        """Of the file that holds it."""

    def file(self, index: int) -> bytes:
        """As it is stored. Raises ValueError or OSError if it cannot be read."""

    def pixels(self, index: int) -> torch.Tensor:
        """[3, H, W] uint8. Raises ValueError if it cannot be read."""


def walk(folder: Path) -> Iterator[str]:
    """Relative paths of all pictures below, by name; hidden files and folders and links to folders are left alone."""
    endings = tuple(f".{suffix}" for suffix in IMAGES)
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield os.path.relpath(os.path.join(here, name), folder)


class FolderPictures:
    """All pictures in a folder and the folders below it, known by their endings (.jpg, .png, .webp, ...).

    Raises:
        UserError: no such folder, or no picture in it.
    """

    def __init__(self, folder: str | Path, image_size: Size, *, resample: str = "bilinear") -> None:
        self.folder, self.place = Path(folder), str(folder)
        self._size, self._resample = image_size if callable(image_size) else check_size(image_size), resample
        if not self.folder.is_dir():
            raise UserError(f"--images {folder}: {'not a folder' if self.folder.exists() else 'no such folder'}")
        self.paths = list(walk(self.folder))
        if not self.paths:
            raise UserError(f"--images {folder}: no pictures there ({', '.join(IMAGES)})")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path from the folder on."""
        return self.paths[index]

    def caption(self, index: int) -> str:
        """Path from the folder on."""
        return self.paths[index]

    def label(self, index: int) -> str:
        """The folder right below the one that was given: the class of the picture.

        Raises:
            UserError: the picture lies outside of such folders.
        """
        first, *rest = Path(self.paths[index]).parts
        if not rest:
            raise UserError(f"--images {self.folder}: expected a folder for each class, got {first} beside them")
        return first

    def stamp(self, index: int) -> Stamp:
        """Of the file; one that has gone has none."""
        try:
            status = (self.folder / self.paths[index]).stat()
        except OSError:
            return Stamp(-1, -1)
        return Stamp(status.st_mtime_ns, status.st_size)

    def file(self, index: int) -> bytes:
        """The file."""
        return (self.folder / self.paths[index]).read_bytes()

    def pixels(self, index: int) -> torch.Tensor:
        """[3, H, W] uint8."""
        try:
            return decode_image(self.file(index), self._size, resample=self._resample)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error


class ShardPictures:
    """The pictures of shards, with their captions. Unreadable ones are told, not replaced by others."""

    def __init__(self, shards: PairShards) -> None:
        self.shards = shards
        self.place = ", ".join(map(str, shards.paths))
        status = [path.stat() for path in shards.paths]
        self._stamp = Stamp(max(s.st_mtime_ns for s in status), sum(s.st_size for s in status))

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        """Its number and the key in the shard; a key alone may be there several times."""
        return f"{self.shards.key(index)} ({index})"

    def caption(self, index: int) -> str:
        """The first caption."""
        return self.shards.captions_of(index)[0]

    def stamp(self, index: int) -> Stamp:
        """Of the shards, as one."""
        return self._stamp

    def file(self, index: int) -> bytes:
        """The picture's member of the shard."""
        pair, lines = self.shards.read(index)
        if pair is None or lines:
            raise ValueError(lines[index])
        return pair.file

    def pixels(self, index: int) -> torch.Tensor:
        """[3, H, W] uint8."""
        pair, lines = self.shards.read(index)
        if pair is None or lines:
            raise ValueError(lines[index])
        return pair.pixels


def require_some(pictures: Pictures, kept: int, skipped: list[str]) -> None:
    """Raise UserError if not one picture could be read."""
    if not kept:
        raise UserError(f"{pictures.place}: not one of {len(pictures)} pictures can be read; the first: {skipped[0]}")


def open_pictures(
    images: Path | None,
    data: list[Path] | None,
    image_size: Size,
    *,
    resample: str,
    caption_key: str | None = None,
) -> FolderPictures | ShardPictures:
    """What --images or --data names.

    Raises:
        UserError: both or neither is given, or there is nothing to be read.
    """
    if (images is None) == (data is None):
        raise UserError(f"give --images DIR or --data SHARDS, got {'both' if images else 'neither'}")
    if images is not None:
        return FolderPictures(images, image_size, resample=resample)
    try:
        return ShardPictures(PairShards(data or [], image_size, resample=resample, caption_key=caption_key))
    except DataError as error:
        raise DataError(f"--data: {error}") from error
