"""Which examples share a sequence of a fixed number of tokens; docs/packing.md has the guarantees."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from vlkern._native import host

METHODS = ("first_fit_decreasing", "first_fit", "in_order")
_MOST = 2**31 - 1  # cu_seqlens are int32

Integers = npt.NDArray[np.int64]
Integers32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each of n examples lies. Bins are sequences of `capacity` tokens, numbered in the order they were opened.

    lengths   [n] int64, tokens of each example
    capacity  tokens of a bin
    bin       [n] int64, bin of each example
    offset    [n] int64, its first token inside that bin; examples of a bin lie side by side from token 0
    bins      number of bins
    """

    lengths: Integers
    capacity: int
    bin: Integers
    offset: Integers
    bins: int

    @cached_property
    def order(self) -> Integers:
        """[n] int64: the examples as they lie, bin after bin, first token first. Stored like this, a bin is a slice."""
        return np.lexsort((self.offset, self.bin))

    @cached_property
    def splits(self) -> Integers:
        """[bins + 1] int64: bin b holds the examples order[splits[b]:splits[b + 1]]."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.bin, minlength=self.bins), dtype=np.int64)])

    @property
    def fill(self) -> float:
        """Tokens that belong to an example, as a share of all tokens; 1 - fill is padding. 1 when there is no bin."""
        return float(self.lengths.sum() / (self.bins * self.capacity)) if self.bins else 1.0

    def members(self, bin: int) -> Integers:
        """[k] int64: the examples of one bin, in the order they lie. Raises IndexError for a bin that is not there."""
        if not 0 <= bin < self.bins:
            raise IndexError(f"bin must be between 0 and {self.bins - 1}, got {bin}")
        return self.order[self.splits[bin] : self.splits[bin + 1]]

    def cu_seqlens(self, bin: int) -> Integers32:
        """[k + 1] int32: where each example of one bin starts, and where the last one ends (padding follows)."""
        lengths = self.lengths[self.members(bin)]
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def segment_ids(self) -> Integers32:
        """[bins, capacity] int32: 1, 2, ... for the tokens of the first, second, ... example of a bin; 0 is padding."""
        rank = np.arange(len(self.order)) - self.splits[self.bin[self.order]]
        return self._scatter(np.repeat(rank + 1, self.lengths[self.order]))

    def positions(self) -> Integers32:
        """[bins, capacity] int32: 0, 1, ... inside every example; 0 in padding too."""
        return self._scatter(self._within())

    def _within(self) -> Integers:
        lengths = self.lengths[self.order]
        return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def _scatter(self, values: Integers) -> Integers32:
        """Values of all tokens in `order` -> their slots; the rest is 0."""
        start = self.bin[self.order] * self.capacity + self.offset[self.order]
        result = np.zeros(self.bins * self.capacity, np.int32)
        result[np.repeat(start, self.lengths[self.order]) + self._within()] = values
        return result.reshape(self.bins, self.capacity)


def pack(lengths: Sequence[int] | npt.ArrayLike, capacity: int, *, method: str = "first_fit_decreasing") -> Packing:
    """Assigns each example to a bin of `capacity` tokens. Deterministic: equal input, equal result.

    `first_fit_decreasing` takes the longest example first (equal lengths in their order) and puts it into the
    lowest-numbered bin with room: at most 11/9 of the fewest possible bins, plus 6/9. O(n log n).
    `first_fit` takes the examples in their order, each into the lowest-numbered bin with room (the greedy packing of
    NaViT): at most 17/10 of the fewest possible bins. O(n log n).
    `in_order` keeps the order: an example that does not fit closes the bin and opens the next one. At most twice the
    fewest possible bins. O(n).

    Args:
        lengths: [n] integers, tokens of each example: a sequence, a NumPy array or a CPU tensor. An empty one is fine.
        capacity: tokens of a bin, 1 to 2^31 - 1.
        method: "first_fit_decreasing", "first_fit" or "in_order".

    Raises:
        TypeError: lengths are not integers, capacity is not an integer.
        ValueError: lengths are not one-dimensional, or one is below 1 (an example without tokens has no place in a
            sequence: filter such examples out) or above capacity; capacity out of range; unknown method.

    Source: Johnson, Near-optimal bin packing algorithms, 1973; Dosa, The tight bound of first fit decreasing, 2007;
    Dosa and Sgall, First Fit bin packing: a tight analysis, 2013.
    Packing of images: Dehghani et al., Patch n' Pack: NaViT, 2023.

    Example:
        >>> packing = pack([5, 3, 4, 2], capacity=8)
        >>> packing.bins, packing.bin.tolist(), packing.offset.tolist()
        (2, [0, 0, 1, 1], [0, 5, 0, 4])
        >>> packing.cu_seqlens(0)
        array([0, 5, 8], dtype=int32)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    capacity = checked_capacity(capacity)
    checked = _lengths(lengths, capacity)
    bin, offset, bins = getattr(host(), method)(checked, capacity)
    return Packing(checked, capacity, bin, offset, bins)


def checked_capacity(value: Any) -> int:
    """Tokens of a bin: an integer from 1 to 2^31 - 1, or TypeError, ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"capacity must be an integer, got {type(value).__name__}")
    capacity = index(value)
    if not 1 <= capacity <= _MOST:
        raise ValueError(f"capacity must be between 1 and {_MOST}, got {capacity}")
    return capacity


def _lengths(value: Any, capacity: int) -> Integers:
    lengths = np.asarray(value)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must have one dimension, got shape {list(lengths.shape)}")
    if lengths.size and lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths must hold integers, got {lengths.dtype}")
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        i = wrong[0]
        raise ValueError(f"lengths must be between 1 and the capacity, {capacity}, got lengths[{i}] = {lengths[i]}")
    # A copy: the result must not change when the caller's array does.
    return np.array(lengths, dtype=np.int64, order="C")
