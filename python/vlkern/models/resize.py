"""What changes in an image tower when its pictures or patches change size: learned positions and the patch convolution.

D width   h, w rows and columns of patches   P patch side   Q new patch side
"""

import torch
import torch.nn.functional as F


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
