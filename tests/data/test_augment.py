import torch

from vlkern.data.augment import augment


def test_same_seed_same_pictures():
    pixels = torch.rand(6, 3, 16, 16) * 2 - 1
    a, b, c = (augment(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == pixels.shape and a.dtype == torch.float32


def test_white_stays_plain():
    """What comes in from outside is white, so a white picture keeps a single colour."""
    out = augment(torch.ones(8, 3, 16, 16), torch.Generator().manual_seed(0))
    assert (out - out[:, :, :1, :1]).abs().max() < 1e-5


def test_half_are_mirrored():
    """A picture that is dark on the left is dark on the right about half of the time."""
    pixels = torch.ones(400, 3, 16, 16)
    pixels[..., :8] = -1
    out = augment(pixels, torch.Generator().manual_seed(0)).mean(dim=(1, 2))
    mirrored = (out[:, 8:].mean(1) < out[:, :8].mean(1)).float().mean().item()
    assert 0.4 < mirrored < 0.6
