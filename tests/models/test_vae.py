"""The beta-VAEs: latents as tokens, noise and divergence, files, sizes of the paper, and what they say of bad input."""

import dataclasses
import math

import pytest
import torch

from vlkern import models
from vlkern.layers.init import shapes_only
from vlkern.models import vae
from vlkern.models.conv_autoencoder import ConvConfig
from vlkern.models.vae import Vae, VaeConfig, kl_divergence
from vlkern.models.vit_vae import Labels, VitVae, VitVaeConfig
from vlkern.recipes.vae import label_loss

SMALL = VaeConfig(3, 16, network=ConvConfig(8, (1, 2), blocks=1, groups=4))
LABELS = VitVaeConfig((16, 24), 8, 16, 2, 24, (1, 1), tokens=4, dim=3, labels=(Labels("a", 1, 4), Labels("b", 0, 3)))


def test_sizes_of_the_paper():
    with shapes_only():
        model = models.create("givt-vae-256")
    assert model.config.grid == (16, 16) and model.config.dim == 16
    wide = vae.PRESETS["givt-vae-512-shuffled"]
    assert (wide.tokens, wide.dim) == (512, 32)
    with shapes_only():
        panoptic = models.create("givt-vae-panoptic")
    # Twelve and six blocks of ViT-B, and the patches of all 234 classes on both sides.
    assert sum(p.numel() for p in panoptic.parameters()) / 1e6 == pytest.approx(221.3, abs=0.05)


@pytest.mark.parametrize("shuffle", [(1, 2), (2, 1), (2, 4)])
def test_shuffled_latents_are_the_same(shuffle):
    """A token is the cells of a rectangle, and knows them in the order channel, row, column."""
    plain = Vae(SMALL)
    wide = Vae(dataclasses.replace(SMALL, shuffle=shuffle))
    wide.load_state_dict(plain.state_dict())
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    means, tokens = plain.encode(pixels)[0], wide.encode(pixels)[0]
    p, q = shuffle
    assert tokens.shape == (2, 64 // (p * q), 3 * p * q)
    cells = means.unflatten(1, (8, 8))
    row, column = 1, 1
    corner = cells[:, row * p : (row + 1) * p, column * q : (column + 1) * q]
    number = row * (8 // q) + column
    assert torch.equal(tokens[:, number], corner.permute(0, 3, 1, 2).flatten(1))
    torch.testing.assert_close(wide.decode(tokens), plain.decode(means))


def test_noise_and_divergence():
    mean, logvar = torch.tensor([[[0.5, -1.0]]]), torch.tensor([[[0.0, math.log(4.0)]]])
    generator = torch.Generator().manual_seed(0)
    z = torch.stack([Vae.sample(mean, logvar, generator) for _ in range(4000)])
    torch.testing.assert_close(z.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(z.std(0), (logvar / 2).exp(), atol=0.08, rtol=0)
    ours = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


@pytest.mark.parametrize(("kind", "config"), [(Vae, SMALL), (VitVae, LABELS)])
def test_files(kind, config, tmp_path):
    model = kind(config)
    models.save_pretrained(model, tmp_path)
    again = models.load_pretrained(tmp_path)
    assert type(again) is kind and again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_labels_that_are_no_class():
    """Nothing is known of such a pixel: its planes are zero, and it has no part in the loss."""
    model = VitVae(LABELS)
    maps = torch.randint(1, 3, (2, 2, 16, 24))
    odd = maps.clone()
    odd[0, :, 3, 5] = -1
    assert torch.equal(model._one_hot(odd)[0, :, 3, 5], torch.zeros(7))
    logits = {"a": torch.zeros(2, 4, 16, 24), "b": torch.zeros(2, 3, 16, 24)}
    logits["a"][0, :, 3, 5] = torch.tensor([9.0, -9.0, 0.0, 0.0])
    expected = torch.full((2,), math.log(4) + math.log(3))
    torch.testing.assert_close(label_loss(odd, logits, LABELS.labels), expected)
    assert label_loss(maps, logits, LABELS.labels)[0] > expected[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"shuffle": (0, 1)}, r"shuffle must be two positive integers, got \(0, 1\)"),
        ({"shuffle": (1, 3)}, "shuffle must divide the grid of 8 x 8 cells"),
        ({"image_size": 17}, "image_size must be a positive multiple of 2"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": 12, "groups": 8}, "filters must be a multiple of groups, got 12 and 8"),
        ({"multipliers": ()}, "multipliers must be positive integers"),
        ({"blocks": 0}, "blocks must be a positive integer, got 0"),
        ({"downsample": "max"}, "downsample must be one of mean, conv, got 'max'"),
        ({"skip": "none"}, "skip must be one of input, result, got 'none'"),
    ],
)
def test_bad_networks(change, message):
    with pytest.raises(ValueError, match=message):
        ConvConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "image_size must be multiples of the patch 5"),
        ({"resize": True, "tokens": 5}, "tokens must be a square number to be a grid, got 5"),
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"dim": 0}, "dim must be a positive integer, got 0"),
    ],
)
def test_bad_transformers(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LABELS, **change)


def test_bad_input():
    model, labelled = Vae(SMALL), VitVae(LABELS)
    with pytest.raises(TypeError, match=r"pixels must be a tensor of floating-point numbers in \[-1, 1\], got torch"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixels must have shape \[B, 3, 16, 16\], got \[1, 3, 16, 8\]"):
        model.encode(torch.zeros(1, 3, 16, 8))
    for each, size in ((model, (64, 3)), (labelled, (4, 3))):
        with pytest.raises(ValueError, match=rf"z must have shape \[B, {size[0]}, {size[1]}\], got \[1, 5, 3\]"):
            each.decode(torch.zeros(1, 5, 3))
    with pytest.raises(TypeError, match="inputs must be a tensor of uint8, int32 or int64, got torch"):
        labelled.encode(torch.zeros(1, 2, 16, 24))
    with pytest.raises(ValueError, match=r"inputs must have shape \[B, 2, 16, 24\], got \[1, 1, 16, 24\]"):
        labelled.encode(torch.zeros(1, 1, 16, 24, dtype=torch.int64))
