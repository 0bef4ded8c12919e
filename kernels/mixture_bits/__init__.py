"""The bits that symbols cost under mixtures of Gaussians; the maths is in README.md."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlkern import _checks
from vlkern._op import Op
from vlkern.kernels.mixture_bits import reference, samples


def _bind(symbols: Any, params: Any) -> tuple[Any, ...]:
    symbols, params = _checks.floating("symbols", symbols), _checks.floating("params", params)
    if symbols.dim() == 0 or symbols.shape[-1] == 0:
        raise ValueError(f"symbols must have shape [..., C] with at least one channel, got {list(symbols.shape)}")
    if params.dim() < 3 or params.shape[-3] != 3 or params.shape[-2] == 0:
        raise ValueError(f"params must have shape [..., 3, K, C] with at least one component, got {list(params.shape)}")
    k, c = params.shape[-2], symbols.shape[-1]
    _checks.shape("params", params, (*symbols.shape[:-1], 3, k, c))
    _checks.on_device("symbols", symbols, "params", params)
    if (params.dtype == torch.float64) != (symbols.dtype == torch.float64):
        symbols = symbols.to(torch.promote_types(params.dtype, torch.float32))
    rows = symbols.numel() // c
    return symbols.reshape(rows, c), params.reshape(rows, 3, k, c)


_op = Op(
    "mixture_bits",
    public="mixture_bits",
    schemas={
        "mixture_bits": "(Tensor symbols, Tensor params) -> Tensor",
        "mixture_bits_backward": "(Tensor grad, Tensor symbols, Tensor params) -> (Tensor, Tensor)",
    },
    reference=reference,
    backends=("cpu", "triton", "cuda"),
    bind=_bind,
    work=samples.work,
)
_forward, _backward = _op.raw["mixture_bits"], _op.raw["mixture_bits_backward"]


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, symbols: torch.Tensor, params: torch.Tensor, backend: str) -> Any:
        ctx.save_for_backward(symbols, params)
        ctx.backend = backend
        return _forward[backend](symbols, params)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *_backward[ctx.backend](grad, *ctx.saved_tensors), None


def mixture_bits(symbols: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The bits of each symbol under a mixture of K Gaussians of its own: the rate that a learned codec is trained on.

        bits = -log2 max(P, 1e-9),    P = sum_k w_k (Phi((y + 1/2 - mu_k) / s_k) - Phi((y - 1/2 - mu_k) / s_k))
        w = softmax(logits),    s = exp(clamp(raw, log 0.11, log 256))

    The differences are exact in the tails, to a few roundings of P. Where P is below 1e-9 the gradient is that of
    log2 P without the bound, so that a symbol far from everything still pulls the components towards it. The gradient
    of a raw scale outside of its range passes where a step against it leads back towards the range, else it is zero.

    Args:
        symbols: [..., C], rounded or with noise; any float dtype.
        params: [..., 3, K, C]: logits, means and raw scales; float32, bfloat16 or float16 (float64 on the reference).

    Returns:
        [..., C], float32 (float64 for float64 params), computed in float32. Differentiable once in symbols and params;
        the backward keeps these two and recomputes the rest.

    Raises:
        TypeError: symbols or params is no floating-point tensor.
        ValueError: shapes do not fit, or devices differ.

    Source: Mentzer, Agustsson, Tschannen, M2T: Masking Transformers Twice for Faster Decoding, 2023; Ballé et al.,
    2018, for the noise.

    Example:
        >>> params = torch.randn(24, 24, 3, 3, 192, requires_grad=True)
        >>> latent = 2 * torch.randn(24, 24, 192)
        >>> rate = vlkern.ops.mixture_bits(latent + torch.rand_like(latent) - 0.5, params).sum()
    """
    flat, rows = _bind(symbols, params)
    backend = _op.choose(flat, rows)
    if torch.is_grad_enabled() and (flat.requires_grad or rows.requires_grad):
        bits: torch.Tensor = _Bits.apply(flat, rows, backend)
    else:
        bits = _forward[backend](flat, rows)
    return bits.reshape(symbols.shape)
