"""Random access: the same samples as WebDataset reads, and every one that cannot be used has its line."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import pickle
import random
import threading

import pytest
import shards
import torch
import webdataset

from vlkern import data
from vlkern.data import DataError, PairShards, find_shards, load_pairs

CAPTION = json.dumps({"captions": ["a", "b"]}).encode()


def good(key):
    return {f"{key}.png": shards.picture(), f"{key}.json": CAPTION}


def spoil(path, start, content):
    whole = bytearray(path.read_bytes())
    whole[start : start + len(content)] = content
    path.write_bytes(whole)


def test_the_same_as_read_in_order(tmp_path):
    """`load_pairs` reads with the library webdataset."""
    shard = data.clipart_mini() / "test.tar"
    expected, pairs = load_pairs([shard], 16), PairShards(shard, 16)
    assert len(pairs) == len(expected)
    assert pairs.captions() == [captions[0] for captions in expected.captions]
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    for i in order:
        key, pixels, captions, file = pairs[i]
        assert (key, captions, file) == (expected.keys[i], expected.captions[i], expected.files[i])
        assert torch.equal(pixels, expected.pixels[i])
    assert pairs.skipped == []


def test_shards_that_webdataset_writes(tmp_path):
    """Also with long names and folders, several shards and a choice of suffixes."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as out:
            for i in range(3):
                key = f"folder.{shard}/{'k' * 60 * i}{i}"
                image = {"gif": shards.picture(kind="GIF")} if i % 2 else {"jpeg": shards.picture(kind="JPEG")}
                caption = {"txt": f" caption {shard}{i}\n"} if i < 2 else {"json": {"caption": f"caption {shard}{i}"}}
                out.write({"__key__": key, **image, "cls": 5, **caption})
    pairs = PairShards(tmp_path, 8)
    read = webdataset.WebDataset([str(tmp_path / f"{shard}.tar") for shard in (0, 1)], shardshuffle=False)
    assert [pairs.key(i) for i in range(len(pairs))] == [sample["__key__"] for sample in read]
    assert pairs.captions() == [f"caption {shard}{i}" for shard in (0, 1) for i in range(3)]
    assert pairs[1].key == "folder.0/" + "k" * 60 + "1"
    assert pairs[-1].key == pairs[5].key
    assert pairs.record(0) == {} and pairs.record(2) == {"caption": "caption 02"}
    with pytest.raises(IndexError, match="index must be 0 to 5, got 6"):
        pairs[6]


def test_height_and_width(tmp_path):
    pairs = PairShards(shards.shard(tmp_path / "a.tar"), (6, 10))
    assert pairs[0].pixels.shape == (3, 6, 10)


RECORD = {"names": {"de": "Fuchs", "en": "fox"}, "keywords": {"en": ["face", "animal"]}, "captions": ["x"]}


@pytest.mark.parametrize(
    ("key", "captions"),
    [
        (None, ("x",)),
        ("names.de", ("Fuchs",)),
        ("names", ("Fuchs", "fox")),
        ("keywords", ("face", "animal")),
        ("keywords.en", ("face", "animal")),
    ],
)
def test_caption_key(tmp_path, key, captions):
    members = {"0.png": shards.picture(), "0.json": json.dumps(RECORD).encode(), "0.txt": b"y", **good("1")}
    if key is None:
        del members["0.txt"]
    pairs = PairShards(shards.write(tmp_path / "a.tar", members), 8, caption_key=key)
    assert pairs.captions_of(0) == pairs[0].captions == captions
    assert len(pairs) + len(pairs.skipped) == 2
    assert key is None or f"sample 1: the .json needs `{key}`" in pairs.skipped[0]


BAD = {
    "no picture": ({"x.json": CAPTION}, "no image"),
    "no caption": ({"x.png": shards.picture()}, "no .json or .txt"),
    "json is broken": ({"x.png": shards.picture(), "x.json": b"{"}, "Expecting"),
    "json has no caption": ({"x.png": shards.picture(), "x.json": b"{}"}, "captions"),
    "json is a list": ({"x.png": shards.picture(), "x.json": b"[1]"}, "object"),
    "json not utf-8": ({"x.png": shards.picture(), "x.json": b'{"caption": "\xff"}'}, "decode"),
    "half a character": ({"x.png": shards.picture(), "x.json": b'{"caption": "\\ud800"}'}, "surrogate"),
    "txt not utf-8": ({"x.png": shards.picture(), "x.txt": b"\xff"}, "utf-8"),
    "txt is blank": ({"x.png": shards.picture(), "x.txt": b" \n"}, ".txt needs a caption"),
    "captions of the wrong kind": ({"x.png": shards.picture(), "x.json": b'{"captions": ["a", 3]}'}, "captions"),
    "far from its partner": ({"x.png": shards.picture(), **good("z")}, "no .json"),
    "a name twice": ([*good("x").items(), ("x.png", shards.picture())], "x.png is there twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_left_out_has_a_line(tmp_path, name):
    members, reason = BAD[name]
    members = list(members.items()) if isinstance(members, dict) else members
    path = shards.write(tmp_path / "a.tar", [*members, *good("y").items()])
    pairs = PairShards(path, 8)
    (line,) = pairs.skipped
    assert line.startswith(f"{path}: sample x: ") and reason in line and "\n" not in line
    assert "y" in [pairs.key(i) for i in range(len(pairs))]
    with pytest.raises(DataError, match=r"more than 0 bad samples; the last: .*a\.tar: sample x"):
        PairShards(path, 8, bad_limit=0)


def numbered(path, count=20):
    """Each sample is 4 blocks: header, picture, header, captions."""
    members = {name: content for i in range(count) for name, content in good(f"{i:03}").items()}
    assert max(map(len, members.values())) <= 512
    return shards.write(path, members)


@pytest.mark.parametrize("which", [0, 2], ids=["picture", "caption"])
@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_damaged_header_costs_one_sample(tmp_path, which, place):
    path = numbered(tmp_path / "a.tar")
    start = 512 * (4 * place + which)
    spoil(path, start, b"\xff" * 300)
    pairs = PairShards(path, 8)
    (line,) = pairs.skipped
    assert f"sample {place:03}: no " in line
    assert f"(no valid header, bytes {start} to " in line
    assert len(pairs) + 1 == 20
    assert [pairs[i].key for i in range(19)] == [f"{i:03}" for i in range(20) if i != place]


def test_damage_over_a_whole_sample(tmp_path):
    path = numbered(tmp_path / "a.tar")
    spoil(path, 512 * 28, b"\xff" * 2048)
    pairs = PairShards(path, 8)
    assert pairs.skipped == [f"{path}: no valid header, bytes {512 * 28} to {512 * 32}"]
    assert len(pairs) + 1 == 20


@pytest.mark.parametrize("blocks", [0.5, 1, 1.1, 2, 2.5, 3, 3.04])
def test_a_tail_that_is_missing(tmp_path, blocks):
    """Cut anywhere inside sample 10: that one is told, and nothing else is left out."""
    path = numbered(tmp_path / "a.tar")
    end = int(512 * (40 + blocks))
    path.write_bytes(path.read_bytes()[:end])
    pairs = PairShards(path, 8)
    (line,) = pairs.skipped
    assert "cut off" in line and f" to {end}" in line
    assert [pairs[i].key for i in range(len(pairs))] == [f"{i:03}" for i in range(10)]


def test_many_wounds_add_up(tmp_path):
    """Spoil a header in each of some samples: those and no others are left out."""
    for seed in range(5):
        chance = random.Random(seed)
        path = numbered(tmp_path / f"{seed}.tar", 40)
        lost = sorted(chance.sample(range(40), 8))
        for i in lost:
            spoil(path, 512 * (4 * i + chance.choice([0, 2])) + chance.randrange(100, 156), b"\x81")
        pairs = PairShards(path, 8)
        assert len(pairs) + len(pairs.skipped) == 40
        assert [pairs[i].key for i in range(32)] == [f"{i:03}" for i in range(40) if i not in lost]


def test_the_limit_is_over_all_shards(tmp_path):
    for name in "abc":
        shards.write(tmp_path / f"{name}.tar", {"x.json": b"{}", **good("y"), "z.png": b""})
    assert len(PairShards(tmp_path, 8, bad_limit=6).skipped) == 6
    with pytest.raises(DataError, match=r"more than 5 bad samples; the last: .*c\.tar: sample z"):
        PairShards(tmp_path, 8, bad_limit=5)


def pictures(path, readable):
    """A shard in which some pictures cannot be decoded."""
    members = {}
    for i, fine in enumerate(readable):
        members[f"{i}.png"] = shards.picture(color=(i, 0, 0)) if fine else b"\x89PNG but not really"
        members[f"{i}.txt"] = str(i).encode()
    return shards.write(path, members)


def test_an_unreadable_picture_is_replaced_by_the_next(tmp_path):
    path = pictures(tmp_path / "a.tar", [True, False, False, True, False])
    pairs = PairShards(path, 8)
    assert len(pairs) == 5 and pairs.skipped == []
    assert [pairs[i].key for i in (4, 3, 2, 1, 0)] == ["0", "3", "3", "3", "0"]
    assert pairs[1].caption == "3"
    assert len(pairs.skipped) == 3  # each once, however often it was asked for
    assert pairs.skipped[0].startswith(f"{path}: sample 1: no readable picture: cannot identify")


def test_too_many_unreadable_pictures(tmp_path):
    pairs = PairShards(pictures(tmp_path / "a.tar", [True, False, False, True, False, True]), 8, bad_limit=2)
    assert pairs[1].key == "3"
    with pytest.raises(DataError, match=r"more than 2 bad samples; the last: .*sample 4: no readable picture"):
        pairs[4]


def test_no_picture_at_all(tmp_path):
    pairs = PairShards(pictures(tmp_path / "a.tar", [False, False]), 8)
    with pytest.raises(DataError, match=r"no picture can be read; the last: .*a\.tar: sample 1"):
        pairs[0]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed(tmp_path, pack):
    path = tmp_path / "a.tar"
    path.write_bytes(pack(shards.shard(tmp_path / "b.tar").read_bytes()))
    with pytest.raises(DataError, match=r"a\.tar: compressed \((gzip|bzip2|xz)\); unpack it"):
        PairShards(path, 8)


def test_which_shards(tmp_path):
    paths = [shards.shard(tmp_path / name) for name in ("b-1.tar", "a-2.tar", "c[1].tar")]
    assert find_shards(tmp_path) == sorted(paths)
    assert find_shards(str(tmp_path / "[ab]-*.tar")) == [paths[1], paths[0]]
    assert find_shards(paths) == paths
    assert find_shards(tmp_path / "c[1].tar") == [paths[2]]
    for given, message in (
        ([], "at least one tar file, got none"),
        (tmp_path / "none.tar", r"none\.tar: no such shard"),
        (tmp_path / "x*.tar", r"x\*\.tar: no shards there"),
        ([tmp_path, paths[0]], r"b-1\.tar: given 2 times"),
    ):
        with pytest.raises(DataError, match=message):
            PairShards(given, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no shards there"):
        find_shards(tmp_path / "empty")


def test_no_pairs(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: no image-text pairs$"):
        PairShards(shards.write(tmp_path / "a.tar", {"README": b""}), 8)
    with pytest.raises(DataError, match=r"no image-text pairs; the first: .*sample 0: no \.json or \.txt"):
        PairShards(shards.write(tmp_path / "a.tar", {"0.png": b""}), 8)
    for content in (b"", b"this is no tar file" * 100):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tar: not a tar file"):
            PairShards(tmp_path / "a.tar", 8)


@pytest.mark.parametrize("size", [0, (4, 0), (1, 2, 3), (2.5, 3), "64"])
def test_image_size(tmp_path, size):
    with pytest.raises(ValueError, match="image_size must be one or two whole numbers above 0"):
        PairShards(shards.shard(tmp_path / "a.tar"), size)


def test_resample(tmp_path):
    with pytest.raises(ValueError, match="resample must be one of bilinear, bicubic, got 'nearest'"):
        PairShards(shards.shard(tmp_path / "a.tar"), 8, resample="nearest")


def test_fingerprint(tmp_path):
    first = PairShards(shards.shard(tmp_path / "a.tar", 4), 8)
    (tmp_path / "moved").mkdir()
    assert PairShards(shards.shard(tmp_path / "moved" / "a.tar", 4), 16).fingerprint == first.fingerprint
    others = [shards.shard(tmp_path / "b.tar", 4), shards.shard(tmp_path / "moved" / "a.tar", 5)]
    assert len({first.fingerprint, *(PairShards(path, 8).fingerprint for path in others)}) == 3


def test_a_shard_that_changes_is_noticed(tmp_path):
    path = numbered(tmp_path / "a.tar")
    pairs = PairShards(path, 8)
    with path.open("r+b") as file:
        file.truncate(512 * 41 + 10)
    assert pairs[10].key == "000"  # all after it are gone, then comes the first
    assert "sample 010: the shard ends inside it" in pairs.skipped[0]


def child(pairs, queue):
    queue.put([(pairs[i].key, int(pairs[i].pixels.sum())) for i in range(len(pairs))])


def test_pickled_and_forked(tmp_path):
    pairs = PairShards([shards.shard(tmp_path / f"{i}.tar") for i in range(3)], 8)
    expected = [(pair.key, int(pair.pixels.sum())) for pair in pairs]
    again = pickle.loads(pickle.dumps(pairs))
    assert [(pair.key, int(pair.pixels.sum())) for pair in again] == expected
    assert again.fingerprint == pairs.fingerprint
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=child, args=(pairs, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [expected] * 2
    for process in processes:
        process.join()


def test_more_shards_than_may_be_open_at_once(tmp_path, monkeypatch):
    """Files that threads are still reading are not closed under them."""
    monkeypatch.setattr("vlkern.data.shards._OPEN_SHARDS", 1)
    pairs = PairShards([shards.shard(tmp_path / f"{i}.tar", i + 1) for i in range(4)], 8)
    expected = [(pair.key, pair.captions) for pair in pairs]
    wrong = []

    def read():
        for i in [*range(len(pairs))] * 5:
            if (pairs[i].key, pairs[i].captions) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pairs.skipped == []


def test_memory_of_a_sample(tmp_path):
    pairs = PairShards(numbered(tmp_path / "a.tar"), 8)
    assert pairs._entries.nbytes == 29 * 20
    assert pairs._keys == [b"".join(b"%03d" % i for i in range(20))]
