"""Shards: what is read, and one clear line for what cannot be."""

import gzip
import json

import pytest
import shards
import torch

from vlkern import data
from vlkern.data import DataError, decode_image, load_pairs, read_pairs, to_unit


def test_clipart_mini_is_there():
    for name, count in (("train.tar", 2000), ("test.tar", 400)):
        pairs = load_pairs([data.clipart_mini() / name], 16)
        assert len(pairs) == count
        assert pairs.pixels.shape == (count, 3, 16, 16)
        assert pairs.pixels.dtype == torch.uint8
        assert all(pairs.captions)
        assert pairs.skipped == []
        assert len(set(pairs.keys)) == count


def test_order_and_contents(tmp_path):
    paths = [shards.shard(tmp_path / "a.tar", 3), shards.shard(tmp_path / "b.tar", 2)]
    pairs = list(read_pairs(paths, 8))
    assert [p.captions for p in pairs] == [(f"picture {i}", f"number {i}") for i in (0, 1, 2, 0, 1)]
    assert pairs[1].pixels[:, 4, 4].tolist() == [40, 100, 200]
    assert pairs[0].file == shards.picture(color=(0, 100, 200))


def test_compressed_shard(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(shards.shard(tmp_path / "a.tar", 4).read_bytes()))
    assert len(load_pairs([path], 8)) == 4


def test_names_are_taken_literally(tmp_path):
    path = shards.shard(tmp_path / "a{0..2}::x.tar", 2)
    assert len(load_pairs([path], 8)) == 2


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("P", 0), ("L", 255), ("1", 1)])
def test_every_mode_becomes_rgb_on_white(mode, color):
    pixels = decode_image(shards.picture(mode=mode, color=color), 4)
    assert pixels.shape == (3, 4, 4)
    if mode != "P":
        assert pixels.min() == 255


def test_scaling():
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_missing_shard(tmp_path):
    with pytest.raises(DataError, match=r"^\S*none\.tar: no such shard$"):
        load_pairs([tmp_path / "none.tar"], 8)


def test_no_tar_at_all(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match=r"a\.tar: not a readable tar file"):
        load_pairs([path], 8)


def test_empty_file(tmp_path):
    path = tmp_path / "a.tar"
    path.touch()
    with pytest.raises(DataError, match=r"a\.tar"):
        load_pairs([path], 8)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.55, 0.7])
def test_cut_off_shard(tmp_path, keep):
    path = shards.shard(tmp_path / "a.tar", 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * 20 * 2 * 1024)])
    with pytest.raises(DataError, match=r"a\.tar"):
        load_pairs([path], 8)


def test_cut_between_two_members(tmp_path):
    """tarfile takes this for a complete archive."""
    path = shards.shard(tmp_path / "a.tar", 20)
    path.write_bytes(path.read_bytes()[: 8 * 1024])
    with pytest.raises(DataError, match=r"a\.tar: damaged or cut off at byte 8192"):
        load_pairs([path], 8)


def test_damaged_header(tmp_path):
    """tarfile takes this for the end of the archive."""
    path = shards.shard(tmp_path / "a.tar", 20)
    content = bytearray(path.read_bytes())
    content[8 * 1024 : 8 * 1024 + 300] = b"\xff" * 300
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: damaged or cut off at byte 8192"):
        load_pairs([path], 8)


BAD = {
    "broken picture": ({"x.png": b"\x89PNG but not really", "x.json": b'{"captions": ["a"]}'}, "identify"),
    "cut picture": ({"x.png": shards.picture(size=(60, 60))[:70], "x.json": b'{"captions": ["a"]}'}, "x"),
    "no picture": ({"x.json": b'{"captions": ["a"]}'}, "no image"),
    "no json": ({"x.png": shards.picture()}, "no .json"),
    "broken json": ({"x.png": shards.picture(), "x.json": b"{"}, "Expecting"),
    "not utf-8": ({"x.png": shards.picture(), "x.json": b'{"captions": ["\xff\xfe"]}'}, "decode"),
    "no captions": ({"x.png": shards.picture(), "x.json": b"{}"}, "captions"),
    "empty captions": ({"x.png": shards.picture(), "x.json": b'{"captions": []}'}, "captions"),
    "caption is no string": ({"x.png": shards.picture(), "x.json": b'{"captions": [3]}'}, "captions"),
    "json is a list": ({"x.png": shards.picture(), "x.json": b"[1]"}, "object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_counted_and_reported(tmp_path, name):
    members, reason = BAD[name]
    good = {"y.png": shards.picture(), "y.json": json.dumps({"captions": ["fine"]}).encode()}
    path = shards.write(tmp_path / "a.tar", {**members, **good})
    pairs = load_pairs([path], 8)
    assert pairs.captions == [("fine",)]
    (line,) = pairs.skipped
    assert line.startswith(f"{path}: sample x: ")
    assert reason in line
    assert "\n" not in line
    with pytest.raises(DataError, match=r"more than 0 bad samples; the last: .*sample x"):
        load_pairs([path], 8, bad_limit=0)


def test_a_name_that_comes_twice(tmp_path):
    path = shards.write(tmp_path / "a.tar", [("x.png", b""), ("x.png", b"")])
    with pytest.raises(DataError, match=r"a\.tar: damaged \(.*duplicate"):
        load_pairs([path], 8)


def test_too_many_bad_samples(tmp_path):
    members = {f"{i}.json": b"{}" for i in range(5)}
    path = shards.write(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match="more than 3 bad samples"):
        load_pairs([path], 8, bad_limit=3)
    with pytest.raises(DataError, match=r"a\.tar: no image-text pairs"):
        load_pairs([path], 8)
