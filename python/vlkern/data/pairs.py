"""Image-text pairs in WebDataset shards (tars of `key.webp` and `key.json`, say): what a pair is, and small sets."""

import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset

from vlkern.data.images import decode_image
from vlkern.errors import UserError

#: Suffixes of pictures; of several in one sample the first in this order is taken.
IMAGES = ("webp", "jpg", "jpeg", "png", "gif", "bmp", "tif", "tiff", "avif")
_UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error)


class DataError(UserError):
    """Data that cannot be read; the message is one line and names the file."""


class Pair(NamedTuple):
    """One picture, as [3, H, W] uint8 and as the file it came from, with at least one caption."""

    key: str
    pixels: torch.Tensor
    captions: tuple[str, ...]
    file: bytes

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


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


def image_suffix(suffixes: Iterable[str]) -> str:
    """The member of a sample that holds its picture. Raises ValueError if there is none."""
    present = set(suffixes)
    found = next((suffix for suffix in IMAGES if suffix in present), None)
    if found is None:
        raise ValueError(f"no image ({', '.join(IMAGES)})")
    return found


def caption_suffix(suffixes: Iterable[str], key: str | None) -> str:
    """The member of a sample that holds its captions: .txt, or else .json. A `key` is looked up in the .json."""
    present = set(suffixes)
    if key is None and "txt" in present:
        return "txt"
    if "json" not in present:
        raise ValueError("no .json" + (" or .txt" if key is None else ""))
    return "json"


def parse_record(data: bytes) -> dict[str, Any]:
    """A .json member. Raises ValueError unless it is an object."""
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError("the .json must be an object")
    return record


def parse_captions(suffix: str, data: bytes, key: str | None) -> tuple[str, ...]:
    """The captions of a sample, at least one.

    Args:
        suffix: txt or json.
        data: contents of that member.
        key: where they are in the .json, with dots between the steps (`names.de`); there may be a string, a list of
            strings, or an object whose values are these. None is `captions`, or else `caption`.

    Raises:
        ValueError: nothing there, something else there, an empty caption or one that has no UTF-8 form.
    """
    if suffix == "txt":
        captions, place = [data.decode("utf-8").strip()], "the .txt needs a caption"
    else:
        found: Any = parse_record(data)
        steps = key.split(".") if key else ["captions" if "captions" in found else "caption"]
        for step in steps:
            found = found.get(step) if isinstance(found, dict) else None
        captions = _strings(found)
        place = f"the .json needs `{key or 'captions'}`, a list of at least one string"
    if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError(place)
    for caption in captions:
        caption.encode("utf-8")  # \ud800 is valid JSON, but no text
    return tuple(captions)


def _strings(found: Any) -> list[Any]:
    """A string, a list or an object of such as one flat list."""
    if isinstance(found, dict):
        return [caption for value in found.values() for caption in _strings(value)]
    return found if isinstance(found, list) else [] if found is None else [found]


def _decode(sample: Mapping[str, Any], size: int) -> Pair:
    """A raw sample as a pair. Raises ValueError when a part is bad."""
    image, text = image_suffix(sample), caption_suffix(sample, None)
    captions = parse_captions(text, sample[text], None)
    return Pair(sample["__key__"], decode_image(sample[image], size), captions, sample[image])


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
                except ValueError as error:
                    skipped.append(f"{path}: sample {sample['__key__']}: {' '.join(str(error).split())}")
                    if len(skipped) > bad_limit:
                        raise DataError(f"more than {bad_limit} bad samples; the last: {skipped[-1]}") from error
                else:
                    yield pair
        except DataError:
            raise
        except (*_UNREADABLE, ValueError) as error:  # ValueError: a name comes twice
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
