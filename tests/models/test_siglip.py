"""The SigLIP model by itself: presets, initial values, bad input."""

import pytest
import torch

from vlkern import models
from vlkern.models.siglip import PRESETS, TextConfig, VisionConfig


def test_initial_values():
    torch.manual_seed(0)
    model = models.create("siglip-tiny")
    assert model.logit_scale.exp().item() == pytest.approx(10.0)
    assert model.logit_bias.item() == -10.0
    width = model.config.text.width
    assert model.text_model.embeddings.token_embedding.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    fc1 = model.vision_model.encoder.layers[0].mlp.fc1
    bound = (6 / (fc1.in_features + fc1.out_features)) ** 0.5
    assert 0.99 * bound < fc1.weight.abs().max().item() <= bound
    assert 0 < fc1.bias.abs().max().item() < 1e-5
    assert model.text_model.head.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)


def test_pads_are_ordinary_tokens():
    """There is no mask: changing a pad's vector changes the embedding of the text."""
    torch.manual_seed(0)
    model = models.create("siglip-tiny")
    ids = torch.zeros(1, model.config.text.length, dtype=torch.long)
    ids[0, :3] = torch.tensor([70, 80, 1])
    with torch.no_grad():
        before = model.encode_text(ids)
        model.text_model.embeddings.token_embedding.weight[0].neg_()
        assert (model.encode_text(ids) - before).abs().max() > 1e-3


def test_bad_input():
    model = models.create("siglip-tiny")
    h, w = model.config.vision.image_size
    length = model.config.text.length
    with pytest.raises(ValueError, match=rf"pixels must have shape \[B, 3, {h}, {w}\], got \[2, 3, 8, 8\]"):
        model.encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=rf"ids must have shape \[B, {length}\], got \[2, 5\]"):
        model.encode_text(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"name must be one of .*'sigilp-tiny' \(did you mean 'siglip-tiny'\?\)"):
        models.create("sigilp-tiny")
    with pytest.raises(TypeError, match=r"pixels must be floating-point numbers in \[-1, 1\], got torch.uint8"):
        model.encode_image(torch.zeros(2, 3, h, w, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch.float32"):
        model.encode_text(torch.zeros(2, length))
    for wrong in (-1, model.config.text.vocabulary):
        with pytest.raises(ValueError, match=f"ids must be from 0 to 2047, got {wrong}"):
            model.encode_text(torch.full((2, length), wrong))
    assert model.encode_text(torch.zeros(0, length, dtype=torch.int32)).shape == (0, 192)


def test_unknown_preset():
    with pytest.raises(
        ValueError, match=r"name must be one of .*'siglip2-base-16' \(did you mean 'siglip2-base-.*'\?\)"
    ):
        models.create("siglip2-base-16")
    with pytest.raises(ValueError, match=r"got 'resnet'$"):
        models.create("resnet")
    assert set(PRESETS) <= set(models.list_models())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10, "heads": 3}, "width must be a multiple of heads, got 10 and 3"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"mlp": 2.5}, "mlp must be a positive integer, got 2.5"),
        ({"patch": -8}, "patch must be a positive integer, got -8"),
        ({"image_size": (0, 32)}, r"image_size must be two positive integers \(H, W\), got \(0, 32\)"),
        ({"image_size": 32}, r"image_size must be two positive integers \(H, W\), got 32"),
        ({"image_size": (32, 7)}, r"image_size must be at least one patch of 8 x 8, got \(32, 7\)"),
    ],
)
def test_impossible_sizes(change, message):
    sizes = {"width": 24, "depth": 1, "heads": 3, "mlp": 48, "image_size": (32, 32), "patch": 8}
    with pytest.raises(ValueError, match=message):
        VisionConfig(**{**sizes, **change})
    with pytest.raises(ValueError, match="length must be a positive integer, got 0"):
        TextConfig(24, 1, 3, 48, 100, 0)


def test_pixels_take_the_dtype_of_the_weights():
    torch.manual_seed(0)
    model = models.create("siglip-tiny").bfloat16()
    pixels = torch.rand(2, 3, *model.config.vision.image_size) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels), model.encode_image(pixels.bfloat16()))
