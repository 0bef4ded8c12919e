"""Files that no encoder wrote: damaged by chance, cut, continued, spliced, and forged with checksums that are right.

As a program it refuses many of them and says what it took: `python tests/codec/corruptions.py 10000`.
"""

import collections
import random
import resource
import struct
import sys
import time
import zlib

from tiny import exact, picture

from vlkern import codec

HEAD, ENTRY = 27, 12
#: Offset and struct of the numbers in the header.
FIELDS = {
    "version": (4, "<B"), "exactness": (5, "<B"), "level": (6, "<B"), "batch": (7, "<B"), "model": (8, "<Q"),
    "width": (16, "<I"), "height": (20, "<I"), "tile": (24, "<B"), "channels": (25, "<H"),
}  # fmt: skip
ABSURD = (0, 1, 2, 3, 255, 256, 65535, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def originals() -> list[bytes]:
    """Whole files of both levels of exactness, the first two with the same header."""
    return [
        codec.compress(picture(height, width, seed), quality=quality, exact=level, batch=2, codec=exact())
        for seed, (height, width, quality, level) in enumerate(
            [
                (70, 90, 0, "integer"),
                (70, 90, 0, "integer"),
                (70, 90, 1, "float"),
                (130, 64, 2, "integer"),
                (16, 16, 3, "float"),
            ]
        )
    ]


def segments(data: bytes) -> int:
    """How many there are, if the table is as long as its entries say."""
    count = 0
    while HEAD + ENTRY * (count + 1) + 4 <= len(data):
        count += 1
        lengths = (struct.unpack_from("<I", data, HEAD + ENTRY * i)[0] for i in range(count))
        if HEAD + ENTRY * count + 4 + sum(lengths) == len(data):
            return count
    raise AssertionError("no file of vlkern")


def repaired(data: bytearray, count: int) -> bytes:
    """With the checksums of the header and of the streams' bytes set right; those of the contents stay."""
    at = HEAD + ENTRY * count + 4
    for i in range(count):
        length = struct.unpack_from("<I", data, HEAD + ENTRY * i)[0]
        struct.pack_into("<I", data, HEAD + ENTRY * i + 4, zlib.crc32(data[at : at + length]))
        at += length
    struct.pack_into("<I", data, HEAD + ENTRY * count, zlib.crc32(data[: HEAD + ENTRY * count]))
    return bytes(data)


def _flip(rng: random.Random, data: bytearray, start: int = 0) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)


def flipped(rng: random.Random, files: list[bytes]) -> bytes:
    data = bytearray(rng.choice(files))
    _flip(rng, data)
    return bytes(data)


def cut(rng: random.Random, files: list[bytes]) -> bytes:
    data = rng.choice(files)
    return data[: rng.randrange(len(data))]


def continued(rng: random.Random, files: list[bytes]) -> bytes:
    return rng.choice(files) + rng.randbytes(rng.choice((1, 2, 8, 1000)))


def moved(rng: random.Random, files: list[bytes]) -> bytes:
    """A range is left out, doubled or overwritten with another."""
    data = rng.choice(files)
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return rng.choice((data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:]))


def noise(rng: random.Random, files: list[bytes]) -> bytes:
    data = rng.choice(files)
    kept = rng.choice((0, 4, 5, HEAD))
    return data[:kept] + rng.randbytes(rng.choice((0, 1, 30, 300, 3000)))


def spliced(rng: random.Random, files: list[bytes]) -> bytes:
    """The beginning of one file and the end of another."""
    one, other = rng.sample(files, 2)
    count = segments(one)
    at = rng.choice((4, 16, HEAD, HEAD + ENTRY * count, HEAD + ENTRY * count + 4, rng.randrange(len(one))))
    return one[:at] + other[at:]


def absurd(rng: random.Random, files: list[bytes]) -> bytes:
    """Numbers of the header are others, and its checksum is right again."""
    data = bytearray(rng.choice(files))
    count = segments(bytes(data))
    for name in rng.sample(list(FIELDS), rng.choice((1, 1, 2))):
        offset, form = FIELDS[name]
        size = struct.calcsize(form)
        value = rng.choice(
            (*ABSURD, rng.getrandbits(32), struct.unpack_from(form, data, offset)[0] + rng.choice((-1, 1)))
        )
        struct.pack_into(form, data, offset, value % (1 << 8 * size))
    return repaired(data, count)


def forged(rng: random.Random, files: list[bytes]) -> bytes:
    """The streams are others, and all checksums of bytes are right again."""
    data = bytearray(rng.choice(files))
    count = segments(bytes(data))
    _flip(rng, data, HEAD + ENTRY * count + 4)
    return repaired(data, count)


def relabelled(rng: random.Random, files: list[bytes]) -> bytes:
    """Entries of the table are others: lengths, checksums, order."""
    data = bytearray(rng.choice(files))
    count = segments(bytes(data))
    at = HEAD + ENTRY * rng.randrange(count)
    what = rng.randrange(3)
    if what == 0:
        struct.pack_into("<I", data, at, rng.choice((*ABSURD, rng.getrandbits(10))))
    elif what == 1:
        struct.pack_into("<I", data, at + 8, rng.getrandbits(32))
    else:
        other = HEAD + ENTRY * rng.randrange(count)
        data[at : at + ENTRY], data[other : other + ENTRY] = data[other : other + ENTRY], data[at : at + ENTRY]
    struct.pack_into("<I", data, HEAD + ENTRY * count, zlib.crc32(data[: HEAD + ENTRY * count]))
    return bytes(data)


def swapped(rng: random.Random, files: list[bytes]) -> bytes:
    """A segment of one file takes the place of one in a file with the same header, entry and all."""
    same = [file for file in files if file[:HEAD] == files[0][:HEAD]]
    one, other = rng.sample(same, 2)
    count, parts, table = segments(one), [], bytearray(one[:HEAD])
    replaced = rng.randrange(count)
    for i in range(count):
        source = other if i == replaced else one
        if rng.randrange(3) == 0:
            i = rng.randrange(count)
        lengths = [struct.unpack_from("<I", source, HEAD + ENTRY * k)[0] for k in range(count)]
        at = HEAD + ENTRY * count + 4 + sum(lengths[:i])
        table += source[HEAD + ENTRY * i : HEAD + ENTRY * (i + 1)]
        parts.append(source[at : at + lengths[i]])
    return bytes(table) + struct.pack("<I", zlib.crc32(table)) + b"".join(parts)


KINDS = (flipped, cut, continued, moved, noise, spliced, absurd, forged, relabelled, swapped)


def refuse(count: int, seed: int = 0) -> dict[str, float]:
    """Try so many files, in turn of every kind.

    Returns:
        seconds of computing for the slowest, MiB that the process grew by, and how many there were of each kind.

    Raises:
        AssertionError: one is taken for whole, or refused by another error than those that are promised.
    """
    rng, files = random.Random(seed), originals()
    codec.decompress(files[0], codec=exact())
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    done: collections.Counter[str] = collections.Counter()
    while done.total() < count:
        kind = KINDS[done.total() % len(KINDS)]
        data = kind(rng, files)
        if data in files:  # nothing changed
            continue
        start = time.process_time()
        try:
            codec.decompress(data, codec=exact())
        except (codec.DamagedFile, codec.Mismatch) as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError(f"{kind.__name__}: taken for whole: {data.hex()}")
        slowest = max(slowest, time.process_time() - start)
        done[kind.__name__] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": slowest, "MiB": grown, **done}


if __name__ == "__main__":
    print(refuse(int(sys.argv[1]), seed=1))
