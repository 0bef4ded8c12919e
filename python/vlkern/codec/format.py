"""The file: a header, a table of segments, a checksum of both, and the streams of the segments.

All numbers are little-endian.

    offset  bytes
         0  4      89 56 4C 4B ("VLK" after a byte that is no text)
         4  1      version of the format, 1; it includes the order and the groups in which a model's tokens are coded
         5  1      exactness: 0 float, 1 integer
         6  1      level of quality
         7  1      B, tiles of a segment; the last may have fewer
         8  8      of the model: the beginning of the SHA-256 of its configuration and weights
        16  4      width in pixels
        20  4      height in pixels
        24  1      side of a tile in tokens of 16 x 16 pixels
        25  2      C, symbols of a token
        27  12 S   for each of the S segments: bytes of its stream, their CRC-32, and the CRC-32 of what was coded with
                   which probabilities (see stream.py); it continues that of the segment before, and the first that
                   of these 27 bytes
      27 + 12 S  4  CRC-32 of all that stands before
      31 + 12 S     the streams

S follows from the sizes. Nothing is allocated for a file that is shorter or longer than its table says, or whose
streams are shorter than any stream of so many symbols can be.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from vlkern.codec.errors import DamagedFile, Mismatch
from vlkern.codec.stream import Segment
from vlkern.codec.tiles import Tiling

MAGIC, VERSION = b"\x89VLK", 1
#: Where a file can be read, as the header counts them.
EXACTNESS = ("float", "integer")
#: Pixels along the side of a token.
CELL = 16
#: Pixels of a picture at most.
LARGEST = 2**28
#: Tiles of a segment at most, and as many as the encoder takes.
MOST_TILES, TILES = 64, 16
#: Symbols that a byte can hold at most. A window has at least 16 symbols and an escape, each with a frequency of at
#: least 1 in 65536, so that no symbol takes less than log2(65536 / 65520) bits.
PER_BYTE = 23_000

_HEAD, _ENTRY, _CRC = struct.Struct("<4sBBBB8sIIBH"), struct.Struct("<III"), struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """What the first bytes of a file say.

    exactness  of `EXACTNESS`
    level      of quality
    batch      B, tiles of a segment
    model      8 bytes
    width, height   in pixels
    tile       side of a tile in tokens
    channels   C, symbols of a token
    """

    exactness: str
    level: int
    batch: int
    model: bytes
    width: int
    height: int
    tile: int
    channels: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return -(-self.height // CELL), -(-self.width // CELL)

    @property
    def tiling(self) -> Tiling:
        """How the grid is cut. The order of the tokens is the model's; here it is row after row."""
        return Tiling(*self.grid, self.tile, tuple(range(self.tile**2)))

    def spans(self) -> list[tuple[int, int]]:
        """The first tile of each segment, and the one after its last."""
        tiles = self.tiling.tiles
        return [(first, min(first + self.batch, tiles)) for first in range(0, tiles, self.batch)]

    def pack(self) -> bytes:
        """The first 27 bytes."""
        exactness = EXACTNESS.index(self.exactness)
        return _HEAD.pack(
            MAGIC, VERSION, exactness, self.level, self.batch, self.model, self.width, self.height, self.tile,
            self.channels,
        )  # fmt: skip

    @property
    def checksum(self) -> int:
        """With this begins that of the first segment, and that of every other with the one before: a segment is wrong
        in any other place of any other file."""
        return zlib.crc32(self.pack())


def _check(value: int, least: int, most: int, what: str) -> None:
    if not least <= value <= most:
        raise DamagedFile(f"damaged header: {what} is {value}, expected {least} to {most}")


def check_sides(width: int, height: int) -> None:
    """Make sure that a picture has pixels, and not too many. Raises ValueError if not."""
    if width < 1 or height < 1 or width * height > LARGEST:
        raise ValueError(f"a picture must have 1 to {LARGEST} pixels, got {width} x {height}")


def write(header: Header, segments: Sequence[Segment]) -> bytes:
    """The file."""
    table = [_ENTRY.pack(len(s.stream), zlib.crc32(s.stream), s.checksum) for s in segments]
    head = b"".join([header.pack(), *table])
    return b"".join([head, _CRC.pack(zlib.crc32(head)), *(s.stream for s in segments)])


def read(data: bytes) -> tuple[Header, list[Segment]]:
    """What `write` wrote. Every byte is covered by a checksum, which is compared before anything is decoded.

    Raises:
        DamagedFile: this is no such file, or not a whole one.
        Mismatch: its format is newer.
    """
    if len(data) < _HEAD.size or not data.startswith(MAGIC):
        raise DamagedFile("no picture of vlkern: it does not begin as one")
    _, version, exactness, level, batch, model, width, height, tile, channels = _HEAD.unpack_from(data)
    if version != VERSION:
        raise Mismatch(f"the format has version {version}, expected {VERSION}: a newer vlkern may read it")
    _check(exactness, 0, len(EXACTNESS) - 1, "the exactness")
    _check(batch, 1, MOST_TILES, "the number of tiles in a segment")
    _check(tile, 1, 255, "the side of a tile")
    _check(channels, 1, 2**16 - 1, "the number of symbols in a token")
    try:
        check_sides(width, height)
    except ValueError as error:
        raise DamagedFile(f"damaged header: {error}") from error
    header = Header(EXACTNESS[exactness], level, batch, model, width, height, tile, channels)

    tiling = header.tiling
    count = -(-tiling.tiles // batch)
    start = _HEAD.size + _ENTRY.size * count
    if len(data) < start + _CRC.size:
        raise DamagedFile(f"cut short: the header needs {start + _CRC.size} bytes, got {len(data)}")
    if _CRC.unpack_from(data, start)[0] != zlib.crc32(memoryview(data)[:start]):
        raise DamagedFile("damaged header: its checksum is another")
    table = list(_ENTRY.iter_unpack(data[_HEAD.size : start]))
    end = start + _CRC.size + sum(length for length, _, _ in table)
    if len(data) != end:
        raise DamagedFile(f"{'cut short' if len(data) < end else 'continued'}: expected {end} bytes, got {len(data)}")

    segments, at = [], start + _CRC.size
    for number, ((first, last), (length, crc, checksum)) in enumerate(zip(header.spans(), table, strict=True)):
        stream = bytes(memoryview(data)[at : at + length])
        if zlib.crc32(stream) != crc:
            raise DamagedFile(f"segment {number}: damaged, its checksum is another")
        if length * PER_BYTE < tiling.tokens(first, last) * channels:
            raise DamagedFile(f"segment {number}: {length} bytes cannot hold so many symbols")
        segments.append(Segment(stream, checksum))
        at += length
    return header, segments
