"""Finite scalar quantization as a layer, and how much of its codebook is in use."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from vlkern import ops
from vlkern.kernels.fsq.table import check_levels, check_variant
from vlkern.layers.linear import Linear

#: A histogram of more codes would be larger than most models.
MOST_COUNTED = 1 << 24


class FSQ(nn.Module):
    """Vectors -> codes on a small grid and their indices, between two optional projections.

    Counts in training and in evaluation how often each index came; a vector with a NaN is not counted.

    Args:
        levels: the number of levels L_c of each of the d channels, 2 to 1000.
        dim: width of the vectors outside; linear layers lead to d channels and back. None: the vectors have d channels.
        variant: "official" or "symmetric", see `vlkern.ops.fsq_quantize`.
        count: keep the histogram; it has one int64 for each code, at most 2^24 of them.

    Raises:
        TypeError: levels is not a sequence of ints, or dim not an int.
        ValueError: levels, dim or variant are out of range; more than 2^24 codes are to be counted.

    Source: Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, 2023.

    Example:
        >>> quantizer = vlkern.layers.FSQ([8, 5, 5, 5], dim=64)
        >>> y, indices = quantizer(torch.randn(2, 256, 64))
        >>> y.shape, indices.shape, quantizer.codes
        (torch.Size([2, 256, 64]), torch.Size([2, 256]), 1000)
    """

    counts: torch.Tensor | None

    def __init__(
        self, levels: Sequence[int], dim: int | None = None, *, variant: str = "official", count: bool = True
    ) -> None:
        super().__init__()
        self.levels, self.variant = check_levels(levels), variant
        check_variant(variant)
        self.codes = math.prod(self.levels)
        if count and self.codes > MOST_COUNTED:
            raise ValueError(f"levels must have a product of at most 2^24 to be counted, got {self.codes}: count=False")
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise TypeError(f"dim must be an int or None, got {type(dim).__name__}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        channels = len(self.levels)
        self.project_in = nn.Identity() if dim is None else Linear(dim, channels)
        self.project_out = nn.Identity() if dim is None else Linear(channels, dim)
        self.register_buffer("counts", torch.zeros(self.codes, dtype=torch.int64) if count else None, persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., dim] -> [..., dim] in x's dtype and indices [...] int64; the gradient passes straight through."""
        codes, indices = ops.fsq_quantize(self.project_in(x), self.levels, variant=self.variant)
        if self.counts is not None:
            seen = indices.flatten()
            self.counts.scatter_add_(0, seen.clamp(min=0), (seen >= 0).long())
        return self.project_out(codes), indices

    def decode(self, indices: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Indices [...] -> [..., dim], as forward returned it; dtype: of the weights, or float32 without any."""
        dtype = dtype or next((p.dtype for p in self.parameters()), torch.float32)
        out: torch.Tensor = self.project_out(
            ops.fsq_dequantize(indices, self.levels, variant=self.variant, dtype=dtype)
        )
        return out

    def _counted(self) -> torch.Tensor:
        if self.counts is None:
            raise ValueError("count must be True for a histogram, got False")
        return self.counts

    def usage(self) -> float:
        """The fraction of all codes that came at least once since the last reset."""
        return float((self._counted() > 0).double().mean())

    def reset_usage(self) -> None:
        """Start counting anew."""
        self._counted().zero_()

    def extra_repr(self) -> str:
        """Shown when the layer is printed."""
        return f"levels={list(self.levels)}, variant={self.variant!r}"
