"""How the Triton kernels of interval attention are launched: tiles by head dims, dtype and chip, strides, factors."""

from dataclasses import dataclass, replace

import torch
import triton

from vlkern._triton import Chip

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """One kernel's launch parameters."""

    bm: int
    """Queries in a tile."""
    bn: int
    """Keys in a tile."""
    warps: int
    stages: int
    """Steps whose loads are in flight."""


@dataclass(frozen=True)
class Config:
    """Launch parameters, the same for every call with the same head dims, dtype and chip."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    precision: str
    """How float32 is multiplied: "tf32x3", three tensor-core products that keep 22 bits (Triton multiplies "ieee" from
    registers and spills hundreds of them), or "tf32" if PyTorch's own matmuls may."""


def widths(d: int, dtype: torch.dtype) -> tuple[int, int]:
    """The widths of the one or two tiles that hold d columns, powers of two; the second is 0 if there is but one."""
    whole = max(16, triton.next_power_of_2(d))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(d - half))
    # In float32 two sums of 128 products are also more exact than one of 256.
    return (half, rest) if half + rest < whole or (dtype == torch.float32 and whole > 128) else (whole, 0)


def _fit(tile: Tile, holds_queries: bool, held: int, streamed: int, itemsize: int, on: Chip) -> Tile:
    """The tile with as many stages, or if there is no room for one as many rows, as fit in the shared memory.

    A program holds `held` numbers for each row of one side, while tiles of the other go by with `streamed` a row.
    """
    while True:
        rows, step = (tile.bm, tile.bn) if holds_queries else (tile.bn, tile.bm)
        stages = (on.shared // itemsize - rows * held) // (step * streamed)
        if stages > 0 or max(rows, step) == 16:
            return replace(tile, stages=max(1, min(tile.stages, stages)))
        tile = replace(tile, bm=max(16, tile.bm // 2), bn=max(16, tile.bn // 2))


def pick(shape: tuple[int, int], dtype: torch.dtype, on: Chip) -> Config:
    """The configuration for head dims D and Dv: the largest tiles whose numbers fit in 255 registers a thread."""
    d, dv = (sum(widths(n, dtype)) for n in shape)
    wide, split = max(d, dv), any(widths(n, dtype)[1] for n in shape)
    if dtype == torch.float32:  # its operands pass through the registers as well
        if wide <= 64:
            rows = 64 if on.arch >= 90 else 32
            forward, dq, dkdv = Tile(rows, 32, rows // 8, 2), Tile(rows, 32, rows // 8, 2), Tile(32, 32, 8, 2)
        elif wide <= 128:
            forward, dq, dkdv = Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(32, 32, 8, 1)
        else:
            forward, dq, dkdv = Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)
    elif wide <= 64:
        forward, dq, dkdv = Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64 if on.arch < 100 else 32, 128, 8, 3)
    elif wide <= 128:
        forward, dq = Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)
        dkdv = Tile(32 if split and on.arch != 90 else 64, 64, 8, 3)
    else:
        forward = Tile(128, 64, 8, 2) if on.arch == 90 else Tile(64, 32, 8, 2)
        dq, dkdv = Tile(64, 64, 8, 2), Tile(32, 64, 8, 2) if on.arch < 100 else Tile(64, 64, 8, 1)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    size = dtype.itemsize
    return Config(
        _fit(forward, True, d, d + dv, size, on),
        _fit(dq, True, d + dv, d + dv, size, on),
        _fit(dkdv, False, d + dv, d + dv, size, on),
        "tf32" if tf32 else "tf32x3",
    )


def regular(x: torch.Tensor) -> torch.Tensor:
    """x itself where its strides let the kernels read it 16 bytes at a time with 32-bit offsets inside a tile."""
    row, head, column = x.stride()
    return x if column == 1 and row % 8 == head % 8 == 0 and row < 1 << 23 else x.contiguous()


def pitches(*tensors: torch.Tensor) -> list[int]:
    """Distances between rows, then between heads, in units of 8 elements."""
    return [x.stride(dim) // 8 for dim in (0, 1) for x in tensors]


def factors(scale: float, softcap: float | None) -> tuple[float, float, bool]:
    """factor, cap, CAPPED of _scores."""
    return (scale * _LOG2_E, 0.0, False) if softcap is None else (scale / softcap, softcap * _LOG2_E, True)
