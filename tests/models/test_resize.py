"""Positions and patches of another size."""

import pytest
import torch
import torch.nn.functional as F
from goldens import Golden, assert_close
from peers import load

from vlkern import models
from vlkern.models import resize
from vlkern.models.siglip import resized


@pytest.mark.parametrize("size", [[16, 16], [8, 8], [24, 12], [7, 33], [1, 50], [5, 3], [40, 2], [17, 15], [64, 64]])
def test_positions_as_naflex_resizes_them(size):
    golden = Golden("naflex_posemb_resize")
    key = f"h{size[0]}_w{size[1]}"
    table = golden["in/pos_emb"].flatten(0, 1).requires_grad_()
    moved = resize.positions(table, (16, 16), tuple(size))
    assert_close(moved.unflatten(0, size), golden[f"out/{key}"], 2e-5)
    (gradient,) = torch.autograd.grad((moved.unflatten(0, size) * golden[f"in/cotangent_{key}"]).sum(), table)
    assert_close(gradient.unflatten(0, (16, 16)), golden[f"grad/{key}"], 5e-5)


@pytest.mark.parametrize(("old", "new"), [(7, 14), (14, 10), (5, 5), (4, 9), (16, 7)])
def test_positions_as_big_visions_loader_resizes_them(old, new):
    golden = Golden("vit_resample_posemb")
    table = golden[f"in/{old}to{new}"][0]
    moved = resize.positions(table, (old, old), (new, new), align_corners=True)
    assert_close(moved, golden[f"out/{old}to{new}"][0], 2e-5)


def test_positions_of_a_strip():
    """One axis of length 1: between corner points of value 0 and 8, a triangle filter is linear."""
    table = torch.tensor([[0.0], [8.0]])
    moved = resize.positions(table, (2, 1), (4, 3)).reshape(4, 3)
    torch.testing.assert_close(moved, torch.tensor([0.0, 2.0, 6.0, 8.0])[:, None].expand(4, 3))


def test_positions_keep_dtype_and_constants():
    table = torch.full((12, 5), 0.75, dtype=torch.bfloat16)
    moved = resize.positions(table, (3, 4), (7, 2))
    assert moved.dtype == torch.bfloat16 and torch.equal(moved, torch.full((14, 5), 0.75, dtype=torch.bfloat16))
    assert resize.positions(table, (3, 4), (3, 4)) is table
    with pytest.raises(ValueError, match=r"weight must have shape \[9, D\], got \[12, 5\]"):
        resize.positions(table, (3, 3), (2, 2))


@pytest.mark.parametrize(("old", "new"), [(14, 16), (8, 12), (7, 8)])
def test_larger_patches_give_the_same_numbers(old, new):
    """A patch that is resized to more pixels and read with the new weights gives exactly what it gave."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, old, old, dtype=torch.float64)
    patch = torch.randn(4, 3, old, old, dtype=torch.float64)
    larger = F.interpolate(patch, size=(new, new), mode="bilinear", antialias=True)
    got = F.conv2d(larger, resize.patches(weight, new))
    torch.testing.assert_close(got, F.conv2d(patch, weight), rtol=1e-9, atol=1e-9)


def test_smaller_patches_have_the_least_squared_error():
    """Over white noise, the gradient of the expected squared error is zero: R (w - R^T v R) R^T = 0."""
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    v = resize.patches(weight, 14)
    eye = torch.eye(16, dtype=torch.float64)[None, None]
    matrix = F.interpolate(eye, size=(14, 16), mode="bilinear", antialias=True)[0, 0]
    error = weight - matrix.T @ v @ matrix
    assert error.abs().max() > 0.1
    assert (matrix @ error @ matrix.T).abs().max() < 1e-10


@pytest.mark.parametrize(("old", "new"), [(16, 14), (8, 12), (16, 32)])
def test_patches_as_timm_resizes_them(old, new):
    load("timm")
    from timm.layers import resample_patch_embed

    torch.manual_seed(0)
    weight = torch.randn(6, 3, old, old)
    expected = resample_patch_embed(weight, [new, new], interpolation="bilinear", antialias=True)
    assert_close(resize.patches(weight, new), expected, 1e-4)


def test_resized_model():
    torch.manual_seed(0)
    model = models.create("siglip-tiny").eval()
    c = model.config
    larger = resized(model, (48, 64), patch=6)
    assert larger.config.vision.grid == (8, 10) and larger.config.text == c.text
    assert not larger.training
    image, text = larger(torch.rand(2, 3, 48, 64), torch.zeros(2, c.text.length, dtype=torch.long))
    assert image.shape == text.shape
    # Nothing is shared, and nothing else changes.
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in larger.parameters():
            p.add_(1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        if "vision_model.embeddings" not in name or name.endswith("bias"):
            torch.testing.assert_close(larger.get_parameter(name) - 1, p.data)
    assert resized(model, 40).config.vision.image_size == (40, 40)


def test_the_same_size_is_the_same_model():
    torch.manual_seed(0)
    model = models.create("siglip-tiny")
    same = resized(model, model.config.vision.image_size)
    assert same.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 32), r"image_size must be two positive integers \(H, W\), got \(0, 32\)"),
        (-3, r"got \(-3, -3\)"),
        ((32, 4), r"image_size must be at least one patch of 8 x 8, got \(32, 4\)"),
        ((32, 32, 3), r"got \(32, 32, 3\)"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        resized(models.create("siglip-tiny"), size)
