"""The FSQ autoencoder: sizes of the paper, tokens and codes, gradient, files, and what it says of bad input."""

import dataclasses

import pytest
import torch

from vlkern import models, ops
from vlkern.layers.init import shapes_only
from vlkern.models.conv_autoencoder import ConvConfig, ResBlock
from vlkern.models.fsq_autoencoder import FsqAutoencoder, FsqConfig

SMALL = FsqConfig((5, 3), 16, 12, ConvConfig(8, (1, 2), blocks=1, groups=4))


def test_sizes_of_the_paper():
    """MaskGIT's 23.61 and 30.56 million; its codebook of 0.26 million has no counterpart."""
    with shapes_only():
        model = models.create("fsq-maskgit-256")
    encoder, decoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder))
    assert encoder == pytest.approx(23.61, abs=0.005) and decoder == pytest.approx(30.56, abs=0.005)
    assert (model.config.codes, model.config.tokens, model.config.downsampling) == (1000, 256, 16)
    with shapes_only():
        tiny = models.create("fsq-tiny").config
    assert (tiny.codes, tiny.grid) == (240, (8, 8))


@pytest.mark.parametrize("skip", ["input", "result"])
def test_a_block_by_hand(skip):
    block = ResBlock(ConvConfig(8, (1,), groups=4, skip=skip), 8, 12).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)

    def norm_swish(norm, x):
        groups = x.unflatten(1, (4, -1))
        mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
        y = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
        return y * y.sigmoid()

    y = block.conv1(norm_swish(block.norm1, x))
    y = block.conv2(norm_swish(block.norm2, y))
    torch.testing.assert_close(block(x), y + block.skip(y if skip == "result" else x))


def test_tokens():
    torch.manual_seed(0)
    model = FsqAutoencoder(SMALL)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    reconstruction, indices = model(pixels)
    assert indices.shape == (3, 8, 8) and indices.dtype == torch.int64
    assert indices.min() >= 0 and indices.max() < SMALL.codes
    assert torch.equal(model.encode(pixels), indices)
    decoded = model.decode(indices)
    torch.testing.assert_close(decoded, reconstruction.clamp(-1, 1))
    assert torch.equal(model.decode(indices.int()), decoded)
    codes, _ = model.quantize(pixels)
    assert torch.equal(codes, ops.fsq_dequantize(indices, SMALL.levels))


def test_gradients_pass_the_rounding():
    """Every parameter learns, those of the encoder through codes that are steps."""
    torch.manual_seed(0)
    model = FsqAutoencoder(SMALL)
    reconstruction, _ = model(torch.rand(3, 3, 16, 16) * 2 - 1)
    reconstruction.square().sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0] == []


def test_files(tmp_path):
    model = FsqAutoencoder(SMALL)
    models.save_pretrained(model, tmp_path)
    again = models.load_pretrained(tmp_path)
    assert type(again) is FsqAutoencoder and again.config == SMALL
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.encode(pixels), model.encode(pixels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (8, 1)}, r"levels must be integers above 1, one for each channel, got \(8, 1\)"),
        ({"levels": [8, 5]}, r"levels must be integers above 1, one for each channel, got \[8, 5\]"),
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"image_size": 17}, "image_size must be a positive multiple of 2, a token's side, got 17"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_bad_input():
    model = FsqAutoencoder(SMALL)
    with pytest.raises(ValueError, match=r"pixels must have shape \[B, 3, 16, 16\], got \[3, 16, 16\]"):
        model.encode(torch.zeros(3, 16, 16))
    with pytest.raises(TypeError, match="indices must be a tensor of int32 or int64, got torch"):
        model.decode(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 8, 8\], got \[1, 64\]"):
        model.decode(torch.zeros(1, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 15\), or -1 for NaN, got 15"):
        model.decode(torch.full((1, 8, 8), 15))
