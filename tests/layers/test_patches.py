"""The size rule, patches and packed batches against big_vision's arrays and transformers' functions."""

import numpy as np
import pytest
import torch
from rooms import ROOT

from vlkern.layers.patches import (
    check_shapes,
    from_padded,
    grid_within,
    pack_pictures,
    patchify,
    places,
    resize_within,
    segments,
    to_padded,
    unpatchify,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/naflex_size_table.npz") as file:
        return {key: file[key] for key in file.files}


def test_sizes_as_big_vision_finds_them(golden):
    rows = zip(*(golden[f"in/{name}"].tolist() for name in ("h", "w", "patch", "max_len")), strict=True)
    got = [tuple(side * patch for side in grid_within(h, w, patch, most)) for h, w, patch, most in rows]
    wanted = list(zip(golden["out/h"].tolist(), golden["out/w"].tolist(), strict=True))
    assert got == wanted


def test_sizes_as_transformers_finds_them():
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    rule = module.get_image_size_for_max_num_patches
    generator = torch.Generator().manual_seed(0)
    for h, w in torch.randint(1, 3000, (300, 2), generator=generator).tolist():
        for patch, most in ((16, 256), (14, 1000), (8, 1), (16, 7)):
            assert tuple(s * patch for s in grid_within(h, w, patch, most)) == rule(h, w, patch, most)


@pytest.mark.parametrize("image", [0, 1, 2])
def test_pictures_as_big_vision_cuts_them(golden, image):
    patch, most = golden[f"in/image{image}_patch_maxlen"].tolist()
    pixels = torch.from_numpy(golden[f"in/image{image}"]).permute(2, 0, 1)
    resized = resize_within(pixels.float(), patch, most)
    want = torch.from_numpy(golden[f"out/image{image}_resized"]).permute(2, 0, 1)
    torch.testing.assert_close(resized, want, rtol=0, atol=2e-3)
    assert resize_within(pixels, patch, most).dtype == torch.uint8
    assert (resize_within(pixels, patch, most).float() - want).abs().max() <= 0.51

    patches, shapes = pack_pictures([want], patch)
    expected = torch.from_numpy(golden[f"out/image{image}_patches"])
    n = int(golden[f"out/image{image}_type"].sum())
    assert torch.equal(patches, expected[:n])
    at = places(shapes, n)
    assert at.row.tolist() == golden[f"out/image{image}_yidx"][:n].tolist()
    assert at.column.tolist() == golden[f"out/image{image}_xidx"][:n].tolist()


def test_a_picture_of_the_right_size_stays():
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(resize_within(pixels, 8, 64), pixels)


def test_places():
    shapes = torch.tensor([[2, 3], [1, 1], [3, 1]])
    at = places(shapes, 10)
    assert at.cu_seqlens.tolist() == segments(shapes).tolist() == [0, 6, 7, 10]
    assert at.start.tolist() == [0] * 6 + [6] + [7] * 3
    assert at.stop.tolist() == [6] * 6 + [7] + [10] * 3
    assert at.row.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 2]
    assert at.column.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 0, 0]
    assert at.h.tolist() == [2] * 6 + [1] + [3] * 3
    assert {t.dtype for t in at} == {torch.int32}


def test_packing_and_back():
    pictures = [torch.randint(0, 256, (3, 8 * h, 8 * w), dtype=torch.uint8) for h, w in ((2, 3), (1, 1), (4, 2))]
    patches, shapes = pack_pictures(pictures, 8)
    assert patches.shape == (15, 192) and shapes.dtype == torch.int32
    for part, (h, w), picture in zip(patches.split([6, 1, 8]), shapes.tolist(), pictures, strict=True):
        assert torch.equal(unpatchify(part, h, w), picture)
    # (row, column, channel) inside a patch: the second patch of the first picture
    assert torch.equal(patches[1].view(8, 8, 3).permute(2, 0, 1), pictures[0][:, :8, 8:16])


def test_padded_and_back():
    patches, shapes = torch.rand(11, 5).log(), torch.tensor([[2, 3], [1, 1], [4, 1]], dtype=torch.int32)
    values, mask, spatial = to_padded(patches, shapes, 7)
    assert values.shape == (3, 7, 5) and spatial.dtype == torch.int64
    assert mask.sum(1).tolist() == [6, 1, 4]
    assert not values[~mask.bool()].any()
    again, sizes = from_padded(values, mask, spatial)
    assert torch.equal(again, patches) and torch.equal(sizes, shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 16, 256), "height must be a whole number above 0, got 0"),
        ((5, 0, 16, 256), "width must be a whole number above 0, got 0"),
        ((5, 5.5, 16, 256), "width must be a whole number above 0, got 5.5"),
        ((5, 5, 0, 256), "patch must be a whole number above 0, got 0"),
        ((5, 5, 16, 0), "max_patches must be a whole number above 0, got 0"),
        ((5, 5, 16, True), "max_patches must be a whole number above 0, got True"),
        ((10**9, 1, 16, 2), "must fit 2 patches at a millionth, got 1000000000 x 1"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_within(*arguments)


@pytest.mark.parametrize(
    ("shapes", "kind", "message"),
    [
        ([[1, 2]], TypeError, "shapes must be a tensor, got list"),
        (torch.tensor([[1.0, 2.0]]), TypeError, "shapes must be int32 or int64, got torch.float32"),
        (torch.tensor([1, 2]), ValueError, r"shapes must be \[S, 2\].*, got \[2\]"),
        (torch.zeros(0, 2, dtype=torch.int32), ValueError, r"at least one picture, got \[0, 2\]"),
        (torch.tensor([[2, 3], [0, 4]]), ValueError, r"at least 1 x 1 patch, got \[0, 4\] for picture 1"),
        (torch.tensor([[-2, -3]]), ValueError, r"at least 1 x 1 patch, got \[-2, -3\] for picture 0"),
        (torch.tensor([[2, 2], [1, 1]]), ValueError, "as many patches as there are, 6, got 5 in 2 pictures"),
    ],
)
def test_shapes_that_do_not_fit(shapes, kind, message):
    with pytest.raises(kind, match=message):
        check_shapes(shapes, 6)


def test_what_cannot_be_packed_or_padded():
    with pytest.raises(ValueError, match="pictures must be at least one, got none"):
        pack_pictures([], 8)
    with pytest.raises(ValueError, match=r"multiples of the patch 8, got \[3, 8, 12\]"):
        patchify(torch.zeros(3, 8, 12), 8)
    with pytest.raises(ValueError, match=r"not empty, got \[3, 0, 8\]"):
        resize_within(torch.zeros(3, 0, 8), 8, 4)
    with pytest.raises(ValueError, match=r"a picture \[3, H, W\]"):
        resize_within(torch.zeros(1, 8, 8), 8, 4)
    shapes = torch.tensor([[1, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"length must be .*, got 5 for picture 1 of \[2, 3\] patches"):
        to_padded(torch.zeros(7, 2), shapes, 5)
    values, mask, spatial = to_padded(torch.zeros(7, 2), shapes, 6)
    with pytest.raises(ValueError, match="the first h w slots of each picture, and only there"):
        from_padded(values, mask.flip(1), spatial)
    with pytest.raises(ValueError, match=r"pixel_attention_mask must have shape \[2, 6\], got \[2, 5\]"):
        from_padded(values, mask[:, :5], spatial)
    with pytest.raises(ValueError, match=r"spatial_shapes must have shape \[2, 2\]"):
        from_padded(values, mask, spatial[:1])
