"""Finite scalar quantization; the maths is in README.md."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.fsq import reference, samples
from vlkern.kernels.fsq.table import check_levels, check_variant, constant


def _bind(z: Any, levels: Any, *, variant: Any = "official") -> tuple[Any, ...]:
    z, levels, symmetric = _checks.floating("z", z), check_levels(levels), check_variant(variant)
    if z.dim() == 0 or z.shape[-1] != len(levels):
        raise ValueError(f"z must have shape [..., {len(levels)}], one channel for each level, got {list(z.shape)}")
    if _checks.SETTINGS.validate and _checks.values_may_be_read(z) and bool(z.isnan().any()):
        where = z.isnan().any(-1).nonzero()[0].tolist()
        raise ValueError(f"z must not hold NaN, got one in the vector at {where}")
    return z, constant("thresholds", levels, symmetric, torch.float32, z), levels, symmetric


_op = Op(
    "fsq",
    public="fsq_quantize",
    schemas={
        "fsq_quantize": "(Tensor z, Tensor thresholds, int[] levels, bool symmetric) -> (Tensor, Tensor)",
        "fsq_quantize_backward": "(Tensor grad, Tensor z, Tensor slopes) -> Tensor",
        "fsq_dequantize": "(Tensor codes, Tensor indices, int[] levels) -> Tensor",
    },
    reference=reference,
    backends=("cpu", "triton", "cuda"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["fsq_quantize"], _op.raw["fsq_quantize_backward"]
_decode = _op.raw["fsq_dequantize"]


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, thresholds: torch.Tensor, slopes: torch.Tensor, levels: Any, rest: Any
    ) -> Any:
        symmetric, backend = rest
        codes, indices = _forward[backend](z, thresholds, levels, symmetric)
        ctx.save_for_backward(z, slopes)
        ctx.backend = backend
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)  # else autograd would make zeros for the indices
        return codes, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> Any:
        dz = None if grad is None else _backward[ctx.backend](grad, *ctx.saved_tensors)
        return dz, None, None, None, None


def fsq_quantize(
    z: torch.Tensor, levels: Sequence[int], *, variant: str = "official"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite scalar quantization (FSQ): every channel of z becomes one of a few levels, every vector an integer.

        digit_c = how many of the L_c - 1 thresholds z_c reaches        index = sum_c digit_c L_0 L_1 ... L_(c-1)
        code_c  = (digit_c - L_c // 2) / (L_c // 2)                     symmetric: 2 digit_c / (L_c - 1) - 1

    The thresholds are where the published bound, tanh(z + shift) (L - 1) (1 - 1e-3) / 2 - offset, is half-way between
    two integers; variant "symmetric" uses tanh(z) (L - 1) / 2. They are float32 numbers computed once, so that every
    backend finds the same integers.

    Args:
        z: [..., d], float32, bfloat16 or float16 (float64 on the reference); compared in float32.
        levels: the number of levels L_c of each of the d channels, 2 to 1000; their product is at most 2^62.
        variant: "official" or "symmetric". Codes lie in [-1, 1]; the official ones of an even L lack 1.

    Returns:
        codes [..., d] in z's dtype, and indices [...] int64 with channel 0 as the fastest digit. A vector with a NaN
        has index -1, and the channel that is NaN a NaN for its code. Differentiable once in z through the codes, as if
        the bound were not rounded (straight-through); the backward keeps z and recomputes the rest.

    Raises:
        TypeError: z is not a floating-point tensor, or levels is not a sequence of ints.
        ValueError: z does not have d channels; a level is out of range, or their product; variant is unknown; z holds
            a NaN under `vlkern.validate(True)`.

    Source: Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, 2023; the symmetric variant: Parker et al.,
        Scaling Transformers for Low-Bitrate High-Quality Speech Coding, 2024.

    Example:
        >>> codes, indices = vlkern.ops.fsq_quantize(torch.randn(2, 256, 4), [8, 5, 5, 5])
    """
    z, thresholds, sizes, symmetric = _bind(z, levels, variant=variant)
    backend = _op.choose(z)
    if torch.is_grad_enabled() and z.requires_grad:
        slopes = constant("slopes", sizes, symmetric, torch.promote_types(z.dtype, torch.float32), z)
        result: tuple[torch.Tensor, torch.Tensor] = _Quantize.apply(z, thresholds, slopes, sizes, (symmetric, backend))
        return result
    codes, indices = _forward[backend](z, thresholds, sizes, symmetric)
    return codes, indices


def fsq_dequantize(
    indices: torch.Tensor, levels: Sequence[int], *, variant: str = "official", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The codes of indices: the inverse of `fsq_quantize`.

    Args:
        indices: [...], int64 or int32, in [0, product of levels); -1 stands for a vector that had a NaN.
        levels: as for `fsq_quantize`.
        variant: as for `fsq_quantize`.
        dtype: of the codes; float64 runs on the reference.

    Returns:
        [..., d], bit for bit the codes that `fsq_quantize` gave for z of this dtype. Index -1 gives NaN.

    Raises:
        TypeError: indices are not int64 or int32, dtype is no floating-point dtype, levels is not a sequence of ints.
        ValueError: levels or variant as for `fsq_quantize`; an index is out of range (looked at on the CPU, elsewhere
            and under compile only with `vlkern.validate(True)`; unseen, it gives NaN).

    Source: Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, 2023.

    Example:
        >>> codes = vlkern.ops.fsq_dequantize(torch.tensor([0, 999]), [8, 5, 5, 5])
    """
    sizes, symmetric = check_levels(levels), check_variant(variant)
    if _checks.tensor("indices", indices).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    if dtype not in _checks.FLOATS:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if indices.numel() and _checks.values_may_be_read(indices):
        low, high = (int(end) for end in indices.aminmax())
        if low < -1 or high >= prod(sizes):
            wrong = low if low < -1 else high
            raise ValueError(f"indices must be in [0, {prod(sizes)}), or -1 for NaN, got {wrong}")
    table = constant("codes", sizes, symmetric, dtype, indices)
    codes: torch.Tensor = _decode[_op.choose(table)](table, indices.long(), sizes)
    return codes
