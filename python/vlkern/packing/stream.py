"""A stream of examples as a stream of packed batches."""

from collections.abc import Iterable, Iterator
from itertools import islice
from operator import index
from typing import Any

from vlkern.packing.batch import Example, PackedBatch
from vlkern.packing.bins import METHODS, checked_capacity, pack


def packed_batches(
    examples: Iterable[Example], capacity: int, *, method: str = "first_fit_decreasing", buffer: int = 1024
) -> Iterator[PackedBatch]:
    """Packs a stream: each batch holds at most `capacity` tokens, few of which remain unused.

    Takes `buffer` examples at a time, packs them with `pack`, and yields the bins in the order in which the first
    example of each arrived; the examples of a bin keep their order too, so batches are not sorted by size.
    Deterministic: the batches depend on the stream alone. Unused tokens are left out, not padded: a batch has between 1
    and `capacity` tokens.

    Args:
        examples: any iterable; read as far as needed.
        capacity: most tokens of a batch, 1 to 2^31 - 1. `parts` do not count.
        method: as in `pack`; "in_order" keeps the stream's order exactly.
        buffer: examples that are looked at together, above 0. The last bins of a buffer are not full, so a small buffer
            wastes more.

    Yields:
        PackedBatch.

    Raises:
        TypeError: capacity or buffer is no integer, the stream holds something else than Examples.
        ValueError: they are out of range, the method is unknown, or an example has more tokens than the capacity; the
            message names its place in the stream.

    Source: Dehghani et al., Patch n' Pack: NaViT, 2023, appendix A.3.

    Example:
        >>> stream = (Example({"ids": torch.arange(n)}) for n in (5, 3, 4, 2))
        >>> [batch.cu_seqlens.tolist() for batch in packed_batches(stream, capacity=8)]
        [[0, 5, 8], [0, 4, 6]]
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return _batches(iter(examples), checked_capacity(capacity), method, _positive("buffer", buffer))


def _batches(stream: Iterator[Example], capacity: int, method: str, buffer: int) -> Iterator[PackedBatch]:
    seen = 0
    while group := list(islice(stream, buffer)):
        lengths = [_length(example, seen + i, capacity) for i, example in enumerate(group)]
        packing = pack(lengths, capacity, method=method)
        members = [sorted(packing.members(b).tolist()) for b in range(packing.bins)]
        for bin in sorted(members):
            yield PackedBatch.of([group[i] for i in bin])
        seen += len(group)


def _length(example: Any, place: int, capacity: int) -> int:
    if not isinstance(example, Example):
        raise TypeError(f"examples must hold Examples, got {type(example).__name__} at {place}")
    if len(example) > capacity:
        raise ValueError(
            f"examples must have at most {capacity} tokens, the capacity, got {len(example)} at {place}: make it"
            " smaller or leave it out"
        )
    return len(example)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if index(value) < 1:
        raise ValueError(f"{name} must be above 0, got {value}")
    return index(value)
