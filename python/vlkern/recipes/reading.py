"""Batches of a stream, and word of what could not be read."""

from collections.abc import Iterator

import torch

from vlkern import data
from vlkern._progress import say


def announced(
    stream: Iterator[tuple[torch.Tensor, ...]], pairs: data.PairShards, first: bool
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches of `stream`. Says which samples of `pairs` cannot be read, when it meets them.

    What the index left out is the same on every rank: only the `first` one says it.
    """
    said = set() if first else set(pairs.skipped)
    for batch in stream:
        for line in pairs.skipped:
            if line not in said:
                say("left out", line)
                said.add(line)
        yield batch
