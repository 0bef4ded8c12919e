"""Which tokens of a tile are coded at which step: the order of a low-discrepancy sequence, and growing groups.

    order    the points p_n = (1/2 + n a) mod 1, a = (1/g, 1/g^2), g^3 = g + 1, fall into the cells of the tile's
             grid; a cell is listed when it is first hit
    groups   after step i of S, round(N (i / S)^alpha) of the N tokens are known

Sources: Mentzer et al., M2T, 2023, section 3; Roberts, The unreasonable effectiveness of quasirandom sequences, 2018.
"""

from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

#: p_n is computed in integers modulo 2^96, so that every machine lists the same cells: files depend on their order.
_BITS = 96


def _plastic() -> int:
    """floor(2^160 g), g the real root of g^3 = g + 1, by bisection."""
    bits = 160
    low, high = 1 << bits, 2 << bits
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if mid**3 <= (mid << 2 * bits) + (1 << 3 * bits) else (low, mid)
    return low


@lru_cache
def low_discrepancy(side: int) -> tuple[tuple[int, int], ...]:
    """The cells of a grid of side x side in the order of the sequence.

    Returns:
        side^2 pairs, the first number from the first coordinate of the points.

    Raises:
        ValueError: the side is not positive.

    Example:
        >>> vlkern.models.schedules.low_discrepancy(24)[:3]
        ((6, 1), (0, 15), (18, 5))
    """
    if side < 1:
        raise ValueError(f"side must be positive, got {side}")
    g = _plastic()
    steps = ((1 << 160 + _BITS) // g, (1 << 320 + _BITS) // g**2)
    found: dict[tuple[int, int], None] = {}
    x = y = 1 << _BITS - 1
    while len(found) < side**2:
        x, y = (x + steps[0]) % (1 << _BITS), (y + steps[1]) % (1 << _BITS)
        found.setdefault((x * side >> _BITS, y * side >> _BITS))
    return tuple(found)


def groups(tokens: int, steps: int, alpha: float) -> tuple[int, ...]:
    """How many tokens each step codes.

    Args:
        tokens: N of a tile.
        steps: S.
        alpha: how slowly it begins; a float, whose value is taken as it is written.

    Returns:
        S numbers that add up to N and do not decrease.

    Raises:
        ValueError: a number is out of range, or these groups would be empty or decrease.

    Example:
        >>> vlkern.models.schedules.groups(576, 4, 2.2)
        (27, 98, 181, 270)
    """
    if tokens < 1 or not 1 <= steps <= tokens:
        raise ValueError(f"steps must be from 1 to the number of tokens, got {steps} for {tokens}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    known = [_rounded_power(tokens, i, steps, Fraction(str(alpha))) for i in range(steps + 1)]
    sizes = tuple(after - before for before, after in pairwise(known))
    if sizes[0] < 1 or any(after < before for before, after in pairwise(sizes)):
        raise ValueError(f"alpha {alpha} with {steps} steps gives groups that are empty or decrease: {sizes}")
    return sizes


def _rounded_power(tokens: int, i: int, steps: int, alpha: Fraction) -> int:
    """round(N (i / S)^alpha), half up, decided in integers: k <= x + 1/2 with x^q = N^q (i / S)^p, alpha = p / q."""
    p, q = alpha.numerator, alpha.denominator
    low, high = 0, tokens
    while low < high:  # the largest k with (k - 1/2)^q <= N^q (i / S)^p
        k = (low + high + 1) // 2
        fits = (2 * k - 1) ** q * steps**p <= (2 * tokens) ** q * i**p
        low, high = (k, high) if fits else (low, k - 1)
    return low
