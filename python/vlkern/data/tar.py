"""Members and samples of an uncompressed tar by their place in the file; what is damaged or lost is told."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 2048 * BLOCK
_PAX_FIELD = re.compile(rb"\d+ (path|size)=([^\n]*)\n")
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
#: Folder and name up to the first dot are the key of a sample, the rest is the suffix.
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
#: Kinds of compression by the first bytes of a file.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in the tar: its contents are `size` bytes from `offset`."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """Bytes `start` to `stop` belong to no readable member."""

    start: int
    stop: int
    what: str

    def __str__(self) -> str:
        return f"{self.what}, bytes {self.start} to {self.stop}"


def packing(head: bytes) -> str | None:
    """How a file that begins with `head` is compressed; None if it is not."""
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def _number(digits: bytes) -> int:
    """Octal digits, or the binary form that GNU tar uses for 8 GiB and more. Raises ValueError for anything else."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b" \0")
    if text and not text.isdigit():  # int takes signs and underscores
        raise ValueError(f"not octal: {text!r}")
    return int(text or b"0", 8)


def _header(block: bytes) -> _Header | None:
    """A block read as a header; None if its checksum is wrong. (Python's TarInfo.frombuf takes six times as long.)"""
    if len(block) < BLOCK:
        return None
    try:
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156]):
            return None
        name, size = block[:100].partition(b"\0")[0], _number(block[124:136])
    except ValueError:
        return None
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _Header(prefix + b"/" + name if prefix else name, size, block[156:157])


def _only_zeros(fd: int, start: int, end: int) -> bool:
    """Whether nothing else follows, as after the end of an archive."""
    return all(not any(os.pread(fd, _CHUNK, at)) for at in range(start, end, _CHUNK))


def _next_header(fd: int, start: int, end: int) -> int:
    """Where the first valid header from `start` on begins, at any byte, for some may be missing; `end` if nowhere."""
    for at in range(start, end, _CHUNK):
        chunk = os.pread(fd, _CHUNK + BLOCK, at)  # the last header that begins in this chunk is read whole
        magic = chunk.find(b"ustar", 257)
        while magic >= 0:
            if _header(chunk[magic - 257 : magic - 257 + BLOCK]):
                return at + magic - 257
            magic = chunk.find(b"ustar", magic + 1)
    return end


def members(fd: int) -> Iterator[Member | Damage]:
    """Walk the headers of a tar in the order of the file.

    A header with a wrong checksum ends the walk of Python's tarfile without a word. Here the next valid header is
    looked for, and what lies between is yielded as Damage; so is a missing end of the archive.

    Args:
        fd: a file descriptor; its position is neither used nor changed.

    Yields:
        Member or Damage. Directories, links and the like are left out; long names (GNU and pax) are understood.
    """
    end, at = os.fstat(fd).st_size, 0
    long_name, long_size = None, None  # from extended headers, for the member that follows them
    while True:
        block = os.pread(fd, BLOCK, at)
        if len(block) < BLOCK:
            yield Damage(at, end, "cut off: the end of the archive is missing")
            return
        if block == _ZEROS and _only_zeros(fd, at, end):
            return
        header = _header(block)
        if header is None:
            after = _next_header(fd, at + 1, end)
            yield Damage(at, after, "no valid header")
            if after == end:
                return
            at, long_name, long_size = after, None, None
            continue
        name = (header.name if long_name is None else long_name).decode("utf-8", "surrogateescape")
        size = header.size if long_size is None else long_size
        size = 0 if header.kind in _WITHOUT_DATA else size
        at += BLOCK
        if at + size > end:
            yield Damage(at - BLOCK, end, f"cut off inside {name}")
            return
        if header.kind == b"L":
            long_name = os.pread(fd, size, at).rstrip(b"\0")
        elif header.kind in (b"x", b"X"):
            fields = dict(_PAX_FIELD.findall(os.pread(fd, size, at)))
            long_name = fields.get(b"path", long_name)
            long_size = int(fields[b"size"]) if b"size" in fields else long_size
        elif header.kind not in (b"K", b"g"):
            long_name, long_size = None, None
            if header.kind in _REGULAR and not name.endswith("/"):
                yield Member(name, at, size)
        at = min(at - (-size // BLOCK) * BLOCK, end)


@dataclass
class Sample:
    """Members in a row that share a key; `twice` is a name that came again, `damage` what lies among them or after."""

    key: str = ""
    parts: dict[str, Member] = field(default_factory=dict)
    twice: str | None = None
    damage: list[Damage] = field(default_factory=list)


def samples(fd: int) -> Iterator[Sample]:
    """The samples of a tar by WebDataset's rule; members without a suffix belong to none.

    Damage is with the sample before it, damage at the start with one that has neither key nor parts.
    """
    sample = Sample()
    for member in members(fd):
        if isinstance(member, Damage):
            sample.damage.append(member)
            continue
        match = _NAME.fullmatch(member.name)
        if not match or (member.name.startswith("__") and member.name.endswith("__")):
            continue
        key, suffix = match[1], match[2].lower()
        if key != sample.key:
            yield sample
            sample = Sample(key)
        if suffix in sample.parts:
            sample.twice = member.name
        sample.parts[suffix] = member
    yield sample
