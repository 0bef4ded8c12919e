"""Packed batches of pictures with as many patches as there may be, at their own aspect ratio: SigLIP 2's NaFlex."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vlkern._random import draws
from vlkern.data.augment import augment
from vlkern.data.batches import Steps, check_batches
from vlkern.data.images import to_unit
from vlkern.data.shards import PairShards
from vlkern.data.tokenizer import Tokenizer
from vlkern.layers.patches import grid_within, pack_pictures


@dataclass(frozen=True)
class NaflexSize:
    """The size to which a picture is decoded, for `decode_image`, `PairShards.read` and the like.

    patch        side of a patch, in pixels
    max_patches  the most patches of a picture

    Raises:
        ValueError: one is below 1.

    Example:
        >>> NaflexSize(patch=16, max_patches=256)(480, 640)
        (224, 288)
    """

    patch: int
    max_patches: int

    def __post_init__(self) -> None:
        grid_within(1, 1, self.patch, self.max_patches)

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) in pixels, multiples of the patch, of a picture of this height and width."""
        h, w = grid_within(height, width, self.patch, self.max_patches)
        return h * self.patch, w * self.patch


class _Place(NamedTuple):
    """A sample, the number from which its chances are drawn, and the patches that it may have."""

    number: int
    draw: int
    max_patches: int


class _Item(NamedTuple):
    """What a worker reads for one sample; no pixels if it is unreadable."""

    pixels: torch.Tensor | None
    caption: str
    lines: dict[int, str]


_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, str]]


class _Places:
    """The samples of this rank, step by step; all of a step get the same number of patches, on every rank."""

    def __init__(self, steps: Steps, max_patches: Sequence[int]) -> None:
        self.steps, self.max_patches = steps, max_patches

    def __iter__(self) -> Iterator[list[_Place]]:
        for step, samples in enumerate(self.steps, self.steps.start):
            # The passes have the numbers from 0 on.
            most = self.max_patches[int(draws(1, self.steps.seed, -1 - step)[0]) % len(self.max_patches)]
            yield [_Place(number, draw, most) for number, draw in samples]


class _Items(Dataset[_Item]):
    def __init__(self, pairs: PairShards, patch: int, augmented: bool) -> None:
        self.pairs, self.patch, self.augmented = pairs, patch, augmented

    def __getitem__(self, place: _Place) -> _Item:
        pair, lines = self.pairs.read(place.number, NaflexSize(self.patch, place.max_patches))
        if pair is None:
            return _Item(None, "", lines)
        pixels = pair.pixels
        if self.augmented:
            changed = augment(to_unit(pixels)[None], torch.Generator().manual_seed(place.draw))[0]
            pixels = ((changed + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return _Item(pixels, pair.captions[place.draw % len(pair.captions)], lines)


class _Collate:
    """Packs and tokenizes in the worker. A batch with a hole comes without patches; its lines say why."""

    def __init__(self, tokenizer: Tokenizer, patch: int) -> None:
        self.tokenizer, self.patch = tokenizer, patch

    def __call__(self, items: Sequence[_Item]) -> _Batch:
        bad = {index: line for item in items for index, line in item.lines.items()}
        pictures = [item.pixels for item in items if item.pixels is not None]
        ids = self.tokenizer([item.caption for item in items])
        if len(pictures) < len(items):
            return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int32), ids, bad
        return *pack_pictures(pictures, self.patch), ids, bad


def naflex_batches(
    dataset: PairShards,
    global_batch: int,
    patch: int,
    max_patches: Sequence[int],
    *,
    tokenizer: Tokenizer,
    augmented: bool = False,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As `batches`, the same pairs in the same order, but with pictures at their own aspect ratio, packed.

    Of several `max_patches` one is drawn, uniformly, for each global batch; it is a function of (`seed`, step) alone.
    Changes of a picture are drawn from a number that belongs to the picture and the pass.

    Args:
        dataset: the pairs; its `image_size` has no meaning here.
        global_batch: B pairs, over all ranks.
        patch: side P of a patch.
        max_patches: the most patches of a picture; SigLIP 2 draws from 128, 256, 576, 784 and 1024.
        tokenizer: captions to ids [b, L].
        augmented: mirror, turn, zoom, shift and tint pictures at random.
        seed: any whole number.
        start: number of the first step.
        rank: of this process.
        world: how many ranks share a batch; divides `global_batch`.
        workers: processes that read ahead; 0 reads in this process, when asked.

    Returns:
        An iterator of (patches [T, P P 3] uint8, shapes [b, 2] int32, ids [b, L] int64), b = B / `world`; pinned if
        there is CUDA.

    Raises:
        DataError: as `batches`.
        ValueError: as `batches`; also if a patch or number of patches is below 1, or there is no such number.

    Example:
        >>> pairs = PairShards(clipart_mini() / "test.tar", 64)
        >>> stream = naflex_batches(pairs, 32, patch=8, max_patches=[64], tokenizer=load_tokenizer("bytes", 16))
        >>> patches, shapes, ids = next(stream)
        >>> patches.shape[1], shapes.shape, int(shapes.prod(1).max()) <= 64
        (192, torch.Size([32, 2]), True)
    """
    check_batches(dataset, global_batch, start, rank, world, workers)
    if not max_patches:
        raise ValueError("max_patches must be at least one number, got none")
    for most in max_patches:
        NaflexSize(patch, most)
    loader = DataLoader(
        _Items(dataset, patch, augmented),
        batch_sampler=_Places(Steps(len(dataset), global_batch, seed, start, rank, world), max_patches),
        num_workers=workers,
        collate_fn=_Collate(tokenizer, patch),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return _checked(dataset, loader)


def _checked(
    dataset: PairShards, loader: DataLoader[_Item]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Reports what the workers could not read; a batch without patches is reported as an error."""
    for patches, shapes, ids, bad in loader:
        if bad:
            dataset.note(bad)
        yield patches, shapes, ids
