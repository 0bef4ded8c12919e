"""What changes in an image tower when its pictures or patches change size: learned positions and the patch convolution.

D width   h, w rows and columns of patches   P patch side   Q new patch side   T patches of all packed pictures
"""

import torch
import torch.nn.functional as F

from vlkern.layers.patches import Places


def positions(
    weight: torch.Tensor, old: tuple[int, int], new: tuple[int, int], *, align_corners: bool = False
) -> torch.Tensor:
    """Learned positions on another grid, bilinear.

    Args:
        weight: [h w, D] floating point, row by row.
        old: (h, w).
        new: (h', w').
        align_corners: False takes half-pixel centres with a triangle that widens when the grid shrinks (antialias), as
            SigLIP 2 does for its NaFlex models; True keeps the corner points in place without antialias, as
            big_vision's loader of ViT checkpoints does.

    Returns:
        [h' w', D] in the dtype of `weight`; `weight` itself when the grid stays.

    Raises:
        ValueError: `weight` has not h w rows.
    """
    if weight.dim() != 2 or weight.shape[0] != old[0] * old[1]:
        raise ValueError(f"weight must have shape [{old[0] * old[1]}, D], got {list(weight.shape)}")
    if old == new:
        return weight
    grid_hwD = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(0, old)
    rows, columns = (_matrix(*sizes, align_corners).to(grid_hwD) for sizes in zip(old, new, strict=True))
    return torch.einsum("ah,bw,hwd->abd", rows, columns, grid_hwD).flatten(0, 1).to(weight.dtype)


def positions_of(weight: torch.Tensor, side: int, at: Places) -> torch.Tensor:
    """Learned positions for packed pictures of any shapes: `positions` on each picture's grid, all pictures at once.

    Bilinear resizing is linear in the table, one axis after the other, so the vector of a patch is

        sum_ab u_a v_b table[a, b]      u, v: triangles around the patch's centre, `side` numbers each that sum to 1

    which for all patches is one product [T, side^2] x [side^2, D]: for 16 x 16 positions 0.3 % of the work of a
    twelve-layer encoder, whatever the shapes. Differentiable in the table.

    Args:
        weight: [side^2, D] floating point, row by row.
        side: of the learned grid.
        at: from `vlkern.layers.patches.places`.

    Returns:
        [T, D] in the dtype of `weight`; weights and sums in float32 or better.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    u, v = (_triangle(side, *axis, dtype) for axis in ((at.row, at.h), (at.column, at.w)))
    mix = (u[:, :, None] * v[:, None, :]).flatten(1)
    device = "cpu" if weight.is_meta else weight.device.type  # there is no autocast on the meta device
    with torch.autocast(device, enabled=False):
        return (mix @ weight.to(dtype)).to(weight.dtype)


def _triangle(side: int, place: torch.Tensor, count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, side]: how much each learned position counts for place [T] of `count` [T], along one axis."""
    ratio = side / count.to(dtype)
    centre = (place + 0.5) * ratio
    distance = (torch.arange(side, dtype=dtype, device=place.device) + 0.5 - centre[:, None]).abs()
    weights = (1 - distance / ratio.clamp(min=1)[:, None]).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def patches(weight: torch.Tensor, side: int) -> torch.Tensor:
    """Weights for patches of Q x Q that give on a resized patch what `weight` gives on the patch.

    Resizing a patch is linear, R x R^T with R [Q, P]. The new weights are those with the least squared error of
    <R x R^T, v> = <x, w> over all patches x, and v = R^{T+} w R^+: no error at all when patches grow.

    Args:
        weight: [D, C, P, P] floating point, a convolution with stride P.
        side: Q >= 1.

    Returns:
        [D, C, Q, Q] in the dtype of `weight`; `weight` itself when Q = P.

    Source: Beyer et al., FlexiViT, 2023, section 3.4.
    """
    old = weight.shape[-1]
    if side == old:
        return weight
    inverse_QP = torch.linalg.pinv(_matrix(old, side, align_corners=False).T).to(weight.device)
    return (inverse_QP @ weight.double() @ inverse_QP.T).to(weight.dtype)


def _matrix(old: int, new: int, align_corners: bool) -> torch.Tensor:
    """[new, old] float64: linear resizing along one axis. Bilinear resizing does one axis after the other."""
    # The columns of the identity, side by side. (As channels of width 1, torch 2.13 takes them for channels-last.)
    columns = torch.eye(old, dtype=torch.float64)[None, None]
    size = (new, old)
    return F.interpolate(columns, size, mode="bilinear", align_corners=align_corners, antialias=not align_corners)[0, 0]
