"""Batches whose contents are a function of the seed and the number of the step: resuming needs no other state."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlkern._random import draws, mix
from vlkern.data.pairs import DataError
from vlkern.data.shards import PairShards
from vlkern.data.tokenizer import Tokenizer

_Item = tuple[torch.Tensor | None, str, dict[int, str]]
_Batch = tuple[torch.Tensor, torch.Tensor, dict[int, str]]


class Steps:
    """For each step from `start` on, the numbers of this rank's samples, each with a draw for its caption."""

    def __init__(self, count: int, global_batch: int, seed: int, start: int, rank: int, world: int) -> None:
        self.count, self.global_batch, self.seed, self.start = count, global_batch, seed, start
        self.local = global_batch // world
        self.offset = rank * self.local

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps = self.count // self.global_batch
        epoch, step = divmod(self.start, steps)
        while True:
            draw = draws(self.count, self.seed, epoch)
            order = np.argsort(draw, kind="stable")
            captions = mix(~draw)
            for first in range(step * self.global_batch + self.offset, steps * self.global_batch, self.global_batch):
                part = order[first : first + self.local]
                yield list(zip(part.tolist(), captions[part].tolist(), strict=True))
            epoch, step = epoch + 1, 0


class _Items(Dataset[_Item]):
    """What a worker reads for one sample: pixels, a caption, and what it found unreadable on the way."""

    def __init__(self, pairs: PairShards) -> None:
        self.pairs = pairs

    def __getitem__(self, where: tuple[int, int]) -> _Item:
        index, draw = where
        pair, lines = self.pairs.read(index, draw=draw)
        if pair is None:
            return None, "", lines
        return pair.pixels, pair.captions[draw % len(pair.captions)], lines


class _Collate:
    """Stacks and tokenizes in the worker. A batch with a hole comes without pixels; its lines say why."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: Sequence[_Item]) -> _Batch:
        pixels, captions, lines = zip(*items, strict=True)
        bad = {index: line for part in lines for index, line in part.items()}
        present = [picture for picture in pixels if picture is not None]
        stacked = torch.stack(present) if len(present) == len(items) else torch.empty(0, dtype=torch.uint8)
        return stacked, self.tokenizer(captions), bad


def check_batches(dataset: PairShards, global_batch: int, start: int, rank: int, world: int, workers: int) -> None:
    """Arguments of `batches`. Raises ValueError for one that is out of range, DataError if the set is too small."""
    for name, value, least in (
        ("global_batch", global_batch, 1),
        ("start", start, 0),
        ("world", world, 1),
        ("workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to {world - 1} in a world of {world}, got {rank}")
    if global_batch % world:
        raise ValueError(f"global_batch must be a multiple of world, got {global_batch} for {world} ranks")
    if len(dataset) < global_batch:
        raise DataError(f"a batch of {global_batch} needs at least as many pairs, got {len(dataset)}")


def batches(
    dataset: PairShards,
    global_batch: int,
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of shuffled batches, the part of one rank.

    Global batch number s is a function of (`seed`, s) alone, the same for any `world` and `workers`, so s is all that
    a checkpoint has to keep. With N samples and a global batch of B, pass e = s // (N // B) has an order of its own,
    of which batch s takes the next B samples and rank r the r-th of `world` equal slices. Every sample comes at most
    once in a pass; the N % B at the end of its order sit that pass out. Of several captions one is drawn, and so is the
    place of a `RandomCrop`, from a number that belongs to the picture and the pass.

    A picture that cannot be read is replaced, see `PairShards`; what this rank met is in `dataset.skipped`. The
    global generators of PyTorch and NumPy are not touched. One pass's order takes 24 N bytes.

    Args:
        dataset: the pairs.
        global_batch: B, over all ranks.
        tokenizer: captions to ids [b, L].
        seed: any whole number.
        start: number of the first step.
        rank: of this process.
        world: how many ranks share a batch; divides `global_batch`.
        workers: processes that read ahead, two batches each; 0 reads in this process, when asked.

    Returns:
        An iterator of (pixels [b, 3, H, W] uint8, ids [b, L] int64), b = B / `world`; pinned if there is CUDA.

    Raises:
        DataError: the set is smaller than a batch; while iterating, more than `dataset.bad_limit` samples are bad.
        ValueError: an argument is out of range.

    Example:
        >>> pairs = PairShards(clipart_mini() / "test.tar", 64)
        >>> stream = batches(pairs, 32, tokenizer=load_tokenizer("bytes", 16), start=1000)
        >>> pixels, ids = next(stream)
        >>> pixels.shape, ids.shape
        (torch.Size([32, 3, 64, 64]), torch.Size([32, 16]))
    """
    check_batches(dataset, global_batch, start, rank, world, workers)
    loader = DataLoader(
        _Items(dataset),
        batch_sampler=Steps(len(dataset), global_batch, seed, start, rank, world),
        num_workers=workers,
        collate_fn=_Collate(tokenizer),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return _checked(dataset, loader)


def _checked(dataset: PairShards, loader: DataLoader[_Item]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Reports what the workers could not read."""
    for pixels, ids, bad in loader:
        if bad:
            dataset.note(bad)
        yield pixels, ids
