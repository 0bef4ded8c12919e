"""The walk over a tar finds what tarfile finds, in every dialect, and more than tarfile when it is damaged."""

import io
import os
import tarfile

import pytest
import shards
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkern.data.tar import BLOCK, Damage, Member, members, samples

NAMES = ["a.png", "folder/b.json", "x" * 120 + ".png", "d" * 90 + "/" + "e" * 90 + ".json", "größe.txt", "f"]


def walk(path, function=members):
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(function(fd))
    finally:
        os.close(fd)


def spoil(path, start, data):
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect(tmp_path, dialect):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=dialect) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(NAMES):
            if dialect == tarfile.USTAR_FORMAT and len(name) > 190:
                continue
            entry = tarfile.TarInfo(name if dialect != tarfile.USTAR_FORMAT else name[-99:])
            entry.size, entry.mtime = 511 + i, 0.5 if dialect == tarfile.PAX_FORMAT else 0
            tar.addfile(entry, io.BytesIO(bytes([i]) * entry.size))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "y" * 150 if dialect != tarfile.USTAR_FORMAT else "y"
        tar.addfile(link)
        last = tarfile.TarInfo("last.png")
        tar.addfile(last)
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    assert walk(path) == expected
    assert expected[-1].name == "last.png"


def test_a_size_in_a_pax_header_counts(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a.png")
        entry.pax_headers = {"size": "700"}
        tar.addfile(entry)
        tar.fileobj.write(bytes(1024))
        tar.offset += 1024
        tar.addfile(tarfile.TarInfo("b.png"))
    first, second = walk(path)
    assert (first.name, first.size, second.name) == ("a.png", 700, "b.png")


@pytest.mark.parametrize("what", [b"\xff" * 300, bytes(BLOCK)])
def test_after_a_damaged_header_the_walk_goes_on(tmp_path, what):
    path = shards.write(tmp_path / "a.tar", {f"{i}.png": bytes([i]) * 700 for i in range(4)})
    whole = walk(path)
    spoil(path, 3 * BLOCK, what)  # the header of 1.png
    assert walk(path) == [whole[0], Damage(3 * BLOCK, 6 * BLOCK, "no valid header"), *whole[2:]]


@pytest.mark.parametrize("lost", [1, 100, 512, 700, 1300])
def test_bytes_that_are_missing_in_the_middle(tmp_path, lost):
    """The headers after the gap are no longer at multiples of 512."""
    path = shards.write(tmp_path / "a.tar", {f"{i}.png": bytes([i]) * 700 for i in range(6)})
    whole, content = walk(path), path.read_bytes()
    path.write_bytes(content[:1000] + content[1000 + lost :])
    found = walk(path)
    assert sum(isinstance(part, Damage) for part in found) == 1
    assert [(m.name, m.offset + lost) for m in found[-3:]] == [(m.name, m.offset) for m in whole[-3:]]


def test_a_size_below_zero_is_no_size(tmp_path):
    """With a right checksum it would lead back, again and again."""
    path = shards.write(tmp_path / "a.tar", {f"{i}.png": b"" for i in range(3)})
    block = bytearray(path.read_bytes()[512:1024])
    block[124:136] = b"-0000002000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    spoil(path, 512, block)
    assert [str(part) for part in walk(path) if isinstance(part, Damage)] == ["no valid header, bytes 512 to 1024"]


def test_cut_off(tmp_path):
    path = shards.write(tmp_path / "a.tar", {f"{i}.png": bytes([i]) * 700 for i in range(4)})
    content, whole = path.read_bytes(), walk(path)
    for end, found, what in (
        (9 * BLOCK, 3, "cut off: the end of the archive is missing"),
        (9 * BLOCK + 100, 3, "cut off: the end of the archive is missing"),
        (10 * BLOCK + 699, 3, "cut off inside 3.png"),
        (10 * BLOCK + 700, 4, "cut off: the end of the archive is missing"),
        (0, 0, "cut off: the end of the archive is missing"),
    ):
        path.write_bytes(content[:end])
        *good, damage = walk(path)
        assert good == whole[:found]
        assert (damage.what, damage.stop) == (what, end)
    path.write_bytes(content[: 12 * BLOCK] + bytes(BLOCK))  # one block of zeros is an end
    assert walk(path) == whole


def test_samples(tmp_path):
    """Folder and name up to the first dot; what has no suffix belongs to no sample; a name that comes again is told."""
    names = [
        "README",
        "a.b/1.png",
        "a.b/1.seg.PNG",
        "2.json",
        "__meta__.x__",
        "2.png",
        "3.png",
        "2.txt",
        "3.png",
        "3.png",
    ]
    found = walk(shards.write(tmp_path / "a.tar", [(name, b"") for name in names]), samples)
    assert [(s.key, sorted(s.parts), s.twice) for s in found] == [
        ("", [], None),
        ("a.b/1", ["png", "seg.png"], None),
        ("2", ["json", "png"], None),
        ("3", ["png"], None),
        ("2", ["txt"], None),
        ("3", ["png"], "3.png"),
    ]


CONTENT = {f"{i}.png": bytes([i]) * (137 * i) for i in range(8)}


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 20 * BLOCK), st.binary(max_size=900), st.integers(0, 40 * BLOCK))
def test_nothing_is_lost_in_silence(tmp_path_factory, start, data, cut):
    """Whatever is overwritten or cut: every byte is in a member, in a damaged place, or in the zeros of the end."""
    path = shards.write(tmp_path_factory.mktemp("tar") / "a.tar", CONTENT)
    spoil(path, start, data)
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    at = 0
    for part in walk(path):
        assert (part.offset - BLOCK if isinstance(part, Member) else part.start) == at
        at = part.stop if isinstance(part, Damage) else min(part.offset - (-part.size // BLOCK) * BLOCK, len(content))
    assert not any(content[at:])
