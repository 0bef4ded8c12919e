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
    rate          peak learning rate; it rises linearly for `warm_up` steps and falls as a cosine over the run
    scalar_rate   multiple of it for temperature and bias of the loss
    weight_decay  decoupled, on matrices only
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


def optimizer(model: Siglip, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, norms, embeddings, temperature and bias of the loss do not decay."""
    scalars = [model.logit_scale, model.logit_bias]
    decay = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name]
    chosen = set(map(id, scalars + decay))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": decay, "weight_decay": recipe.weight_decay, "multiple": 1.0},
        {"params": rest, "weight_decay": 0.0, "multiple": 1.0},
        {"params": scalars, "weight_decay": 0.0, "multiple": recipe.scalar_rate},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.betas, fused=True)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The rate of step 0, 1, ..., `progress` in [0, 1] of the run being over."""
    return recipe.rate * min((step + 1) / recipe.warm_up, 1.0) * (1 + math.cos(math.pi * progress)) / 2


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
    """One update on B pairs at this learning rate. Returns the loss before the update.

    With `autocast` the towers run in bfloat16. The loss takes float32 embeddings either way.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiple"]
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=autocast):
        image, text = model(pixels, ids)
    loss = ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.item()
