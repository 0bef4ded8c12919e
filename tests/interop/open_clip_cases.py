"""open_clip's own loss, and what several ranks compute with it and with ours."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from vlkern.interop.open_clip import SigLipLoss
from vlkern.kernels.sigmoid_loss.samples import Sample, inputs

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def original() -> Any:
    """open_clip.loss.SigLipLoss; None when open_clip is not installed. The file is loaded alone, because the package
    imports torchvision, which must match the build of torch; the loss needs neither."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss


def both(rank: int, ranks: int) -> dict[str, list[torch.Tensor]]:
    """Loss and four gradients of this rank in float64, by our loss and by every dist_impl of open_clip's."""
    (image, text, scale, bias), _ = inputs(Sample("", 6 * ranks, 16, scale=3.7, bias=-2.25), torch.float64, "cpu")
    rows = slice(6 * rank, 6 * rank + 6)
    losses = {name: original()(rank=rank, world_size=ranks, dist_impl=name) for name in DIST_IMPLS}
    losses["ours"] = SigLipLoss(rank=rank, world_size=ranks)
    results = {}
    for name, loss in losses.items():
        leaves = [t.clone().requires_grad_() for t in (image[rows], text[rows], scale, bias)]
        value = loss(*leaves)
        results[name] = [value.detach(), *torch.autograd.grad(value, leaves)]
    return results


def wrong_rank(rank: int, ranks: int) -> str:
    """What our loss says to a rank that is not this process's."""
    pairs = torch.ones(2, 3)
    try:
        SigLipLoss(rank=ranks - 1 - rank, world_size=ranks)(pairs, pairs, 1.0, 0.0)
    except ValueError as error:
        return str(error)
    return "accepted"


def compare(rank: int, ranks: int) -> dict[str, Any]:
    return {"wrong rank": wrong_rank(rank, ranks), **both(rank, ranks)}
