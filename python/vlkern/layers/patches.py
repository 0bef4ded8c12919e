"""Pictures of any shape as packed patches: the size rule of NaFlex, cutting, packing, and the padded batches of others.

A packed batch is `patches` [T, p p 3] with `shapes` [S, 2] int32: picture s has h x w = shapes[s] patches of p x p
pixels, its rows from top to bottom, one picture behind the other. The numbers of a patch lie row by row, column by
column, channel by channel (ph, pw, C), as in big_vision and transformers; a convolution's are (C, ph, pw).

    S pictures   T patches of all pictures   p side of a patch   N slots of a picture in a padded batch

Source: Tschannen et al., SigLIP 2, 2025, section 2.4.2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vlkern import _checks

#: Where the search for the scale ends, and between which scales it looks.
_STEP, _LOW, _HIGH = 1e-5, 1e-6, 100.0


def grid_within(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """How many rows and columns of patches a picture gets: as many as there may be, at its aspect ratio.

    With the largest scale r for which ceil(height r / p) ceil(width r / p) <= max_patches, found by bisection as
    big_vision and transformers do, the sides are those two numbers. Pictures are enlarged up to 100 times.

    Args:
        height: of the picture in pixels.
        width: likewise.
        patch: p.
        max_patches: the most patches.

    Returns:
        (h, w), h w <= max_patches.

    Raises:
        ValueError: an argument is below 1 or no whole number (so a picture without area has no place here), or the
            picture does not fit even at a millionth of its size.

    Example:
        >>> grid_within(480, 640, patch=16, max_patches=256)
        (14, 18)
    """
    for name, value in (("height", height), ("width", width), ("patch", patch), ("max_patches", max_patches)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {value!r}")

    def grid(scale: float) -> tuple[int, int]:
        return math.ceil(height * scale / patch), math.ceil(width * scale / patch)

    low, high = _LOW, _HIGH
    while high - low >= _STEP:
        scale = (low + high) / 2
        if math.prod(grid(scale)) <= max_patches:
            low = scale
        else:
            high = scale
    if math.prod(grid(low)) > max_patches:
        raise ValueError(f"height and width must fit {max_patches} patches at a millionth, got {height} x {width}")
    return grid(low)


def resize_within(pixels: torch.Tensor, patch: int, max_patches: int) -> torch.Tensor:
    """A picture at the size of `grid_within`, by an antialiased bilinear filter.

    Args:
        pixels: [3, H, W] uint8 or floating point.
        patch: p.
        max_patches: the most patches.

    Returns:
        [3, h p, w p] in the dtype of `pixels`; uint8 is rounded.

    Raises:
        TypeError, ValueError: no such picture, or as `grid_within`.
    """
    pixels = _picture("pixels", pixels)
    h, w = grid_within(pixels.shape[1], pixels.shape[2], patch, max_patches)
    size = (h * patch, w * patch)
    if tuple(pixels.shape[1:]) == size:
        return pixels
    wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32) if pixels.is_floating_point() else torch.float32)
    resized = F.interpolate(wide[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (resized if pixels.is_floating_point() else resized.round().clamp(0, 255)).to(pixels.dtype)


def patchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[3, h p, w p] of any dtype -> [h w, p p 3].

    Raises:
        TypeError, ValueError: no picture, or a side is no multiple of the patch.
    """
    pixels = _picture("pixels", pixels)
    if pixels.shape[1] % patch or pixels.shape[2] % patch:
        raise ValueError(f"pixels must have sides that are multiples of the patch {patch}, got {list(pixels.shape)}")
    rows = pixels.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # [3, h, p, w, p]
    return rows.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def unpatchify(patches: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """[h w, p p 3] -> [3, h p, w p]: undoes `patchify`."""
    p = math.isqrt(patches.shape[1] // 3)
    return patches.reshape(h, w, p, p, 3).permute(4, 0, 2, 1, 3).reshape(3, h * p, w * p)


def pack_pictures(pictures: Sequence[torch.Tensor], patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose sides are multiples of the patch, one behind the other.

    Args:
        pictures: S of [3, h p, w p], of one dtype; h and w may differ from one to the other.
        patch: p.

    Returns:
        patches [T, p p 3] in that dtype and shapes [S, 2] int32 on the CPU.

    Raises:
        TypeError, ValueError: none is given, or as `patchify`.

    Example:
        >>> patches, shapes = pack_pictures([torch.rand(3, 32, 48), torch.rand(3, 16, 16)], patch=16)
        >>> patches.shape, shapes.tolist()
        (torch.Size([7, 768]), [[2, 3], [1, 1]])
    """
    if not pictures:
        raise ValueError("pictures must be at least one, got none")
    parts = [patchify(pixels, patch) for pixels in pictures]
    shapes = [[side // patch for side in pixels.shape[1:]] for pixels in pictures]
    return torch.cat(parts), torch.tensor(shapes, dtype=torch.int32)


def check_shapes(shapes: torch.Tensor, patches: int) -> None:
    """Make sure that the pictures have all patches.

    Args:
        shapes: [S, 2] int32 or int64.
        patches: T.

    Raises:
        TypeError: no integers.
        ValueError: no [S, 2], no picture, a picture without area, or another number of patches. Values are looked at
            where that costs no wait for a GPU, see `vlkern.validate`.
    """
    t = _checks.tensor("shapes", shapes)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"shapes must be int32 or int64, got {t.dtype}")
    if t.dim() != 2 or t.shape[1] != 2 or len(t) == 0:
        raise ValueError(f"shapes must be [S, 2], rows and columns of at least one picture, got {list(t.shape)}")
    if not _checks.values_may_be_read(t):
        return
    if bool((flat := (t < 1).any(1)).any()):
        i = int(flat.nonzero()[0])
        raise ValueError(f"shapes must be at least 1 x 1 patch, got {t[i].tolist()} for picture {i}")
    if (total := int(t.long().prod(1).sum())) != patches:
        raise ValueError(f"shapes must have as many patches as there are, {patches}, got {total} in {len(t)} pictures")


def segments(shapes: torch.Tensor) -> torch.Tensor:
    """[S, 2] -> cu_seqlens [S + 1] int32: where each picture's patches begin, and where the last one's end."""
    return F.pad(shapes.prod(1).cumsum(0), (1, 0)).to(torch.int32)


class Places(NamedTuple):
    """Where each patch of a packed batch is.

    cu_seqlens   [S + 1] int32, `segments`
    start, stop  [T] int32, first patch of its picture and one past the last: the interval that its attention sees
    row, column  [T] int32 in the grid of its picture
    h, w         [T] int32, sides of that grid
    """

    cu_seqlens: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    h: torch.Tensor
    w: torch.Tensor


def places(shapes: torch.Tensor, patches: int) -> Places:
    """Where each of T patches is, for shapes [S, 2] that `check_shapes` accepts. Waits for no GPU."""
    cu = segments(shapes)
    i = torch.arange(patches, dtype=torch.int32, device=cu.device)
    picture = torch.searchsorted(cu[1:], i, right=True)
    start = cu[picture]
    h, w = shapes.to(torch.int32)[picture].unbind(1)
    within = i - start
    return Places(cu, start, cu[picture + 1], within // w, within % w, h, w)


def to_padded(
    patches: torch.Tensor, shapes: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A packed batch as transformers' Siglip2Model takes it.

    Args:
        patches: [T, C] of any dtype.
        shapes: [S, 2] int32 or int64.
        length: N, slots of each picture.

    Returns:
        pixel_values [S, N, C], zeros behind each picture; pixel_attention_mask [S, N] int32; spatial_shapes [S, 2]
        int64.

    Raises:
        TypeError, ValueError: as `check_shapes`, or a picture has more than N patches.
    """
    check_shapes(shapes, len(patches))
    lengths = shapes.prod(1)
    if _checks.values_may_be_read(shapes) and int(lengths.max()) > length:
        i = int(lengths.argmax())
        raise ValueError(
            f"length must be at least the patches of the largest picture, got {length} for picture {i} of "
            f"{shapes[i].tolist()} patches"
        )
    slot = torch.arange(length, device=patches.device)
    mask = slot < lengths[:, None]
    index = segments(shapes)[:-1, None] + slot  # behind a picture: another's patch, or none
    padded = patches[index.clamp(max=len(patches) - 1)].masked_fill(~mask[..., None], 0)
    return padded, mask.to(torch.int32), shapes.long()


def from_padded(
    pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor, spatial_shapes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' Siglip2 processor gives, packed; undoes `to_padded`. Waits for a GPU.

    Args:
        pixel_values: [S, N, C] of any dtype.
        pixel_attention_mask: [S, N], not zero where there is a patch.
        spatial_shapes: [S, 2] int32 or int64.

    Returns:
        patches [T, C] and shapes [S, 2] int32.

    Raises:
        ValueError: the shapes do not belong together, or a picture's mask is not its first h w slots.
    """
    mask = pixel_attention_mask.bool()
    _checks.shape("pixel_attention_mask", mask, tuple(pixel_values.shape[:2]))
    _checks.shape("spatial_shapes", spatial_shapes, (len(pixel_values), 2))
    slot = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask, slot < spatial_shapes.prod(1)[:, None]):
        raise ValueError("pixel_attention_mask must be set in the first h w slots of each picture, and only there")
    patches = pixel_values[mask]
    check_shapes(spatial_shapes, len(patches))
    return patches, spatial_shapes.to(torch.int32)


def _picture(name: str, value: torch.Tensor) -> torch.Tensor:
    t = _checks.tensor(name, value)
    if t.dim() != 3 or t.shape[0] != 3 or t.numel() == 0:
        raise ValueError(f"{name} must be a picture [3, H, W] that is not empty, got {list(t.shape)}")
    return t
