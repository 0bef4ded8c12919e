"""Pictures of any shape as one row of patches, and texts of any length as one row of tokens: no pads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlkern.layers.patches import patchify


class PackedImages(NamedTuple):
    """n images, one behind the other; what `vlkern.models.navit.Navit.encode_image` takes, as `encode_image(*packed)`.

    patches     [T, P P 3], in the dtype of the pictures
    cu_seqlens  [n + 1] int32, where each image begins, and T
    yx          [T, 2] int32, row and column of each patch in its image
    hw          [n, 2] int32, rows and columns of each image
    """

    patches: torch.Tensor
    cu_seqlens: torch.Tensor
    yx: torch.Tensor
    hw: torch.Tensor


class PackedTexts(NamedTuple):
    """n texts, one behind the other.

    ids         [T] int64
    cu_seqlens  [n + 1] int32, where each text begins, and T
    """

    ids: torch.Tensor
    cu_seqlens: torch.Tensor


def cumulate(lengths: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """cu_seqlens [n + 1] int32 of sequences of these lengths."""
    ends = torch.as_tensor(lengths, dtype=torch.int64).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).int()


def pack_images(
    pictures: Sequence[torch.Tensor], patch: int, *, kept: Sequence[torch.Tensor | None] | None = None
) -> PackedImages:
    """Patches of n pictures of any sizes side by side.

    Args:
        pictures: [3, h P, w P] each, all of one dtype.
        patch: P.
        kept: for each picture the numbers of the patches that stay, rising (as from `dropping.keep`), or None for all.

    Raises:
        TypeError: a picture is no tensor.
        ValueError: there is no picture, one has no such size, or `kept` has another length.

    Example:
        >>> import torch
        >>> packed = pack_images([torch.zeros(3, 16, 24), torch.zeros(3, 8, 8)], patch=8)
        >>> packed.patches.shape, packed.cu_seqlens.tolist(), packed.hw.tolist()
        (torch.Size([7, 192]), [0, 6, 7], [[2, 3], [1, 1]])
    """
    if not len(pictures):
        raise ValueError("pictures must hold at least one, got none")
    if kept is not None and len(kept) != len(pictures):
        raise ValueError(f"kept must have an entry for each of {len(pictures)} pictures, got {len(kept)}")
    parts, places, grids = [], [], []
    for i, picture in enumerate(pictures):
        patches = patchify(picture, patch)
        h, w = (side // patch for side in picture.shape[1:])
        number = torch.arange(h * w) if kept is None or kept[i] is None else kept[i]
        assert number is not None
        parts.append(patches[number])
        places.append(torch.stack([number // w, number % w], 1))
        grids.append((h, w))
    return PackedImages(
        torch.cat(parts),
        cumulate([len(part) for part in parts]),
        torch.cat(places).int(),
        torch.tensor(grids, dtype=torch.int32),
    )


def pack_texts(ids: torch.Tensor, end: int) -> PackedTexts:
    """The rows of ids without their pads: each up to and with its first end token.

    Args:
        ids: [n, L] integers, padded on the right; a row without an end token is taken whole.
        end: id of the end token.

    Raises:
        ValueError: another shape, or no text.

    Example:
        >>> import torch
        >>> pack_texts(torch.tensor([[34, 1, 0, 0], [35, 36, 37, 1]]), end=1)
        PackedTexts(ids=tensor([34,  1, 35, 36, 37,  1]), cu_seqlens=tensor([0, 2, 6], dtype=torch.int32))
    """
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"ids must have shape [n, L] with at least one text, got {list(ids.shape)}")
    is_end = ids == end
    # Before the first end token, and that token: where no end token has come yet.
    inside = (is_end.cumsum(1) - is_end.long()) == 0
    return PackedTexts(ids[inside], cumulate(inside.sum(1)))
