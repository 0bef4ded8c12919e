"""Arithmetic that several rooms' Triton kernels share."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

import torch
import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """To 2e-7 of itself: below a half x + x^3 times a minimax polynomial in x^2, as (1 - e) / (1 + e) loses small x."""
    z = x * x
    p = 0.0172574571 * z - 0.0530531447
    p = p * z + 0.133259897
    p = p * z - 0.333331485
    a = tl.abs(x)
    e = tl.exp2(a * -2.88539008)  # exp(-2 |x|)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.5, x + x * z * p, tl.where(x < 0.0, -large, large))


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int, alpha: float = 1.0) -> None:
    """total [I, J] = beta total + alpha a [I, K] @ b [K, J], with float32 sums from a and b of any dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)
    else:  # one dtype, or the interpreter: PyTorch multiplies mixed dtypes on GPUs only
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha, out=total)
