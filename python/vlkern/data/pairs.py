"""Image-text pairs from WebDataset shards: tar files of `key.webp` (or .jpg, .jpeg, .png) and `key.json`."""

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset

from vlkern.data.images import decode_image
from vlkern.errors import UserError

_IMAGES = ("webp", "jpg", "jpeg", "png")
_UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error)


class DataError(UserError):
    """Data that cannot be read; the message is one line and names the file."""


class Pair(NamedTuple):
    """One picture, as [3, S, S] uint8 and as the file it came from, with at least one caption."""

    key: str
    pixels: torch.Tensor
    captions: tuple[str, ...]
    file: bytes


@dataclass
class Pairs:
    """A set held in memory: `pixels` [N, 3, S, S] uint8, captions and file of each picture, and what was left out."""

    keys: list[str]
    pixels: torch.Tensor
    captions: list[tuple[str, ...]]
    files: list[bytes]
    skipped: list[str]

    def __len__(self) -> int:
        """N, the number of pictures."""
        return len(self.keys)


def _verify(path: Path) -> None:
    """Walk the headers of a tar. Python's tarfile takes a damaged header for the end: only zeros really are the end."""
    if not path.is_file():
        raise DataError(f"{path}: no such shard")
    try:
        with tarfile.open(path) as tar:
            tar.getmembers()
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{path}: damaged or cut off at byte {tar.offset}")
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable tar file ({error})") from error


def _decode(sample: dict[str, Any], size: int) -> Pair:
    """A raw sample as a pair. Raises ValueError, OSError or SyntaxError (all of Pillow's) when a part is bad."""
    image = next((sample[suffix] for suffix in _IMAGES if suffix in sample), None)
    if image is None:
        raise ValueError(f"no image ({', '.join(_IMAGES)})")
    if "json" not in sample:
        raise ValueError("no .json")
    record = json.loads(sample["json"])
    captions = record.get("captions") if isinstance(record, dict) else None
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError("the .json needs `captions`, a list of at least one string")
    return Pair(sample["__key__"], decode_image(image, size), tuple(captions), image)


def read_pairs(
    shards: Sequence[str | Path], size: int, *, bad_limit: int = 10, skipped: list[str] | None = None
) -> Iterator[Pair]:
    """Read local shards in order, one pair at a time.

    Args:
        shards: paths of tar files.
        size: side S of the square to which pictures are squeezed, in pixels.
        bad_limit: how many unreadable samples are left out before this becomes an error.
        skipped: a list that receives one line for each sample left out.

    Yields:
        Pair(key, pixels [3, S, S] uint8, captions, file).

    Raises:
        DataError: a shard is missing or damaged, or more than `bad_limit` samples are bad. Names the file.
    """
    skipped = [] if skipped is None else skipped
    for path in map(Path, shards):
        _verify(path)
        samples = webdataset.WebDataset([str(path.absolute())], shardshuffle=False, empty_check=False)
        try:
            for sample in samples:
                try:
                    pair = _decode(sample, size)
                except (ValueError, OSError, SyntaxError) as error:
                    skipped.append(f"{path}: sample {sample['__key__']}: {' '.join(str(error).split())}")
                    if len(skipped) > bad_limit:
                        raise DataError(f"more than {bad_limit} bad samples; the last: {skipped[-1]}") from error
                else:
                    yield pair
        except _UNREADABLE as error:
            raise DataError(f"{path}: damaged ({error})") from error


def load_pairs(shards: Sequence[str | Path], size: int, *, bad_limit: int = 10) -> Pairs:
    """Read local shards into memory: N pictures take 3 N S^2 bytes. Arguments and errors as `read_pairs`.

    Raises:
        DataError: also when there is no pair at all.
    """
    skipped: list[str] = []
    pairs = list(read_pairs(shards, size, bad_limit=bad_limit, skipped=skipped))
    if not pairs:
        raise DataError(f"{', '.join(map(str, shards))}: no image-text pairs")
    keys, pixels, captions, files = zip(*pairs, strict=True)
    return Pairs(list(keys), torch.stack(pixels), list(captions), list(files), skipped)
