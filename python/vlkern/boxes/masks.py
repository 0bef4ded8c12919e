"""Masks of objects as sixteen tokens: a small convolutional VQ-VAE, whose released weights this class holds.

    mask [64, 64] in [-1, 1] -> 4 convolutions of stride 2 -> 2 residual blocks -> 1 x 1 -> z [4, 4, E]
    code = argmin_k |z - c_k|^2, K codebook rows c_k, row by row of the 4 x 4 grid
    c_code [4, 4, E] -> 1 x 1 -> 2 residual blocks -> 4 transposed convolutions of stride 2 -> 1 x 1 -> [64, 64]

A residual block is x + conv1(relu(conv3(relu(conv3(x))))). A mask is what is above 0, inside the box of its object.

    N masks   E width of a codebook row   K codebook rows (128)

Source: Ning et al., All in Tokens, 2023; Beyer et al., PaliGemma, 2024, section 3.2.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from vlkern import _checks
from vlkern.boxes.text import CODES, CODES_OF_A_MASK, Box, Detection
from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models.state import Checkpoint, Source, collect, open_checkpoint

SIDE = 64
_GRID = 4
#: Channels after each convolution: the released encoder's are read from its file.
_DECODER = (128, 64, 32, 16)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, 4, 4] -> the same."""
        return x + self.net(x)


class _Codebook(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(CODES, width))


class MaskVae(nn.Module):
    """Masks to sixteen codes and back. Parameters are named as in the released file.

    Args:
        channels: of the encoder's four strided convolutions.
        width: E of a codebook row.

    Example:
        >>> vae = MaskVae(channels=(4, 8, 8, 16), width=8)
        >>> codes = vae.encode(torch.zeros(2, 1, 64, 64))
        >>> vae.decode(codes).shape
        torch.Size([2, 64, 64])
    """

    def __init__(self, channels: tuple[int, int, int, int], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *channels), channels, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        last = channels[-1]
        self.encoder = nn.Sequential(*layers, _Residual(last), _Residual(last), nn.Conv2d(last, width, 1))
        self._vq_vae = _Codebook(width)
        first = _DECODER[0]
        layers = [nn.Conv2d(width, first, 1), nn.ReLU(), _Residual(first), _Residual(first)]
        for inputs, outputs in zip((first, *_DECODER), _DECODER, strict=False):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(_DECODER[-1], 1, 1))

    @torch.no_grad()
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks [N, 1, 64, 64] in [-1, 1], from `crop_mask` -> codes [N, 16] int64.

        Raises:
            TypeError, ValueError: the masks have another shape, or are no floating-point numbers.
        """
        _checks.floating("masks", masks)
        if masks.dim() != 4 or tuple(masks.shape[1:]) != (1, SIDE, SIDE):
            raise ValueError(f"masks must have shape [N, 1, {SIDE}, {SIDE}], got {list(masks.shape)}")
        z_NTE = self.encoder(masks.to(self._vq_vae._embedding.dtype)).flatten(2).transpose(1, 2)
        rows_KE = self._vq_vae._embedding
        return (rows_KE.square().sum(1) - 2 * z_NTE @ rows_KE.T).argmin(-1)  # |z|^2 is the same for all rows

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [N, 16] -> masks [N, 64, 64], about -1 outside and 1 inside the object.

        Raises:
            TypeError, ValueError: the codes have another shape, are no integers, or not below 128.
        """
        _checks.tensor("codes", codes)
        if codes.dim() != 2 or codes.shape[1] != CODES_OF_A_MASK:
            raise ValueError(f"codes must have shape [N, {CODES_OF_A_MASK}], got {list(codes.shape)}")
        if codes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"codes must be int32 or int64, got {codes.dtype}")
        if _checks.values_may_be_read(codes) and len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < CODES:
            raise ValueError(f"codes must be between 0 and {CODES - 1}, got {int(codes.min())} to {int(codes.max())}")
        z_NTE = self._vq_vae._embedding[codes]
        return self.decoder(z_NTE.transpose(1, 2).unflatten(2, (_GRID, _GRID)))[:, 0]

    def masks(self, objects: Sequence[Detection], height: int, width: int) -> list[torch.Tensor | None]:
        """The mask of each object on a picture of this size, bool [height, width]; None for those without codes."""
        shown = [found for found in objects if found.codes is not None]
        codes = torch.tensor([found.codes for found in shown], dtype=torch.int64).reshape(-1, CODES_OF_A_MASK)
        decoded = iter(self.decode(codes.to(self._vq_vae._embedding.device)).cpu())
        return [
            None if found.codes is None else paste_mask(next(decoded), found.box, height, width) for found in objects
        ]


def paste_mask(mask: torch.Tensor, box: Box, height: int, width: int) -> torch.Tensor:
    """A decoded mask [64, 64] in its box on a picture -> bool [height, width].

    It is resized to the pixels of the box (bilinear, antialiased where it shrinks) and is there where it is above 0.
    """
    _checks.shape("mask", mask, (SIDE, SIDE))
    top, left, bottom, right = Detection(box).pixels(height, width)
    picture = torch.zeros(height, width, dtype=torch.bool)
    if top < bottom and left < right:
        picture[top:bottom, left:right] = _resize(mask.float(), bottom - top, right - left) > 0
    return picture


def crop_mask(mask: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of a mask that lies in a box, as `MaskVae.encode` takes it.

    Args:
        mask: [height, width] of the picture; bool, or numbers from 0 (outside) to 1 (inside).
        box: ymin, xmin, ymax, xmax.

    Returns:
        [1, 64, 64] float32 in [-1, 1].

    Raises:
        ValueError: the mask has another shape, or the box not one pixel of it.
    """
    if _checks.tensor("mask", mask).dim() != 2:
        raise ValueError(f"mask must have shape [height, width], got {list(mask.shape)}")
    top, left, bottom, right = Detection(box).pixels(*mask.shape)
    if top >= bottom or left >= right:
        raise ValueError(f"box must cover a pixel of the {mask.shape[0]} x {mask.shape[1]} mask, got {box}")
    return _resize(mask[top:bottom, left:right].float(), SIDE, SIDE)[None] * 2 - 1


def _resize(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(mask[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


def load_mask_vae(path: str | os.PathLike[str]) -> MaskVae:
    """The VQ-VAE of a file: .npz or safetensors with the released names. Sizes are read from the file.

    Raises:
        UserError: the file cannot be read, or its tensors do not fit: all that are missing or wrong are listed.
    """
    checkpoint = open_checkpoint(Path(path))
    root = "params/" if any(name.startswith("params/") for name in checkpoint.shapes) else ""
    weights = [f"{root}encoder.{i}.weight" for i in (0, 2, 4, 6, 10)]
    if missing := [name for name in weights if name not in checkpoint.shapes]:
        raise UserError(f"{path}: holds no VQ-VAE of masks, {', '.join(missing)} is missing")
    c0, c1, c2, c3, width = (checkpoint.shapes[name].shape[0] for name in weights)
    with shapes_only():
        vae = MaskVae((c0, c1, c2, c3), width)
    wanted = vae.state_dict()
    sources = {name: Source((root + name,), lambda tensor: tensor) for name in wanted}
    vae.load_state_dict(collect(_Parameters(checkpoint, root), wanted, sources, torch.float32), assign=True)
    return vae.eval()


class _Parameters:
    """The checkpoint without the running averages of its codebook's training."""

    def __init__(self, checkpoint: Checkpoint, root: str) -> None:
        self.path, self.read = checkpoint.path, checkpoint.read
        self.shapes: Mapping[str, torch.Tensor] = {
            name: tensor for name, tensor in checkpoint.shapes.items() if not name.startswith(f"{root}_vq_vae._ema")
        }
