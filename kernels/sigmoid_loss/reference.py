"""The sigmoid contrastive loss in plain PyTorch: the definition. It holds the [M, N] logits; the kernels do not."""

import torch
import torch.nn.functional as F


def _terms(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    diagonal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 (float64 for float64) x [M, D], y [N, D], <x_i, y_j>, labels z and pair mask, the last three [M, N]."""
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    x, y = image.to(wide), text.to(wide)
    dots = x @ y.T
    z = -torch.ones_like(dots)
    if diagonal:
        z = z + 2 * torch.eye(*dots.shape, dtype=wide, device=dots.device)
    mask = torch.ones_like(dots)
    if image_valid is not None:
        mask = mask * image_valid[:, None]
    if text_valid is not None:
        mask = mask * text_valid[None, :]
    return x, y, dots, z, mask


def sigmoid_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    diagonal: bool,
) -> torch.Tensor:
    """weight * sum_ij softplus(-z_ij s_ij), s = scale <x_i, y_j> + bias; z = -1, +1 on the diagonal if there is one.

    image [M, D], text [N, D]; scale, bias, weight [] float32; the masks [M] and [N] bool. Returns [] float32.
    """
    _, _, dots, z, mask = _terms(image, text, scale, bias, image_valid, text_valid, diagonal)
    return weight * (mask * F.softplus(-z * (scale * dots + bias))).sum()


def sigmoid_loss_grad(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    diagonal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss [] and its gradients d_image [M, D], d_text [N, D], d_scale [], d_bias [].

    g_ij = dL/ds_ij = -z_ij sigmoid(-z_ij s_ij) (times weight and mask). d_image and d_text have the input's dtype, but
    float32 for float16, whose range they leave before the caller's loss scale is applied.
    """
    x, y, dots, z, mask = _terms(image, text, scale, bias, image_valid, text_valid, diagonal)
    u = -z * (scale * dots + bias)
    loss = weight * (mask * F.softplus(u)).sum()
    g = weight * mask * -z * torch.sigmoid(u)
    dtype = torch.float32 if image.dtype == torch.float16 else image.dtype
    d_image, d_text = scale * (g @ y), scale * (g.T @ x)
    return loss, d_image.to(dtype), d_text.to(dtype), (g * dots).sum(), g.sum()
