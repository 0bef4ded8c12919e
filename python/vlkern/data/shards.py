"""Random access to the image-text pairs of local WebDataset shards, by an index of where their members lie."""

import functools
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlkern.data.cropping import RandomCrop
from vlkern.data.images import Size, check_resample, check_size, decode_image, open_image
from vlkern.data.pairs import DataError, Pair, caption_suffix, image_suffix, parse_captions, parse_record
from vlkern.data.tar import Damage, Member, Sample, packing, samples

#: One sample, 29 bytes. `key_end` counts in the keys of its shard, which are kept as one string of bytes.
_ENTRY = np.dtype(
    [
        ("image", "<i8"),
        ("caption", "<i8"),
        ("image_size", "<u4"),
        ("caption_size", "<u4"),
        ("is_text", "?"),
        ("key_end", "<u4"),
    ]
)
_OPEN_SHARDS = 64


class _File:
    """An open shard. Reads by position, so that forked processes and threads can share it."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises ValueError when they cannot be read, or the file has become shorter."""
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError as error:
            raise ValueError(f"the shard cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise ValueError(f"the shard ends inside it, {len(data)} of {size} bytes are there")
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files meant: each entry is a file, a folder (all its *.tar, by name) or a pattern such as train-*.tar.

    Raises:
        DataError: nothing given, a file that is not there or is there twice, a folder or pattern without shards.
    """
    found: list[Path] = []
    for entry in map(Path, [shards] if isinstance(shards, str | Path) else shards):
        if entry.is_dir():
            paths = sorted(entry.glob("*.tar"))
        elif entry.exists():
            paths = [entry]
        elif glob.has_magic(str(entry)):
            paths = sorted(map(Path, glob.glob(str(entry))))
        else:
            raise DataError(f"{entry}: no such shard")
        if not paths:
            raise DataError(f"{entry}: no shards there (*.tar)")
        found += paths
    if not found:
        raise DataError("shards must name at least one tar file, got none")
    path, times = Counter(path.resolve() for path in found).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: given {times} times")
    return found


def _size(member: Member) -> int:
    """In bytes, as an entry holds it. Raises ValueError if it cannot."""
    if member.size >= 1 << 32:
        raise ValueError("a member of more than 4 GiB")
    return member.size


class PairShards(Dataset[Pair]):
    """The pairs of local, uncompressed tar shards as a sequence: `shards[i]` reads and decodes number i.

    The headers are read once, when this is built (captions are read and checked then, too); what stays in memory is 29
    bytes a sample and its key, about 0.4 GB for 10 million. It can be pickled, and workers may be forked or spawned.

    A pair is what WebDataset calls a sample: members that follow each other and share their name up to its first dot.
    One is a picture (webp, jpg, png, gif, bmp, tiff, avif), one holds captions: .txt, or .json with `captions` (a
    list) or `caption` (a string).

    What cannot be used is left out and has a line in `skipped`: a sample without picture or caption, a caption that is
    not UTF-8, a damaged header, a shard that is cut off. So `len(shards)` and the lines of a new `skipped` add up to
    what the tars hold (where one damaged place hides several samples, it is one line). Pictures are decoded only when
    asked for. One that cannot be decoded keeps its number and gets a line, too; the next readable one in the order of
    the index (after the last comes the first) stands in for it, so `shards[i]` depends on i alone.

    Args:
        shards: tar files, folders of them, or patterns such as train-*.tar; see `find_shards`.
        image_size: (H, W) in pixels, or the side of a square, to which pictures are squeezed; or what gives the (H, W)
            of a picture of H x W pixels, such as `NaflexSize`; or a `RandomCrop`.
        bad_limit: how many lines `skipped` may have, over all shards, before that is an error.
        caption_key: where the captions are in the .json: `names.de`, or `names` for all languages there.
        captions: False takes every picture; no text is read, and "" is the caption of all.
        resample: as in `decode_image`.

    Raises:
        DataError: a shard is missing, compressed or no tar, there is no pair, or more than `bad_limit` are bad.
        ValueError: `image_size` or `resample` is none.

    Example:
        >>> shards = PairShards(clipart_mini() / "test.tar", 64)
        >>> len(shards), shards[0].pixels.shape, shards[0].caption
        (400, torch.Size([3, 64, 64]), 'source icon')
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        image_size: Size | RandomCrop,
        *,
        bad_limit: int = 10,
        caption_key: str | None = None,
        captions: bool = True,
        resample: str = "bilinear",
    ) -> None:
        check_resample(resample)
        if not isinstance(image_size, RandomCrop) and not callable(image_size):
            image_size = check_size(image_size)
        self.image_size = image_size
        self.paths = find_shards(shards)
        self.bad_limit, self.caption_key, self.resample = bad_limit, caption_key, resample
        self._captioned = captions
        self._left_out: list[str] = []
        self._unreadable: dict[int, str] = {}
        self._keys: list[bytes] = []
        self._reset()
        parts = [self._scan(shard) for shard in range(len(self.paths))]
        self._entries = np.concatenate(parts)
        self._first = np.cumsum([0, *map(len, parts)])
        if not len(self):
            wanted = "image-text pairs" if captions else "pictures"
            reason = f"; the first: {self._left_out[0]}" if self._left_out else ""
            raise DataError(f"{', '.join(map(str, self.paths))}: no {wanted}{reason}")

    def _reset(self) -> None:
        # An open file cannot be pickled, so each process that gets this dataset opens its own.
        self._file = functools.lru_cache(_OPEN_SHARDS)(lambda shard: _File(self.paths[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        """How many pairs the index holds."""
        return len(self._entries)

    def _leave_out(self, path: Path, what: str, damage: Sequence[Damage] = ()) -> None:
        near = f" ({'; '.join(map(str, damage))})" if damage else ""
        self._left_out.append(" ".join(f"{path}: {what}{near}".split()))
        if len(self._left_out) > self.bad_limit:
            raise DataError(f"more than {self.bad_limit} bad samples; the last: {self._left_out[-1]}")

    def _scan(self, shard: int) -> np.ndarray:
        """Read the headers of a shard: its entries; keys and reports are kept aside."""
        path, file = self.paths[shard], self._file(shard)
        head = file.read(0, min(512, os.fstat(file.descriptor).st_size))
        if packed := packing(head):
            raise DataError(f"{path}: compressed ({packed}); unpack it, an index needs plain tar files")
        entries: list[tuple[int, ...]] = []
        keys: list[bytes] = []
        size, damage = 0, []  # damage: what lies between the last good sample and this one
        for sample in samples(file.descriptor):
            damage += sample.damage if not sample.parts else []
            if not sample.parts:
                continue
            key = sample.key.encode("utf-8", "surrogateescape")
            try:
                entry = self._entry(sample, file)
            except ValueError as error:
                self._leave_out(path, f"sample {sample.key}: {error}", damage + sample.damage)
                damage = []
            else:
                for place in damage:
                    self._leave_out(path, str(place))
                damage = sample.damage
                size += len(key)
                keys.append(key)
                entries.append((*entry, size))
        if damage and damage[0].start == 0 and not entries:
            raise DataError(f"{path}: not a tar file ({damage[0]})")
        for place in damage:
            self._leave_out(path, str(place))
        self._keys.append(b"".join(keys))
        return np.array(entries, _ENTRY)

    def _entry(self, sample: Sample, file: _File) -> tuple[int, int, int, int, bool]:
        """Where the parts of a sample are. Raises ValueError if it is no pair."""
        if sample.twice:
            raise ValueError(f"{sample.twice} is there twice")
        image = sample.parts[image_suffix(sample.parts)]
        if not self._captioned:
            return image.offset, 0, _size(image), 0, True
        suffix = caption_suffix(sample.parts, self.caption_key)
        caption = sample.parts[suffix]
        sizes = _size(image), _size(caption)
        parse_captions(suffix, file.read(caption.offset, caption.size), self.caption_key)
        return image.offset, caption.offset, *sizes, suffix == "txt"

    def _place(self, index: int) -> tuple[int, int]:
        """Shard of a sample and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0 to {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return shard, index - int(self._first[shard])

    def key(self, index: int) -> str:
        """The key of sample number `index`: its name in the tar up to the first dot."""
        shard, number = self._place(index)
        start = int(self._entries["key_end"][index - 1]) if number else 0
        return self._keys[shard][start : int(self._entries["key_end"][index])].decode("utf-8", "surrogateescape")

    def _text(self, index: int) -> bytes:
        shard, _ = self._place(index)
        entry = self._entries[index]
        return self._file(shard).read(int(entry["caption"]), int(entry["caption_size"]))

    def captions_of(self, index: int) -> tuple[str, ...]:
        """All captions of sample number `index`, at least one."""
        if not self._captioned:
            return ("",)
        suffix = "txt" if self._entries["is_text"][index] else "json"
        return parse_captions(suffix, self._text(index), self.caption_key)

    def record(self, index: int) -> dict[str, Any]:
        """What else is known of sample number `index`: its .json; empty if its caption is a .txt."""
        return {} if self._entries["is_text"][index] else parse_record(self._text(index))

    def captions(self) -> list[str]:
        """The first caption of every sample. No picture is decoded."""
        return [self.captions_of(index)[0] for index in range(len(self))]

    @property
    def skipped(self) -> list[str]:
        """One line for everything that was left out so far: what, in which file, and the key."""
        return self._left_out + [self._unreadable[index] for index in sorted(self._unreadable)]

    @property
    def fingerprint(self) -> str:
        """16 letters that stand for the names, sizes and counts of the shards: other data, other letters."""
        counts = np.diff(self._first).tolist()
        parts = [f"{p.name} {p.stat().st_size} {n}" for p, n in zip(self.paths, counts, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _decode(self, index: int, size: Size | RandomCrop, draw: int) -> Pair:
        """Sample number `index` itself. Raises ValueError if it cannot be read."""
        shard, _ = self._place(index)
        entry = self._entries[index]
        file = self._file(shard).read(int(entry["image"]), int(entry["image_size"]))
        if isinstance(size, RandomCrop):
            pixels = size.cut(open_image(file), draw)
        else:
            pixels = decode_image(file, size, resample=self.resample)
        return Pair(self.key(index), pixels, self.captions_of(index), file)

    def read(self, index: int, size: Size | None = None, *, draw: int = 0) -> tuple[Pair | None, dict[int, str]]:
        """Sample number `index` or the next that can be read, and a line for each that could not, by its number.

        For worker processes, whose own `skipped` nobody sees: hand the lines to `note` in the process that reports. The
        pair is None when more than `bad_limit` in a row could not be read, or none at all. `size` takes the place of
        `image_size`, and may be a function of the picture's own, as in `decode_image`; `draw` says which `RandomCrop`.
        """
        self._place(index)
        lines: dict[int, str] = {}
        for i in range(index, index + min(self.bad_limit + 1, len(self))):
            number = i % len(self)
            try:
                return self._decode(number, self.image_size if size is None else size, draw), lines
            except ValueError as error:
                path = self.paths[self._place(number)[0]]
                lines[number] = " ".join(f"{path}: sample {self.key(number)}: {error}".split())
        return None, lines

    def note(self, lines: dict[int, str]) -> None:
        """Add lines from `read` to `skipped`.

        Raises:
            DataError: those are more than `bad_limit` now, or all that there is.
        """
        self._unreadable.update(lines)
        if len(self.skipped) > self.bad_limit:
            raise DataError(f"more than {self.bad_limit} bad samples; the last: {[*lines.values()][-1]}")
        if len(self._unreadable) == len(self):
            raise DataError(f"no picture can be read; the last: {[*lines.values()][-1]}")

    def __getitem__(self, index: int) -> Pair:
        """Pair(key, pixels [3, H, W] uint8, captions, file). Negative numbers count from the end.

        Raises:
            DataError: more than `bad_limit` samples were bad so far.
            IndexError: there is no such number.
        """
        pair, lines = self.read(index + len(self) if index < 0 else index)
        if lines:
            self.note(lines)
        assert pair is not None  # otherwise `note` has raised
        return pair
