"""Training two towers with the sigmoid loss: AdamW, warm-up and cosine, gradient clipping."""

import math
from dataclasses import dataclass

import torch

from vlkern import ops
from vlkern.models.siglip import Siglip


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters.

    batch         pairs per step, B
    rate          peak learning rate; it rises linearly for `warm_up` (a fraction of the run), then falls as a cosine
    weight_decay  decoupled, on matrices only
    betas         of Adam
    clip          largest norm of the gradient
    """

    batch: int
    rate: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warm_up: float = 0.05


def optimizer(model: Siglip, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, norms, embeddings, temperature and bias of the loss do not decay."""
    decay = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name]
    chosen = set(map(id, decay))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.betas, fused=True)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the run."""
    return recipe.rate * min(progress / recipe.warm_up, 1.0) * (1 + math.cos(math.pi * progress)) / 2


def step(
    model: Siglip,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    progress: float,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    *,
    autocast: bool,
) -> float:
    """One update on B pairs; with `autocast` the towers run in bfloat16. Returns the loss before the update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, progress)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=autocast):
        image, text = model(pixels, ids)
    loss = ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.item()
