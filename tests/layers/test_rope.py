"""The angles of rotary position embedding."""

import numpy as np
import pytest
import torch
from rooms import ROOT

from vlkern import ops
from vlkern.layers.rope import Rope


@pytest.mark.parametrize(("case", "base", "scale"), [(0, 1e4, 1.0), (1, 1e6, 8.0), (2, 1e4, 1.0)])
def test_agrees_with_gemma(case, base, scale):
    """Arrays from Gemma's own code, in float64: at positions up to 8000, with the scaled base of its global layers."""
    arrays = np.load(ROOT / "tests/golden/rope.npz")
    x, positions = torch.from_numpy(arrays[f"in/x{case}"]), torch.from_numpy(arrays[f"in/pos{case}"])
    cos, sin = Rope(x.shape[-1], base, scale)(positions.flatten())
    y = ops.norm_rope(x.flatten(0, 1), cos, sin).unflatten(0, positions.shape)
    torch.testing.assert_close(y.double(), torch.from_numpy(arrays[f"out/y{case}_f64"]), rtol=0, atol=1e-6)


def test_angles_far_away_are_exact():
    """At 128k tokens a float32 angle would be off by thousandths."""
    position, rope = 131_071, Rope(256, 1e4)
    cos, sin = rope(torch.tensor([position], dtype=torch.int32))
    j = np.arange(128, dtype=np.longdouble)
    angle = position * np.longdouble(1e4) ** (-j / 128)
    for ours, exact in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert ours.dtype == torch.float32 and ours.shape == (1, 128)
        assert np.abs(ours[0].numpy() - exact).max() < 1e-7


def test_no_positions():
    cos, _ = Rope(8, 1e4)(torch.empty(0, dtype=torch.int32))
    assert cos.shape == (0, 4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("head_dim must be even and positive, got 7", (7, 1e4)),
        ("head_dim must be even and positive, got 0", (0, 1e4)),
        ("base and scale must be positive", (8, 0.0)),
        ("base and scale must be positive", (8, 1e4, float("nan"))),
    ],
)
def test_bad_input(message, arguments):
    with pytest.raises(ValueError, match=message):
        Rope(*arguments)
