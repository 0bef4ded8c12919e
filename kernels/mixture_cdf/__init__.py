"""Rows of cumulative probabilities of mixtures, in whole numbers; the maths is in README.md."""

from typing import Any

import torch

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.mixture_cdf import reference, samples
from vlkern.kernels.mixture_cdf.table import MOST_MEAN, MOST_SIZE, MOST_SYMBOL, WEIGHTS

_DTYPES = {"means": torch.int32, "scales": torch.uint8, "weights": torch.int16, "low": torch.int32}
Components = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def check_components(means: Any, scales: Any, weights: Any) -> Components:
    """The three, if they are mixtures as whole numbers. Values are looked at where that costs no wait for a GPU."""
    found = {"means": means, "scales": scales, "weights": weights}
    for name, value in found.items():
        if _checks.tensor(name, value).dtype != _DTYPES[name]:
            raise TypeError(f"{name} must be {_DTYPES[name]}, got {value.dtype}")
        if name == "means":
            if means.dim() < 2 or means.shape[-2] == 0:
                raise ValueError(f"means must have shape [..., K, C] with at least one component, got {[*means.shape]}")
            continue
        _checks.shape(name, value, tuple(means.shape))
        _checks.on_device(name, value, "means", means)
    if means.numel() and _checks.values_may_be_read(means, scales, weights):
        _check_values(means, scales, weights)
    return means, scales, weights


def _check_values(means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> None:
    low, high = (int(end) for end in means.aminmax())
    if not -MOST_MEAN <= low <= high <= MOST_MEAN:
        raise ValueError(f"means must lie within +-2^23, got {low} to {high}")
    if (largest := int(scales.max())) > 63:
        raise ValueError(f"scales must be from 0 to 63, got {largest}")
    if (least := int(weights.min())) < 0:
        raise ValueError(f"weights must be at least 0, got {least}")
    low, high = (int(end) for end in weights.sum(-2, dtype=torch.int32).aminmax())
    if not low == high == WEIGHTS:
        raise ValueError(f"weights must sum to {WEIGHTS} over the components, got sums from {low} to {high}")


def _check(means: Any, scales: Any, weights: Any, low: Any, size: Any) -> tuple[Any, ...]:
    means, scales, weights = check_components(means, scales, weights)
    if _checks.tensor("low", low).dtype != torch.int32:
        raise TypeError(f"low must be torch.int32, got {low.dtype}")
    _checks.shape("low", low, (*means.shape[:-2], means.shape[-1]))
    _checks.on_device("low", low, "means", means)
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be a whole number, got {type(size).__name__}")
    if not 1 <= size <= MOST_SIZE:
        raise ValueError(f"size must be from 1 to {MOST_SIZE}, got {size}")
    if low.numel() and _checks.values_may_be_read(low):
        first, last = (int(end) for end in low.aminmax())
        if first <= -MOST_SYMBOL or last + size > MOST_SYMBOL:
            raise ValueError(f"low and low + size must lie within +-2^16, got {first} to {last} and size {size}")
    return means, scales, weights, low, size


def _bind(means: Any, scales: Any, weights: Any, low: Any, size: Any) -> tuple[Any, ...]:
    """And, for `work`, what is written."""
    arguments = _check(means, scales, weights, low, size)
    return *arguments, torch.empty((*low.shape, size + 2), dtype=torch.int32, device="meta")


_op = Op(
    "mixture_cdf",
    public="mixture_cdf",
    schemas={
        "mixture_cdf": "(Tensor means, Tensor scales, Tensor weights, Tensor low, int size) -> Tensor",
        "mixture_window": "(Tensor means, Tensor scales, Tensor weights) -> (Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton", "cuda"),
    bind=_bind,
    work=samples.work,
    dtypes=(torch.int32,),
    differentiable=False,
)
_rows, _window = _op.raw["mixture_cdf"], _op.raw["mixture_window"]


def mixture_cdf(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, size: int
) -> torch.Tensor:
    """Cumulative frequencies of mixtures of Gaussians over whole numbers, for a coder that needs them exact.

        F(k) = floor(sum_m w_m phi((256 k + 128 - mu_m) / SIG[s_m]) / 2^12)       2^30 times the mixture up to k + 1/2
        row  = 0, ..., floor((F(low + j - 1) - F(low - 1)) (65535 - size) / 2^30) + j, ..., 65536         1 <= j <= size

    A row has `size` bins for the symbols low, low + 1, ... and an escape for all others; it rises strictly from 0 to
    65536. phi is a table of Phi with straight lines between its entries. Every number is a whole one, so that all
    backends and machines give the same row, and each entry can be had without the others.

    Args:
        means: [..., K, C] int32, in 1/256, at most 2^23 in size.
        scales: [..., K, C] uint8, of 64 standard deviations from 0.11 to 256 in equal steps of their logarithms.
        weights: [..., K, C] int16, at least 0, their sum over K 4096.
        low: [..., C] int32, the first symbol of each row; see `mixture_window`.
        size: symbols of a row, 1 to 4096; low and low + size lie within +-2^16.

    Returns:
        [..., C, size + 2] int32. No gradient.

    Raises:
        TypeError: an argument has another dtype, or size is no whole number.
        ValueError: shapes or devices do not fit, or a value is out of range (values of tensors are looked at on the
            CPU, elsewhere and under compile only with `vlkern.validate(True)`; unseen, they give rows that mean
            nothing).

    Source: Balle et al., Integer Networks for Data Compression with Latent-Variable Models, 2019: why integers; the
        mixture is that of Mentzer et al., M2T: Masking Transformers Twice for Faster Decoding, 2023.

    Example:
        >>> mixtures = [[0], [256], [-512]], [[20], [30], [10]], [[2048], [1024], [1024]]
        >>> means, scales, weights = map(torch.tensor, mixtures)
        >>> low = torch.tensor([-4], dtype=torch.int32)
        >>> vlkern.ops.mixture_cdf(means.int(), scales.byte(), weights.short(), low, 8)
        tensor([[    0,   882,  4109, 21824, 32082, 43415, 52323, 56911, 58997, 65536]],
               dtype=torch.int32)
    """
    arguments = _check(means, scales, weights, low, size)
    rows: torch.Tensor = _rows[_op.choose(means)](*arguments)
    return rows


def mixture_window(
    means: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The symbols that each mixture makes likely: low ... low + 2 half - 1, around its mean.

        centre = floor((floor(sum_m w_m mu_m / 4096) + 128) / 256),    low = centre - half
        half   = the smallest power of two >= |mu_m / 256 - centre| + 6 SIG[s_m] / 256 for all w_m > 0, from 8 to 512

    So less than 2e-9 of the probability lies left of low or right of low + 2 half, but where half is held at 512. The
    last symbol is low + 2 half - 1: what a narrow component at that end has beyond it is coded as an escape. Rows of
    `mixture_cdf` are made for one size at a time; coders (`vlkern.coding`) use the window and need no rows.

    Args:
        means, scales, weights: as for `mixture_cdf`.

    Returns:
        low and half, [..., C] int32. No gradient.

    Raises:
        TypeError, ValueError: as `mixture_cdf`.

    Source: as `mixture_cdf`.

    Example:
        >>> shape = 3, 5
        >>> means, scales = torch.zeros(shape, dtype=torch.int32), torch.full(shape, 40, dtype=torch.uint8)
        >>> weights = torch.tensor([4096, 0, 0], dtype=torch.int16)[:, None].expand(shape)
        >>> low, half = vlkern.ops.mixture_window(means, scales, weights)
        >>> half
        tensor([128, 128, 128, 128, 128], dtype=torch.int32)
    """
    arguments = check_components(means, scales, weights)
    low, half = _window[_op.choose(means)](*arguments)
    return low, half
