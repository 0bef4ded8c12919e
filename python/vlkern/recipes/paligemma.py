"""PaliGemma as the training loop sees it: packed prefix-LM sequences, cross-entropy of the answers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vlkern import data, ops
from vlkern.models.paligemma import PaliGemma, PaliGemmaConfig
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.siglip import SiglipTask
from vlkern.train.ranks import Ranks


class Objective(nn.Module):
    """Cross-entropy of the answers, the mean over examples of the mean over an answer's tokens.

    Example:
        >>> loss = Objective(model)(*batch)  # of `vlkern.data.prefixed_batches`, pixels in [-1, 1]
    """

    def __init__(self, model: PaliGemma) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixels: torch.Tensor,
        ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        until: torch.Tensor,
        places: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """A batch as `vlkern.data.Packed` describes it, pixels in [-1, 1] -> this rank's loss []."""
        language = self.model.language
        hidden_TD = self.model.hidden(self.model.embed(ids, pixels), cu_seqlens, until=until)
        losses = ops.linear_cross_entropy(
            hidden_TD[places], language.model.embed_tokens.weight.to(hidden_TD.dtype), targets,
            softcap=language.config.final_softcap, reduction="none",
        )  # fmt: skip
        return (losses * weights).sum()


def _height(name: str, config: PaliGemmaConfig) -> int:
    """How many blocks stand between a parameter and the loss; a block counts itself. The embedding is the head, too."""
    vision, language = config.vision.depth, config.language.depth
    if ".layers." in name:
        block = int(name.split(".layers.")[1].split(".")[0])
        return language - block if name.startswith("language_model.") else language + 1 + vision - block
    if name.startswith("language_model."):
        return 0
    return language + 1 + (vision + 1 if ".embeddings." in name else 0)


def optimizer(model: PaliGemma, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of what is not frozen; biases, norms and embeddings do not decay."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.dim() > 1 and "embed" not in name
        multiple = recipe.layer_decay ** _height(name, model.config)
        # PyTorch multiplies the decay with the learning rate.
        decay = recipe.weight_decay / (recipe.rate * multiple) if decays else 0.0
        groups.setdefault((decays, multiple), {"params": [], "weight_decay": decay, "multiple": multiple})[
            "params"
        ].append(p)
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    return torch.optim.AdamW(ordered, lr=recipe.rate, betas=recipe.betas, fused=True)


class PaliGemmaTask(SiglipTask):
    """What the loop trains: see vlkern.train.task.Task.

    Args:
        model: on the device of `ranks`; what is frozen needs no gradient.
        recipe: hyper-parameters.
        steps: of the whole run, for the learning rate.
        tasks: the examples.
        layout: how they become tokens.
        seed: of order and examples.
        workers: processes that read, for this rank.
    """

    family = PaliGemma

    def __init__(
        self,
        model: PaliGemma,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        tasks: data.Tasks,
        layout: data.Layout,
        *,
        seed: int,
        workers: int,
    ) -> None:
        super().__init__(
            model, recipe, steps, ranks, tasks.pairs, layout.vocabulary, seed=seed, workers=workers, augmented=False
        )
        self.objective = Objective(model)
        self._tasks, self._layout = tasks, layout

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the image encoder and of the language model."""
        return [*self.model.vision.encoder.layers, *self.model.language.model.layers]

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return optimizer(self.model, self._recipe)

    def stream(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Packed examples, pixels uint8."""
        ranks = self._ranks
        return data.prefixed_batches(
            self._tasks, self._recipe.batch, layout=self._layout, seed=self._seed, start=start, rank=ranks.rank,
            world=ranks.world, workers=self._workers,
        )  # fmt: skip

    def prepare(self, batch: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, ...]:
        """On the device, pixels in [-1, 1]."""
        pixels, *rest = (part.to(self._ranks.device, non_blocking=True) for part in batch)
        return data.to_unit(pixels), *rest

    def numbers(self) -> dict[str, float]:
        """Nothing: there is no temperature."""
        return {}
