"""Packed batches of pictures at their own aspect ratio, at resolutions drawn at random: functions of seed and step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vlkern.data.augment import augment
from vlkern.data.batches import Steps, check_batches
from vlkern.data.dropping import Dropping, keep
from vlkern.data.images import to_unit
from vlkern.data.patches import PackedImages, PackedTexts, pack_images, pack_texts
from vlkern.data.resolution import Resolutions, grid
from vlkern.data.shards import PairShards
from vlkern.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Views:
    """How pictures are seen.

    patch        side of a patch, in pixels
    resolutions  how large
    dropping     which share of the patches is dropped; None drops nothing
    longest      the most rows or columns of patches, None if there is no limit
    augmented    whether pictures are mirrored, turned, zoomed, shifted and tinted at random
    """

    patch: int
    resolutions: Resolutions
    dropping: Dropping | None = None
    longest: int | None = None
    augmented: bool = False

    def size(self, height: int, width: int, resolution: float) -> tuple[int, int]:
        """(H, W) in pixels, multiples of the patch, of a picture of this height and width."""
        h, w = grid(height, width, resolution, self.patch, longest=self.longest)
        return h * self.patch, w * self.patch


@dataclass(frozen=True)
class NavitSize:
    """The size to which a picture is decoded for a NaViT: a function of its own size, for `decode_image` and the like.

    patch        side of a patch, in pixels
    max_patches  the most patches, and about as many as it gets
    longest      the most rows or columns, None if there is no limit

    Raises:
        ValueError: one is below 1.

    Example:
        >>> NavitSize(patch=16, max_patches=256)(480, 640)
        (224, 288)
    """

    patch: int
    max_patches: int
    longest: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("patch", self.patch), ("max_patches", self.max_patches), ("longest", self.longest)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) in pixels, multiples of the patch, of a picture of this height and width."""
        h, w = grid(height, width, self.patch * math.sqrt(self.max_patches), self.patch, longest=self.longest)
        return h * self.patch, w * self.patch


class _Place(NamedTuple):
    """A sample, the number from which its chances are drawn, and how many samples came in the steps before."""

    number: int
    draw: int
    seen: int


class _Item(NamedTuple):
    """What a worker reads for one sample; no pixels if it is unreadable."""

    pixels: torch.Tensor | None
    kept: torch.Tensor | None
    caption: str
    lines: dict[int, str]


_Batch = tuple[PackedImages | None, PackedTexts, dict[int, str]]


class _Places:
    """The samples of this rank, step by step."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[list[_Place]]:
        for step, samples in enumerate(self.steps, self.steps.start):
            yield [_Place(number, draw, step * self.steps.global_batch) for number, draw in samples]


class _Items(Dataset[_Item]):
    def __init__(self, pairs: PairShards, views: Views) -> None:
        self.pairs, self.views = pairs, views

    def __getitem__(self, place: _Place) -> _Item:
        generator = torch.Generator().manual_seed(place.draw)
        resolution = self.views.resolutions.draw(1, generator).item()
        pair, lines = self.pairs.read(place.number, lambda height, width: self.views.size(height, width, resolution))
        if pair is None:
            return _Item(None, None, "", lines)
        pixels, kept = pair.pixels, None
        if self.views.augmented:
            changed = augment(to_unit(pixels)[None], generator)[0]
            pixels = ((changed + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if self.views.dropping is not None:
            length = torch.tensor([pixels.shape[1] * pixels.shape[2] // self.views.patch**2])
            kept = keep(length, self.views.dropping.rates(length, place.seen, generator), generator).numbers
        return _Item(pixels, kept, pair.captions[place.draw % len(pair.captions)], lines)


class _Collate:
    """Packs and tokenizes in the worker. A batch with a hole comes without images; its lines say why."""

    def __init__(self, tokenizer: Tokenizer, patch: int) -> None:
        self.tokenizer, self.patch = tokenizer, patch

    def __call__(self, items: Sequence[_Item]) -> _Batch:
        bad = {index: line for item in items for index, line in item.lines.items()}
        pictures = [item.pixels for item in items if item.pixels is not None]
        texts = pack_texts(self.tokenizer([item.caption for item in items]), self.tokenizer.end)
        whole = len(pictures) == len(items)
        images = pack_images(pictures, self.patch, kept=[item.kept for item in items]) if whole else None
        return images, texts, bad


def native_batches(
    dataset: PairShards,
    global_batch: int,
    views: Views,
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[tuple[PackedImages, PackedTexts]]:
    """As `batches`, the same pairs in the same order, but with pictures at their own aspect ratio, packed.

    Resolution, dropped patches and changes of a picture are drawn from a number that belongs to the picture and the
    pass, so they are the same for any `world`, `workers` and `global_batch`, except that a rate that depends on the
    pictures seen (`dropping.BySeen`) counts those of the steps before.

    Args:
        dataset: the pairs; its `image_size` has no meaning here.
        global_batch: B pairs, over all ranks.
        views: how pictures are seen.
        tokenizer: captions to ids; their pads are taken away.
        seed: any whole number.
        start: number of the first step.
        rank: of this process.
        world: how many ranks share a batch; divides `global_batch`.
        workers: processes that read ahead; 0 reads in this process, when asked.

    Returns:
        An iterator of images (patches uint8) and texts of B / `world` pairs, pinned if there is CUDA.

    Raises:
        DataError, ValueError: as `batches`.

    Example:
        >>> pairs = PairShards(clipart_mini() / "test.tar", 64)
        >>> views = Views(patch=8, resolutions=Resolutions(32, 64))
        >>> images, texts = next(native_batches(pairs, 32, views, tokenizer=load_tokenizer("bytes", 16)))
        >>> images.patches.shape[1], len(images.hw), len(texts.cu_seqlens)
        (192, 32, 33)
    """
    check_batches(dataset, global_batch, start, rank, world, workers)
    loader = DataLoader(
        _Items(dataset, views),
        batch_sampler=_Places(Steps(len(dataset), global_batch, seed, start, rank, world)),
        num_workers=workers,
        collate_fn=_Collate(tokenizer, views.patch),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return _checked(dataset, loader)


def _checked(dataset: PairShards, loader: DataLoader[_Item]) -> Iterator[tuple[PackedImages, PackedTexts]]:
    """Reports what the workers could not read; a batch without images is reported as an error."""
    for images, texts, bad in loader:
        if bad:
            dataset.note(bad)
        yield images, texts
