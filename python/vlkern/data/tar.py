"""Members and samples of an uncompressed tar by their place in the file; what is damaged or lost is told."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_CHUNK = 2048 * BLOCK
_PAX_RECORD = re.compile(rb"\d+ (path|size)=([^\n]*)\n")
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


def _header(block: bytes) -> tarfile.TarInfo | None:
    """A block read as a header; None if its checksum is wrong."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _only_zeros(fd: int, start: int, end: int) -> bool:
    """Whether nothing else follows, as after the end of an archive."""
    return all(not any(os.pread(fd, _CHUNK, at)) for at in range(start, end, _CHUNK))


def _next_header(fd: int, start: int, end: int) -> int:
    """Where the first valid header from `start` on begins; `end` if there is none."""
    for at in range(start, end, _CHUNK):
        chunk = os.pread(fd, _CHUNK, at)
        for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[i + 257 : i + 262] == b"ustar" and _header(chunk[i : i + BLOCK]):
                return at + i
    return end


def members(fd: int) -> Iterator[Member | Damage]:
    """Walk the headers of a tar in the order of the file.

    A header with a wrong checksum ends the walk of Python's tarfile without a word. Here the next valid header is
    looked for, block by block, and what lies between is yielded as Damage; so is a missing end of the archive.

    Args:
        fd: a file descriptor; its position is neither used nor changed.

    Yields:
        Member or Damage. Directories, links and the like are left out; long names (GNU and pax) are understood.
    """
    end, at = os.fstat(fd).st_size, 0
    name, size = None, None  # from extended headers, for the member that follows them
    while True:
        block = os.pread(fd, BLOCK, at)
        if len(block) < BLOCK:
            yield Damage(at, end, "cut off: the end of the archive is missing")
            return
        if block == _ZEROS and _only_zeros(fd, at, end):
            return
        header = _header(block)
        if header is None:
            after = _next_header(fd, at + BLOCK, end)
            yield Damage(at, after, "no valid header")
            if after == end:
                return
            at, name, size = after, None, None
            continue
        data = at + BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            extension = os.pread(fd, header.size, data)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = extension.rstrip(b"\0").decode("utf-8", "surrogateescape")
            for key, value in _PAX_RECORD.findall(extension) if header.type != tarfile.GNUTYPE_LONGNAME else ():
                if key == b"path":
                    name = value.decode("utf-8", "surrogateescape")
                elif value.isdigit():
                    size = int(value)
            at = data + -(-header.size // BLOCK) * BLOCK
            continue
        length = header.size if size is None else size
        if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            length = length if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK) else 0
        if data + length > end:
            yield Damage(at, end, f"cut off inside {name or header.name}")
            return
        if header.isreg():
            yield Member(name or header.name, data, length)
        at = data + -(-length // BLOCK) * BLOCK
        if header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            name, size = None, None


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
