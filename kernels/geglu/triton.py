"""geglu in Triton: one pass over memory each way. The maths is in README.md."""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments have Triton's types)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vlkern._triton import Chip, chip


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    block: int
    """Elements of a program: 16 a thread are two 16-byte loads of each bfloat16 input before the first use."""
    warps: int


def pick(numel: int, on: Chip) -> Config:
    """Full blocks, or smaller ones where those would leave SMs without work."""
    fair = triton.next_power_of_2(triton.cdiv(numel, 8 * on.sms))
    block = max(128, min(2048, fair))
    return Config(block, max(1, block // 512))


@triton.jit
def _sigmoid(z):
    # gelu(z) = z s, s = sigmoid(t(z)); near z, beyond 16 s is 0 or 1
    near = tl.minimum(tl.maximum(z, -16.0), 16.0)
    square = near * near
    s = tl.sigmoid(near * (1.59576912 + 0.0713548163 * square))
    return s, s + near * s * (1.0 - s) * (1.59576912 + 0.2140644489 * square)


@triton.jit
def _fwd(p_gate, p_up, p_y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = i < N
    z = tl.load(p_gate + i, m, other=0.0).to(tl.float32)
    u = tl.load(p_up + i, m, other=0.0).to(tl.float32)
    s, _ = _sigmoid(z)
    tl.store(p_y + i, (z * s * u).to(p_y.dtype.element_ty), m)


@triton.jit
def _bwd(p_g, p_gate, p_up, p_dgate, p_dup, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = i < N
    g = tl.load(p_g + i, m, other=0.0).to(tl.float32)
    z = tl.load(p_gate + i, m, other=0.0).to(tl.float32)
    u = tl.load(p_up + i, m, other=0.0).to(tl.float32)
    s, slope = _sigmoid(z)
    tl.store(p_dgate + i, (g * u * slope).to(p_dgate.dtype.element_ty), m)
    tl.store(p_dup + i, (g * z * s).to(p_dup.dtype.element_ty), m)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See reference.py."""
    gate, up = gate.contiguous(), up.contiguous()
    y, n = torch.empty_like(gate), gate.numel()
    if n:
        c = pick(n, chip(gate.device))
        _fwd[(triton.cdiv(n, c.block),)](gate, up, y, n, c.block, num_warps=c.warps)
    return y


def geglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(gate), gate.numel()
    if n:
        c = pick(n, chip(gate.device))
        _bwd[(triton.cdiv(n, c.block),)](grad, gate, up, dgate, dup, n, c.block, num_warps=c.warps)
    return dgate, dup
