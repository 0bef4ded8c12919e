"""Where the bits of a picture went, as a picture."""

import io

import torch
from matplotlib.figure import Figure

from vlkern.codec.format import CELL


def plot(pixels: torch.Tensor, bits: torch.Tensor) -> bytes:
    """A PNG: the picture, and beside it the bits of each token.

    Args:
        pixels: [3, H, W] uint8.
        bits: [h, w], of tokens of 16 x 16 pixels.
    """
    _, height, width = pixels.shape
    beside = width <= 1.5 * height
    figure = Figure(figsize=(10, 5) if beside else (7, 9), layout="constrained")
    shown, spent = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
    step = max(1, max(height, width) // 1024)  # of a large picture every so many pixels
    shown.imshow(pixels[:, ::step, ::step].permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    shown.set_title("the picture", loc="left", fontsize=10)
    rate = bits.numpy() / CELL**2
    drawn = spent.imshow(rate, extent=(0, rate.shape[1] * CELL, rate.shape[0] * CELL, 0), cmap="viridis", vmin=0)
    spent.set_xlim(0, width)
    spent.set_ylim(height, 0)
    spent.set_title(f"bits per pixel, {rate.mean():.4f} in the mean", loc="left", fontsize=10)
    figure.colorbar(drawn, ax=spent, shrink=0.8)
    for axes in (shown, spent):
        axes.tick_params(length=0, labelsize=7)
        for edge in axes.spines.values():
            edge.set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()
