"""What coupling flows split: orders of channels and tokens as index vectors, and pictures as tokens.

A coupling leaves one half of its input as it is and changes the other half by an amount that depends on the first. An
`order` lists the channels or tokens of a coupling: the first half of the list is what it looks at, the second half what
it changes. Nothing is ever moved to another place, so the next coupling finds every number where it was.

    "checkerboard"   looks at the tokens whose row + column is even
    "vstripes"       looks at even columns
    "hstripes"       looks at even rows
    "...-inv"        looks at the other tokens

(With an odd number of columns the original takes the number of a token, in raster order, for its column; so does this.)

Source: Kolesnikov et al., Jet: A Modern Transformer-Based Normalizing Flow, 2024.
"""

import math

import torch

from vlkern import _checks

SPLITS = tuple(name + end for name in ("checkerboard", "vstripes", "hstripes") for end in ("", "-inv"))


def token_order(rows: int, columns: int, split: str) -> torch.Tensor:
    """Tokens of a grid, those that a coupling looks at before those that it changes.

    Args:
        rows: of the grid.
        columns: likewise.
        split: one of SPLITS.

    Returns:
        [rows * columns] int32 on the CPU, a permutation.

    Raises:
        ValueError: no such split, or the halves differ in size.

    Example:
        >>> vlkern.layers.flow.token_order(2, 4, "checkerboard").tolist()
        [0, 2, 5, 7, 1, 3, 4, 6]
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    place = torch.arange(rows * columns, device="cpu")
    row = place // max(columns, 1)
    odd = {"checkerboard": row + place, "vstripes": place, "hstripes": row}[split.removesuffix("-inv")] % 2 == 1
    first, second = place[~odd], place[odd]
    if len(first) != len(second):
        raise ValueError(f"rows and columns must give {split} two equal halves, got {rows} x {columns}")
    return torch.cat([second, first] if split.endswith("-inv") else [first, second]).int()


def channel_order(channels: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """A random permutation [channels] int32 on the CPU: the first half is looked at, the second changed.

    Raises:
        ValueError: the number of channels is odd.
    """
    if channels % 2:
        raise ValueError(f"channels must be even, got {channels}")
    return torch.randperm(channels, generator=generator, device="cpu").int()


def cosines(patch: int, channels: int) -> torch.Tensor:
    """The cosine transform of a patch over rows, columns and colours, an orthonormal matrix.

    Neighbouring pixels are alike, and so are the colours of a pixel: in this basis most numbers of a patch are small.
    Of three colours it makes their sum, red - blue, and red - 2 green + blue, each divided by its length.

    Args:
        patch: p.
        channels: C.

    Returns:
        [p p C, p p C] float32 on the CPU: a row for each wave; columns are the numbers of a token as `to_tokens` lays
        them out.

    Example:
        >>> basis = vlkern.layers.flow.cosines(4, 3)
        >>> float((basis @ basis.T - torch.eye(48)).abs().max()) < 1e-6
        True
    """
    sides = [_waves(n) for n in (patch, patch, channels)]
    return torch.kron(torch.kron(sides[0], sides[1]), sides[2]).float()


def _waves(n: int) -> torch.Tensor:
    """[n, n] float64: row k is a cosine of k half waves."""
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    waves = torch.cos(math.pi / n * i[:, None] * (i + 0.5)) * math.sqrt(2 / n)
    waves[0] /= math.sqrt(2)
    return waves


def to_tokens(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, C, h p, w p] -> [B, h w, p p C], the numbers of a patch row by row, column by column, channel by channel.

    Raises:
        TypeError, ValueError: no pictures, or a side is no multiple of the patch.

    Example:
        >>> vlkern.layers.flow.to_tokens(torch.rand(2, 3, 8, 12), patch=4).shape
        torch.Size([2, 6, 48])
    """
    t = _checks.tensor("pixels", pixels)
    if t.dim() != 4 or t.shape[2] % patch or t.shape[3] % patch or 0 in t.shape[1:]:
        raise ValueError(
            f"pixels must be [B, C, H, W] with sides that are multiples of the patch {patch}, got {list(t.shape)}"
        )
    return t.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def to_pixels(tokens: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """[B, h w, p p C] -> [B, C, h p, w p]: undoes `to_tokens`.

    Raises:
        TypeError, ValueError: no such tokens.
    """
    t = _checks.tensor("tokens", tokens)
    if t.dim() != 3 or t.shape[1] != rows * columns or t.shape[2] % patch**2:
        raise ValueError(
            f"tokens must be [B, {rows * columns}, a multiple of {patch**2}] for a grid of {rows} x {columns}, got "
            f"{list(t.shape)}"
        )
    return t.reshape(len(t), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
