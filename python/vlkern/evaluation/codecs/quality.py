"""How close a picture is to its original: PSNR and MS-SSIM."""

import math

import torch
import torch.nn.functional as F

#: Exponents of the five scales, finest first (Wang, Simoncelli and Bovik 2003, section 3.2).
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: Taps and standard deviation of the window.
TAPS, SIGMA = 11, 1.5
#: C1 and C2 of SSIM: (0.01 L)^2 and (0.03 L)^2, L = 255.
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
#: Taken off before squares are: variances are differences of squares, which float32 holds the better the smaller.
_GREY = 128.0
#: The shorter side must be at least this long: the window has to fit into the coarsest of five scales.
LEAST = TAPS * 2 ** (len(WEIGHTS) - 1)


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    for name, value in (("first", first), ("second", second)):
        if value.dtype != torch.uint8:
            raise TypeError(f"{name}: expected uint8, got {value.dtype}")
        if value.ndim != 3 or value.numel() == 0:
            raise ValueError(f"{name}: expected [C, H, W] with pixels, got {list(value.shape)}")
    if first.shape != second.shape:
        raise ValueError(f"second: expected the shape of first, {list(first.shape)}, got {list(second.shape)}")


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / mean squared error over all pixels and channels).

    Args:
        first: [C, H, W] uint8.
        second: [C, H, W] uint8.

    Returns:
        dB; infinite for equal pictures.

    Raises:
        TypeError: other dtypes.
        ValueError: other shapes.

    Example:
        >>> grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
        >>> round(psnr(grey, grey + 5), 2)
        34.15
    """
    _check(first, second)
    error = float((first.double() - second.double()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def _window() -> torch.Tensor:
    at = torch.arange(TAPS, dtype=torch.float32) - TAPS // 2
    taps = torch.exp(-at.square() / (2 * SIGMA**2))
    return taps / taps.sum()


def _blur(planes: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """[n, H, W] -> [n, H - 10, W - 10]: only where the whole window lies inside."""
    n = len(planes)
    rows = F.conv2d(planes, taps[:, None].expand(n, 1, -1, -1), groups=n)
    return F.conv2d(rows, taps.expand(n, 1, 1, -1), groups=n)


def _similarity(x: torch.Tensor, y: torch.Tensor, taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over each plane [n] of SSIM (luminance, contrast and structure), and of contrast and structure alone."""
    mu_x, mu_y, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y]), taps).chunk(5)
    structure = (2 * (xy - mu_x * mu_y) + _C2) / (xx - mu_x**2 + yy - mu_y**2 + _C2)
    mu_x, mu_y = mu_x + _GREY, mu_y + _GREY
    luminance = (2 * mu_x * mu_y + _C1) / (mu_x**2 + mu_y**2 + _C1)
    return (luminance * structure).flatten(1).mean(1), structure.flatten(1).mean(1)


def ms_ssim(first: torch.Tensor, second: torch.Tensor) -> float:
    """Structural similarity over five scales, mean of the channels; 1 for equal pictures.

    The product over scales of (contrast and structure)^weight, times luminance at the coarsest scale, where each scale
    halves the one before by means of 2 x 2 pixels (an odd row or column at the end is dropped). A negative mean counts
    as 0, as a power of it is not real.

    Args:
        first: [C, H, W] uint8, both sides at least 176.
        second: [C, H, W] uint8.

    Returns:
        At most 1.

    Raises:
        TypeError: other dtypes.
        ValueError: other shapes.

    Source:
        Wang, Simoncelli, Bovik: Multi-scale structural similarity for image quality assessment (Asilomar 2003).

    Example:
        >>> picture = torch.randint(256, (3, 176, 200), dtype=torch.uint8)
        >>> ms_ssim(picture, picture)
        1.0
    """
    _check(first, second)
    if min(first.shape[1:]) < LEAST:
        height, width = first.shape[1:]
        raise ValueError(f"first: expected sides of at least {LEAST} pixels for five scales, got {width} x {height}")
    x, y, taps = first.float() - _GREY, second.float() - _GREY, _window()
    product = torch.ones(len(x))
    for scale, weight in enumerate(WEIGHTS):
        whole, structure = _similarity(x, y, taps)
        last = scale == len(WEIGHTS) - 1
        product *= (whole if last else structure).clamp(min=0) ** weight
        if not last:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return float(product.mean())
