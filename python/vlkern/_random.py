"""Random numbers that are a function of a seed and a place, the same with every version of every library."""

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """Splitmix64's finaliser: a bijection of uint64 whose outputs look random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(count: int, seed: int, epoch: int) -> np.ndarray:
    """[N] uint64: numbers 0 ... N - 1 of the stream (`seed`, `epoch`); a longer stream begins with the shorter one.

    Integer arithmetic instead of a library's generator, whose stream may change with its version: a run can be resumed
    years later on another machine.
    """
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch):
        state = mix(state + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return mix(state + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def uniform(draw: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), a multiple of 2^-52: a product with it rounds to less than the other factor."""
    return (draw >> np.uint64(12)).astype(np.float64) * 2.0**-52
