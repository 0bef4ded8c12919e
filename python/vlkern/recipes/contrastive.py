"""Training two towers with the sigmoid loss: AdamW, warm-up and cosine, gradient clipping."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlkern import ops
from vlkern.models.siglip import Siglip
from vlkern.train.updates import update


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters.

    batch         pairs per step, B
    rate          peak learning rate; it rises linearly for `warm_up` steps and falls as a cosine over the run
    scalar_rate   multiple of it for temperature and bias of the loss
    layer_decay   multiple of it for a block, relative to the block above; 1 treats all alike
    weight_decay  the part of a matrix that a step takes away at the peak rate, whatever that rate is, as in big_vision
    betas         of Adam
    clip          largest norm of the gradient
    """

    batch: int
    rate: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warm_up: int = 100
    scalar_rate: float = 1.0
    layer_decay: float = 1.0


class Objective(nn.Module):
    """The sigmoid loss of a two-tower model; over several ranks with `group`, as docs/distributed.md says."""

    def __init__(self, model: Any, group: Any = None) -> None:
        super().__init__()
        self.model, self._group = model, group

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        """What the model takes, of this rank -> its loss [], from float32 embeddings even in autocast.

        For Siglip pixels [b, 3, H, W] in [-1, 1] and ids [b, L]; for Naflex patches, shapes and ids.
        """
        image, text = self.model(*batch)
        with torch.autocast(image.device.type, enabled=False):
            scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
            return ops.sigmoid_contrastive_loss(image, text, scale, bias, group=self._group)


def _height(name: str, config: Any) -> int:
    """How many blocks stand between a parameter and the loss; that of a block counts itself, embeddings count all."""
    depth = config.vision.depth if name.startswith("vision_model.") else config.text.depth
    if ".encoder.layers." in name:
        return depth - int(name.split(".encoder.layers.")[1].split(".")[0])
    return depth + 1 if ".embeddings." in name else 0


def optimizer(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of what is not frozen; biases, norms, embeddings, temperature and bias of the loss do not decay.

    The model has two towers with parameters named as in Siglip.
    """
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name in ("logit_scale", "logit_bias"):
            kind, multiple = "scalars", recipe.scalar_rate
        else:
            kind = "decay" if p.dim() > 1 and "embedding" not in name else "rest"
            multiple = recipe.layer_decay ** _height(name, model.config)
        # PyTorch multiplies the decay with the learning rate.
        decay = recipe.weight_decay / (recipe.rate * multiple) if kind == "decay" else 0.0
        group = groups.setdefault((kind, multiple), {"params": [], "weight_decay": decay, "multiple": multiple})
        group["params"].append(p)
    ordered = [groups[key] for key in sorted(groups, key=lambda k: (("decay", "rest", "scalars").index(k[0]), -k[1]))]
    return torch.optim.AdamW(ordered, lr=recipe.rate, betas=recipe.betas, fused=True)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The rate of step 0, 1, ..., `progress` in [0, 1] of the run being over."""
    return recipe.rate * min((step + 1) / max(recipe.warm_up, 1), 1.0) * (1 + math.cos(math.pi * progress)) / 2


def step(
    model: Siglip,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    rate: float,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    *,
    autocast: bool,
) -> float:
    """One update on B pairs at this learning rate, on one process. Returns the loss before the update.

    With `autocast` the towers run in bfloat16. The loss takes float32 embeddings either way.
    """
    loss, _ = update(Objective(model), optimizer, rate, (pixels, ids), clip=recipe.clip, autocast=autocast)
    return loss.item()
