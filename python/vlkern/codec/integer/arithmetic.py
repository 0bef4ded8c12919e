"""The arithmetic of the whole-number transformer, in plain PyTorch: the definition, for tensors on any device.

Every function maps integers to integers, and states the bounds within which no intermediate result can leave its
type; `Weights.check` (see weights.py) makes sure that a model keeps them for all inputs. What is computed has one
value, then, whatever the order: on any machine, in any batch, by any number of threads.

    >>      shifts round down, so `(x + half) >> s` rounds to nearest
    limit   of a tensor of activations: |a| <= limit; what would be more is set to +-limit

Only two steps touch floating point, where it is exact: products of matrices run in float64, whose sums stay below 2^53
(there is no matrix product of integers on GPUs), and square roots are corrected afterwards.
"""

from functools import lru_cache
from math import isqrt

import torch

#: Fraction bits of exponents, and the length of the table of powers.
EXPONENT = 10
#: The residual stream stays within +-RESIDUAL.
RESIDUAL = 1 << 23
#: The widest row that `norm` takes.
WIDEST = 4096


def scaled(x: torch.Tensor, multiplier: torch.Tensor, shift: int, limit: int) -> torch.Tensor:
    """floor(x multiplier / 2^shift + 1/2) within +-limit, int64.

    |x| <= 2^31, 0 <= multiplier < 2^31, 1 <= shift <= 62: the sum below stays under 2^62 + 2^61.
    """
    return ((x * multiplier + (1 << (shift - 1))) >> shift).clamp(-limit, limit)


def product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """Matrices of int16 and int8 -> int64; sums of the magnitudes of products must be below 2^31."""
    return (a_MK.double() @ b_KN.double()).long()


def linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    multiplier_N: torch.Tensor,
    shift: int,
    limit: int,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """(W x + bias) multiplier / 2^shift, rounded, within +-limit; or what `table` has at this place.

    Args:
        x: [..., K] int16.
        weight_NK: int8.
        bias_N: int32.
        multiplier_N: int32, not negative.
        shift: 1 to 62.
        limit: 32767 at most where the result is int16.
        table: int16 [2 limit + 1], a function of the result from -limit to limit.

    Returns:
        [..., N] int16; int32 for a limit above 32767. |W x + bias| must be below 2^31.
    """
    y = scaled(product(x, weight_NK.mT) + bias_N, multiplier_N, shift, limit)
    if table is not None:
        return table[y + limit]
    return y.to(torch.int16 if limit <= 32767 else torch.int32)


def root(x: torch.Tensor) -> torch.Tensor:
    """floor(sqrt(x)) of 0 <= x < 2^62, int64."""
    r = x.double().sqrt().long()
    r = r - (r * r > x).long()
    return r + ((r + 1) * (r + 1) <= x).long()


def norm(
    x: torch.Tensor, gain_D: torch.Tensor, bias_D: torch.Tensor, shift: int, limit: int, epsilon: int
) -> torch.Tensor:
    """LayerNorm: u = (x - mean) / sqrt(variance + epsilon) in 2^-12, then (u gain + bias) / 2^shift, rounded.

    |x| <= 2^23 and D <= 4096, so the squares add up to less than 2^60. The deviation is kept in 2^-6, from 64 on, and
    since |x - mean| <= sqrt(D) deviations, |x - mean| 2^46 / deviation < 2^47 and |u| < 2^19.

    Args:
        x: [..., D] int32.
        gain_D: int32.
        bias_D: int64, below 2^60.
        shift: 1 to 60.
        limit: at most 32767.
        epsilon: 1 to 2^47.

    Returns:
        [..., D] int16.
    """
    width = x.shape[-1]
    x = x.long()
    mean = (2 * x.sum(-1, keepdim=True) + width).div(2 * width, rounding_mode="floor")
    away = x - mean
    variance = (away * away).sum(-1, keepdim=True).div(width, rounding_mode="floor")
    inverse = torch.div(1 << 46, root((variance + epsilon) << 12), rounding_mode="floor")
    unit = (away * inverse + (1 << 27)) >> 28
    return ((unit * gain_D + bias_D + (1 << (shift - 1))) >> shift).clamp(-limit, limit).to(torch.int16)


@lru_cache
def _powers() -> tuple[int, ...]:
    """round(2^15 2^(-i / 1024)): the tenth square root of 1/2 in 200 bits, and its powers, all in whole numbers."""
    bits = 200
    step = 1 << (bits - 1)
    for _ in range(EXPONENT):
        step = isqrt(step << bits)
    found, power = [], 1 << bits
    for _ in range(1 << EXPONENT):
        found.append((power + (1 << (bits - 16))) >> (bits - 15))
        power = power * step >> bits
    return tuple(found)


def powers(device: torch.device | str = "cpu") -> torch.Tensor:
    """round(2^15 2^(-i / 1024)), i < 1024, int32."""
    return torch.tensor(_powers(), dtype=torch.int32, device=device)


def power_of_two(exponent: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """2^15 2^(-exponent / 1024) for exponent >= 0: a number of the table, shifted; int64."""
    return powers[exponent & ((1 << EXPONENT) - 1)].long() >> (exponent >> EXPONENT).clamp(max=31)


def attention(
    qkv_TNX: torch.Tensor,
    start: int,
    stop: int,
    heads: int,
    shift: int,
    powers: torch.Tensor,
    multiplier: int,
    out_shift: int,
    limit: int,
) -> torch.Tensor:
    """Slots start ... stop - 1 of T tiles look at slots 0 ... stop - 1.

        p = 2^15 2^-((max s - s) >> shift) / 2^10,  s = q k        w = round(2^15 p / sum p), at most 32767
        result = sum w v multiplier / 2^out_shift, rounded

    q k must stay below 2^30 in magnitude, and N below 2^15: p adds up to less than 2^30, and w to less than 2^15 + N.

    Args:
        qkv_TNX: int16 [T, N, 3 heads channels]: queries, keys and values.
        start: the first slot that asks.
        stop: the last but one.
        heads: how many.
        shift: 0 to 30, makes of s a number in 2^-10, a power of two.
        powers: of `power_of_two`.
        multiplier: 0 to 2^31 - 1.
        out_shift: 1 to 62.
        limit: at most 32767.

    Returns:
        [T, stop - start, heads channels] int16.
    """
    q, k, v = qkv_TNX[:, :stop].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [T, heads, N, channels]
    scores = product(q[:, :, start:], k.mT)
    p = power_of_two((scores.amax(-1, keepdim=True) - scores) >> shift, powers)
    total = p.sum(-1, keepdim=True)
    inverse = ((1 << 45) + total // 2) // total
    w = ((p * inverse + (1 << 29)) >> 30).clamp(max=32767)
    out = scaled(product(w, v), torch.tensor(multiplier, device=w.device), out_shift, limit)
    return out.transpose(1, 2).flatten(-2).to(torch.int16)


def mixture(raw: torch.Tensor, powers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the head gives -> a mixture of K Gaussians for each symbol, as `vlkern.coding.Mixtures` has it.

        weights   shares of 4096 of 2^logit, logits in 2^-10; what rounding down leaves goes to the largest remainders,
                  of equal ones to the first
        means     in 1/256, as they come
        scales    indices of the table of scales, set to 0 ... 63

    Args:
        raw: [..., 3, K, C] int32, |raw| <= 2^23: logits, means, scales.
        powers: of `power_of_two`.

    Returns:
        means int32, scales uint8, weights int16, each [..., K, C].
    """
    logits, means, scales = raw.unbind(-3)
    p = power_of_two(logits.amax(-2, keepdim=True) - logits, powers) << 12
    total = p.sum(-2, keepdim=True) >> 12
    weights = p // total
    rest = p - weights * total
    order = rest.argsort(dim=-2, descending=True, stable=True).argsort(dim=-2)
    weights = weights + (order < 4096 - weights.sum(-2, keepdim=True)).long()
    return means.contiguous(), scales.clamp(0, 63).to(torch.uint8), weights.to(torch.int16)
