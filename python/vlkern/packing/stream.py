"""A stream of examples as a stream of packed batches."""

from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from operator import index, itemgetter
from typing import Any

from vlkern.packing.batch import Example, PackedBatch
from vlkern.packing.bins import METHODS, checked_capacity, pack


def packed_batches(
    examples: Iterable[Example], capacity: int, *, method: str = "first_fit_decreasing", buffer: int = 1024
) -> Iterator[PackedBatch]:
    """Packs a stream: each batch holds at most `capacity` tokens, few of which remain unused.

    Deterministic: the batches depend on the stream alone, so a stream that is read again gives them again. The examples
    of a batch keep their order, and batches are not sorted by size. Unused tokens are left out, not padded: a batch has
    between 1 and `capacity` tokens.

    `first_fit` is greedy, in the order of the stream: each example goes into the first open batch with room. A batch
    leaves once it is full, and the fullest one when an example comes while `buffer` others are held. When the stream
    ends, what is still held is packed anew, longest first.
    The other methods take `buffer` examples at a time, pack them with `pack`, and yield the bins in the order in which
    the first example of each arrived.

    Args:
        examples: any iterable; read as far as needed.
        capacity: most tokens of a batch, 1 to 2^31 - 1. `parts` do not count.
        method: as in `pack`; "in_order" keeps the stream's order exactly.
        buffer: most examples that are held, above 0. The fewer, the more tokens remain unused.

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
    checked = _checked(stream, capacity)
    if method == "first_fit":
        checked, method = iter((yield from _first_fit(checked, capacity, buffer))), "first_fit_decreasing"
    while group := list(islice(checked, buffer)):
        packing = pack([len(example) for example in group], capacity, method=method)
        members = [sorted(packing.members(b).tolist()) for b in range(packing.bins)]
        for bin in sorted(members):
            yield PackedBatch.of([group[i] for i in bin])


def _first_fit(stream: Iterator[Example], capacity: int, buffer: int) -> Generator[PackedBatch, None, list[Example]]:
    """Yields what leaves while the stream lasts; returns the examples that are held at its end, in their order."""
    bins: list[list[tuple[int, Example]]] = []  # the open ones, oldest first, with the places of the examples
    rooms: list[int] = []  # of each open bin
    held = 0

    def close(bin: int) -> PackedBatch:
        nonlocal held
        rooms.pop(bin)
        members = bins.pop(bin)
        held -= len(members)
        return PackedBatch.of([example for _, example in members])

    for place, example in enumerate(stream):
        if held == buffer:
            yield close(rooms.index(min(rooms)))
        length = len(example)
        bin = next((b for b, room in enumerate(rooms) if room >= length), len(rooms))
        if bin == len(rooms):
            rooms.append(capacity)
            bins.append([])
        rooms[bin] -= length
        bins[bin].append((place, example))
        held += 1
        if rooms[bin] == 0:
            yield close(bin)
    return [example for _, example in sorted(chain.from_iterable(bins), key=itemgetter(0))]


def _checked(stream: Iterator[Example], capacity: int) -> Iterator[Example]:
    for place, example in enumerate(stream):
        if not isinstance(example, Example):
            raise TypeError(f"examples must hold Examples, got {type(example).__name__} at {place}")
        if len(example) > capacity:
            raise ValueError(
                f"examples must have at most {capacity} tokens, the capacity, got {len(example)} at {place}: make it"
                " smaller or leave it out"
            )
        yield example


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if index(value) < 1:
        raise ValueError(f"{name} must be above 0, got {value}")
    return index(value)
