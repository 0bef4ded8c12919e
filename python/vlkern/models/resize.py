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
    grid_1Dhw = weight.to(torch.promote_types(weight.dtype, torch.float32)).T.unflatten(1, old)[None]
    moved = F.interpolate(
        grid_1Dhw, size=new, mode="bilinear", align_corners=align_corners, antialias=not align_corners
    )
    return moved[0].flatten(1).T.to(weight.dtype).contiguous()


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
    # Bilinear with antialias, one axis: every column of the identity is a row of pixels, resized by itself.
    columns = torch.eye(old, dtype=torch.float64).reshape(1, old, old, 1)
    resize_QP = F.interpolate(columns, size=(side, 1), mode="bilinear", antialias=True)[0, :, :, 0].T
    inverse_QP = torch.linalg.pinv(resize_QP.T).to(weight.device)
    return (inverse_QP @ weight.double() @ inverse_QP.T).to(weight.dtype)
