"""Pictures to bytes and back: what comes out, and that the bytes are what docs/codec.md says."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch
from corruptions import originals, refuse
from PIL import Image
from tiny import exact, picture, tiny

from vlkern import codec, models
from vlkern.codec.blocks import analyse, synthesize
from vlkern.codec.decompress import decode_symbols
from vlkern.codec.format import Header, read, write
from vlkern.codec.stream import Segment
from vlkern.codec.tiles import Tiling
from vlkern.models import schedules


def quiet(done):
    pass


def decoded(data, of=None):
    """The symbols of a file."""
    return decode_symbols(of or tiny(), *read(data), quiet)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 64), (64, 65), (70, 150)])
@pytest.mark.parametrize("quality", [0, 4])
def test_symbols_survive_and_the_picture_is_theirs(size, quality):
    pixels, model = picture(*size), tiny().model
    data = codec.compress(pixels, quality=quality, batch=2, codec=tiny())
    with torch.no_grad():
        symbols = analyse(model, pixels, quality, quiet)
        expected = synthesize(model, symbols, quality, *size, quiet)
    assert symbols.any()
    assert torch.equal(decoded(data), symbols)
    image = codec.decompress(data, codec=tiny())
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())


def test_a_file_is_the_same_each_time_and_for_each_kind_of_picture():
    pixels = picture(33, 50)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    files = [codec.compress(given, codec=tiny()) for given in (pixels, image, pixels.flip(2).flip(2))]
    assert files[0] == files[1] == files[2]
    assert files[0] == codec.compress(pixels, codec=tiny(), quality=2, exact="float")


def test_every_byte_stands_where_the_format_says():
    data = codec.compress(picture(150, 70), quality=3, batch=4, codec=tiny())
    magic, version, exactness, level, batch, model, width, height, tile, channels = struct.unpack_from(
        "<4sBBBB8sIIBH", data
    )
    assert (magic, version, exactness, level, batch) == (b"\x89VLK", 1, 0, 3, 4)
    assert (width, height, tile, channels) == (70, 150, 4, 16)
    assert model == tiny().name("float")
    # Tiles of 64 x 64 pixels: 3 rows of 2.
    table = [struct.unpack_from("<III", data, 27 + 12 * i) for i in range(2)]
    assert struct.unpack_from("<I", data, 51) == (zlib.crc32(data[:51]),)
    at = 55
    for length, crc, _ in table:
        assert zlib.crc32(data[at : at + length]) == crc
        at += length
    assert at == len(data)


def test_whole_numbers_are_the_default_where_there_are_any(tmp_path):
    pixels = picture(70, 150)
    assert tiny().exactness == ("float",) and exact().exactness == ("float", "integer")
    data = codec.compress(pixels, codec=exact())
    assert data == codec.compress(pixels, codec=exact(), exact="integer") and data[5] == 1
    other = codec.compress(pixels, codec=exact(), exact="float")
    assert other == codec.compress(pixels, codec=tiny()) and other[5] == 0
    assert data[8:16] == exact().name("integer") != other[8:16] == tiny().name("float")
    assert abs(len(data) / len(other) - 1) < 0.05
    assert torch.equal(decoded(data, exact()), decoded(other))
    with pytest.raises(codec.Mismatch, match="made at the level integer, for which this model has no weights"):
        codec.decompress(data, codec=tiny())

    models.save_pretrained(exact().model, tmp_path)
    exact()._integer.save(tmp_path)
    assert codec.load(tmp_path).name("integer") == exact().name("integer")


def test_headers_and_tables_read_as_they_were_written():
    header = Header("integer", 20, 16, bytes(range(8)), 5000, 3, 16, 128)
    count = -(-5000 // 256) // 16 + 1
    segments = [Segment(bytes(500 + i), 2**32 - 1 - i) for i in range(count)]
    assert read(write(header, segments)) == (header, segments)


def test_the_name_of_a_model_changes_with_every_weight():
    names = {tiny().name("float"), tiny(1).name("float")}
    other = models.create("m2t-tiny")
    other.load_state_dict(tiny().model.state_dict())
    assert codec.Codec(other).name("float") == tiny().name("float")
    with torch.no_grad():
        other.decoder[0].bias[0] += 1e-6
    assert len(names | {codec.Codec(other).name("float")}) == 3
    assert len(tiny().name("float")) == 8


def test_tiles_take_and_put():
    tiling = Tiling(5, 7, 2, (3, 0, 2, 1))
    grid = torch.arange(2 * 5 * 7, dtype=torch.int32).view(2, 5, 7) + 1
    assert tiling.tiles == 12
    tokens, valid = tiling.take(grid, 0, 12), tiling.valid(0, 12)
    assert tokens.shape == (12, 4, 2) and int(valid.sum()) == 35 == tiling.tokens(0, 12)
    assert tokens[0, :, 0].tolist() == [9, 1, 8, 2]  # the order of the tokens
    assert not tokens[~valid].any() and tokens[valid].all()
    assert [tiling.tokens(i, i + 1) for i in range(12)] == valid.sum(1).tolist()
    found = torch.zeros_like(grid)
    for first in range(0, 12, 5):
        last = min(first + 5, 12)
        tiling.put(found, tokens[first:last], first, last)
    assert torch.equal(found, grid)


def test_a_picture_in_blocks_is_the_whole_picture():
    pixels, model = picture(16 * 21 - 5, 16 * 18 - 1), tiny().model
    with torch.no_grad():
        whole = analyse(model, pixels, 4, quiet)
        seen = []
        parts = analyse(model, pixels, 4, seen.append, side=6)
        assert len(seen) == 12 and seen == sorted(seen) and seen[-1] == 1
        assert (whole != parts).float().mean() <= 1e-4 and whole.any()
        one = synthesize(model, whole, 4, *pixels.shape[1:], quiet).int()
        many = synthesize(model, whole, 4, *pixels.shape[1:], quiet, side=6).int()
    assert (one - many).abs().max() <= 1 and (one != many).float().mean() < 1e-3
    assert one.float().std() > 10


def test_a_block_needs_all_that_lies_around_it():
    """The margin is no larger than it must be by more than a latent: with a smaller one, seams appear."""
    from vlkern.models.elic import margin

    model, pixels = tiny().model, picture(16 * 12, 16 * 12)
    changed = pixels.clone()
    changed[:, :16] = 255 - changed[:, :16]
    with torch.no_grad():
        moved = (model.analysis(pixels[None] / 127.5 - 1, 4) != model.analysis(changed[None] / 127.5 - 1, 4))[0]
    reached = int(moved.any(0).any(1).nonzero().max())
    assert reached in (margin(model.encoder), margin(model.encoder) - 1)


def test_errors_say_what_came():
    good = codec.compress(picture(70, 90), batch=1, codec=tiny())
    header = bytearray(good)
    cases = {
        b"": "no picture of vlkern",
        b"\x89PNG\r\n" + bytes(50): "no picture of vlkern",
        good[:-1]: f"cut short: expected {len(good)} bytes, got {len(good) - 1}",
        good + b"\0": f"continued: expected {len(good)} bytes, got {len(good) + 1}",
        good[:40]: "cut short: the header needs",
        good[:20] + b"\0\0\0\0" + good[24:]: "damaged header: a picture must have 1 to",
        good[:30] + b"?" + good[31:]: "damaged header: its checksum is another",
        good[:-1] + bytes([good[-1] ^ 1]): "segment 3: damaged, its checksum is another",
    }
    for data, message in cases.items():
        with pytest.raises(codec.DamagedFile, match=message):
            codec.decompress(data, codec=tiny())
    header[4] = 2
    with pytest.raises(codec.Mismatch, match="version 2, expected 1: a newer vlkern"):
        codec.decompress(bytes(header), codec=tiny())
    with pytest.raises(codec.Mismatch, match=f"made with the model {tiny().name('float').hex()}, this one is"):
        codec.decompress(good, codec=tiny(1))


def test_small_files_get_no_memory():
    """A header with right checksums that claims a huge picture, in streams that could not hold it."""
    header = Header("float", 0, 64, tiny().name("float"), 1 << 14, 1 << 14, 16, 128)
    segments = [Segment(bytes(16), 0)] * len(header.spans())
    with pytest.raises(codec.DamagedFile, match="segment 0: 1 bytes cannot hold"):
        read(write(header, [Segment(b"\0", 0), *segments[1:]]))


def test_other_probabilities_are_noticed():
    """As another machine would compute them: nearly the same."""
    data = codec.compress(picture(70, 90), quality=4, codec=tiny())
    other = models.create("m2t-tiny")
    other.load_state_dict(tiny().model.state_dict())
    with torch.no_grad():
        other.entropy.norm.weight += 1e-2
    pretender = codec.Codec(other)
    pretender.name = tiny().name
    with pytest.raises(codec.Mismatch, match=r"segment 0: the bytes are whole, but .* `--exact integer`"):
        codec.decompress(data, codec=pretender)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"image": "x.png"}, TypeError, "image must be a PIL.Image.Image or a tensor, got str"),
        ({"image": torch.zeros(3, 8, 8)}, TypeError, "image must be uint8, got torch.float32"),
        ({"image": torch.zeros(1, 8, 8, dtype=torch.uint8)}, ValueError, r"\[3, H, W\], got \[1, 8, 8\]"),
        ({"image": torch.zeros(3, 0, 8, dtype=torch.uint8)}, ValueError, "must have 1 to 268435456 pixels, got 8 x 0"),
        ({"quality": 5}, ValueError, "quality must be a whole number from 0 to 4, got 5"),
        ({"quality": 1.5}, ValueError, "quality must be a whole number"),
        ({"exact": "integer"}, ValueError, "exact must be float with this model, got 'integer'"),
        ({"exact": "maybe"}, ValueError, "exact must be one of float, integer, got 'maybe'"),
        ({"batch": 65}, ValueError, "batch must be a whole number from 1 to 64, got 65"),
    ],
)
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=message):
        codec.compress(**{"image": picture(8, 8), "codec": tiny(), **given})


def test_mt_has_no_steps():
    from dataclasses import replace

    from vlkern.models.m2t import M2T, PRESETS

    with pytest.raises(ValueError, match="model must be M2T, got MT"):
        codec.Codec(M2T(replace(PRESETS["m2t-tiny"], bidirectional=True)))


def test_progress_rises_to_one():
    seen = []
    data = codec.compress(picture(130, 130), codec=tiny(), batch=2, show=seen.append)
    codec.decompress(data, codec=tiny(), show=seen.append)
    half = seen.index(1.0) + 1
    for part in (seen[:half], seen[half:]):
        assert part == sorted(part) and part[-1] == 1 and len(part) > 3


def test_corrupted_files_are_refused():
    found = refuse(300)
    assert found["seconds"] < 1 and found["MiB"] < 100
    assert len(found) == 12 and len(set(originals())) == 5


def test_the_order_of_the_format_is_frozen():
    """Another order or other groups would read version 1 as noise."""
    order, sizes = schedules.low_discrepancy(16), schedules.groups(256, 8, 2.2)
    assert order[:4] == ((4, 1), (0, 10), (12, 3), (8, 12)) and sizes == (3, 9, 18, 26, 35, 45, 55, 65)
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == "f282d3d3032ccbda"
