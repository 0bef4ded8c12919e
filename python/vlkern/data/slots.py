"""Packed images as sequences of one length with a fixed number of slots, for programs whose shapes must not change.

Without this, images lie side by side and nothing is padded. Here each of S sequences has L tokens and E slots for
images, and one slot more for its pads, which attend to each other and to nothing else. What slots without an image
give is left out of a loss by `valid`.

Source: Dehghani et al., Patch n' Pack: NaViT, 2023, appendix A.3.
"""

from typing import NamedTuple

import torch

from vlkern.data.patches import PackedImages, PackedTexts, cumulate
from vlkern.packing import pack


class Sequences(NamedTuple):
    """S sequences of L tokens, one behind the other, with E + 1 slots each.

    images    S L tokens; image numbers are slots: those of sequence s are s (E + 1) and the E that follow, the last
              of which holds the pads
    valid     [S (E + 1)] bool, the slots that hold an image
    order     [S (E + 1)] int64, which image a slot holds; -1 for none
    left_out  [k] int64, the images that found no place, rising
    """

    images: PackedImages
    valid: torch.Tensor
    order: torch.Tensor
    left_out: torch.Tensor


def sequences(images: PackedImages, length: int, slots: int, count: int | None = None) -> Sequences:
    """Put images into sequences by greedy first fit, in their order; what does not fit is left out and told.

    An image goes into the first sequence with room for its tokens. Of the images of a sequence the first E stay, and of
    the sequences the first S; so the result depends on the order alone.

    Args:
        images: n images, on the CPU.
        length: L, tokens of a sequence.
        slots: E, the most images of a sequence.
        count: S; None makes as many as there are.

    Raises:
        ValueError: an image has more than L tokens or none, or a number is below 1.

    Example:
        >>> import torch
        >>> images = pack_images([torch.zeros(3, 8, 24), torch.zeros(3, 8, 16), torch.zeros(3, 8, 8)], patch=8)
        >>> made = sequences(images, length=4, slots=2)
        >>> made.order.tolist(), made.images.cu_seqlens.tolist()
        ([0, 2, -1, 1, -1, -1], [0, 3, 4, 4, 6, 6, 8])
    """
    for name, value in (("length", length), ("slots", slots), ("count", 1 if count is None else count)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    lengths = images.cu_seqlens.diff().long()
    packing = pack(lengths, length, method="first_fit")
    bins = packing.bins if count is None else count
    order = torch.full((bins, slots + 1), -1, dtype=torch.int64)
    for b in range(min(bins, packing.bins)):
        members = torch.from_numpy(packing.members(b))[:slots]
        order[b, : len(members)] = members
    order = order.flatten()
    valid = order >= 0
    taken = torch.where(valid, lengths[order.clamp(min=0)], 0).unflatten(0, (bins, slots + 1))
    taken[:, -1] = length - taken.sum(1)
    cu_seqlens = cumulate(taken.flatten())
    # Where each token of an image goes; the rest stays a pad.
    here, there = images.cu_seqlens.tolist(), cu_seqlens.tolist()
    source = [torch.arange(here[i], here[i + 1]) for i in order[valid].tolist()]
    goes = [torch.arange(there[s], there[s + 1]) for s in valid.nonzero()[:, 0].tolist()]
    patches = images.patches.new_zeros(bins * length, images.patches.shape[1])
    yx, hw = images.yx.new_zeros(bins * length, 2), images.hw.new_ones(len(order), 2)
    if source:
        patches[torch.cat(goes)] = images.patches[torch.cat(source)]
        yx[torch.cat(goes)] = images.yx[torch.cat(source)]
        hw[valid] = images.hw[order[valid]]
    present = torch.zeros(len(lengths), dtype=torch.bool)
    present[order[valid]] = True
    return Sequences(PackedImages(patches, cu_seqlens, yx, hw), valid, order, (~present).nonzero()[:, 0])


def texts_of(texts: PackedTexts, order: torch.Tensor) -> PackedTexts:
    """The texts that belong to the slots of `Sequences.order`; a slot without an image has an empty one.

    Example:
        >>> import torch
        >>> texts = pack_texts(torch.tensor([[34, 1], [35, 1]]), end=1)
        >>> texts_of(texts, torch.tensor([1, -1, 0]))
        PackedTexts(ids=tensor([35,  1, 34,  1]), cu_seqlens=tensor([0, 2, 2, 4], dtype=torch.int32))
    """
    cu = texts.cu_seqlens.tolist()
    parts = [texts.ids[cu[i] : cu[i + 1]] if i >= 0 else texts.ids[:0] for i in order.tolist()]
    return PackedTexts(torch.cat(parts), cumulate([len(part) for part in parts]))
