"""Mixtures as integers, by the million: the same windows, rows, bytes and symbols on the CPU as by definition.

As a program it says how many it compared: `python tests/coding/millions.py 5000000`.
"""

import sys
import time

import torch

import vlkern
from vlkern import coding
from vlkern.coding import Mixtures

POINTS, CHANNELS, SIZE = 256, 24, 6


def drawn(seed: int) -> tuple[Mixtures, torch.Tensor]:
    """Mixtures [256, K, 24], and where rows begin. Scales and means of every size, to the ends of their ranges, weights
    with zeros and all on one; edges that fall on means, on ends of the table and next to them."""
    g = torch.Generator().manual_seed(seed)
    shape = POINTS, 1 + seed % 4, CHANNELS

    def chance(share: float) -> torch.Tensor:
        return torch.rand(shape, generator=g) < share

    def whole(least: int, most: int) -> torch.Tensor:
        return torch.randint(least, most + 1, shape, generator=g)

    scales = torch.where(chance(0.3), 63 * whole(0, 1), torch.where(chance(0.5), whole(0, 63), whole(0, 20)))
    means = whole(-(2**23), 2**23) >> whole(0, 24)
    means = torch.where(chance(0.1), 2**23 * (2 * whole(0, 1) - 1), means)
    sigma = (256 * torch.tensor(coding.SCALES)).round().long()[scales]
    on_edge = 256 * whole(-40, 40) + 128 + sigma * (whole(-1, 1) * 8) + whole(-1, 1)
    means = torch.where(chance(0.3), on_edge, means).clamp(-(2**23), 2**23)
    share = torch.rand(shape, generator=g).pow(3) * chance(0.7) + 1e-9
    weights = (share / share.sum(1, keepdim=True) * 4096).floor()
    weights[:, 0] += 4096 - weights.sum(1)
    mixtures = Mixtures(means.int(), scales.byte(), weights.short())
    low, half = vlkern.ops.mixture_window(*mixtures)
    near = torch.randint(-3, 2, low.shape, generator=g) + torch.where(low % 2 == 0, half, 0)
    return mixtures, (low + near).clamp(-32768, 32000).int()


def compare(seed: int) -> int:
    """How many mixtures were compared."""
    mixtures, low = drawn(seed)
    found = []
    for name in ("reference", "cpu"):
        with vlkern.backend(f"mixture_cdf={name}"):
            found.append([*vlkern.ops.mixture_window(*mixtures), vlkern.ops.mixture_cdf(*mixtures, low, SIZE)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), seed
    symbols = low + torch.randint(0, SIZE, low.shape, generator=torch.Generator().manual_seed(seed))
    streams = coding.encode_mixtures(symbols, mixtures, threads=1)
    assert torch.equal(coding.decode_mixtures(streams, mixtures, threads=1), symbols), seed
    if seed % 64 == 0:  # whole rows are long
        part = slice(seed // 64 % POINTS, seed // 64 % POINTS + 1)
        few = Mixtures(*(p[part] for p in mixtures))
        with vlkern.backend("mixture_cdf=reference"):
            assert coding.encode_mixtures(symbols[part], few) == [by_rows(symbols[part], few)], seed
    return POINTS * CHANNELS


def by_rows(symbols: torch.Tensor, mixtures: Mixtures) -> bytes:
    """The stream of tables that have all rows."""
    low, half = (t.flatten() for t in vlkern.ops.mixture_window(*mixtures))
    encoder = coding.Encoder()
    for c in range(symbols.numel()):
        one = Mixtures(*(p[..., c : c + 1] for p in mixtures))
        size = 2 * int(half[c])
        cdf = vlkern.ops.mixture_cdf(*one, low[c : c + 1].view(1, 1), size).view(1, -1)
        tables = coding.Tables(cdf, torch.tensor([size + 2], dtype=torch.int32), low[c : c + 1])
        encoder.put(symbols.flatten()[c : c + 1], tables)
    return encoder.finish()


def main(count: int) -> None:
    """Compares at least so many."""
    begin, done, seed = time.perf_counter(), 0, 0
    while done < count:
        done, seed = done + compare(seed), seed + 1
    print(f"{done} mixtures, {done * (SIZE + 2)} entries of rows: all the same, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
