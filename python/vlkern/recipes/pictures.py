"""Models that make pictures, as the training loop sees them: pictures with a class or a caption, and chance."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlkern import data, models
from vlkern.recipes.contrastive import Recipe, learning_rate
from vlkern.recipes.reading import announced
from vlkern.recipes.saving import save
from vlkern.train.ranks import Ranks

#: The folder of a second-stage model where its autoencoder lies.
AUTOENCODER = "autoencoder"


class Chance:
    """What chance does in one step: drawn for the whole batch, so that it does not depend on the number of ranks.

    Args:
        seed: of the run.
        number: of the step.
        batch: examples over all ranks.
        ranks: whose rows the draws are.
    """

    def __init__(self, seed: int, number: int, batch: int, ranks: Ranks) -> None:
        self._generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number) % 2**64)
        self._batch, self._ranks = batch, ranks

    def _mine(self, drawn: torch.Tensor) -> torch.Tensor:
        return drawn[self._ranks.part(self._batch)].to(self._ranks.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """[b, *shape] float32 in [0, 1), b examples of this rank."""
        return self._mine(torch.rand(self._batch, *shape, generator=self._generator))

    def normal(self, *shape: int) -> torch.Tensor:
        """[b, *shape] float32 of N(0, 1)."""
        return self._mine(torch.randn(self._batch, *shape, generator=self._generator))


class Belongings:
    """What is saved with a model: classes or a tokenizer, and its autoencoder."""

    def __init__(self, words: Any = None, autoencoder: nn.Module | None = None) -> None:
        self.words, self.autoencoder = words, autoencoder

    def save(self, folder: Path) -> None:
        """Write all of it into the folder of the model."""
        if self.words is not None:
            self.words.save(folder)
        if self.autoencoder is not None:
            models.save_pretrained(self.autoencoder, folder / AUTOENCODER)


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of what is not frozen; vectors and embeddings do not decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and "embed" not in name].append(p)
    ordered = [
        # PyTorch multiplies the decay with the learning rate.
        {"params": params, "weight_decay": recipe.weight_decay / recipe.rate if decays else 0.0, "multiple": 1.0}
        for decays, params in groups.items()
        if params
    ]
    return torch.optim.AdamW(ordered, lr=recipe.rate, betas=recipe.betas, fused=True)


class PictureTask:
    """What the loop trains: see vlkern.train.task.Task. A family sets `family`, gives an objective, and `examples`.

    Args:
        model: on the device of `ranks`; has `config` and `blocks()`.
        objective: contains the model; takes what `examples` gives.
        recipe: hyper-parameters.
        steps: of the whole run, for the learning rate.
        ranks: the processes.
        pairs: pictures, with classes or captions as their texts.
        words: what turns these texts into ids: `vlkern.data.Classes` or a tokenizer.
        seed: of order and chance.
        workers: processes that read, for this rank.
        flip: whether half of the pictures are mirrored.
        autoencoder: of a model of the second stage; saved with it.
    """

    #: What is saved; the class of `model` itself changes under FSDP.
    family: Callable[[Any], Any]

    def __init__(
        self,
        model: Any,
        objective: nn.Module,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        pairs: data.PairShards,
        words: Any,
        *,
        seed: int,
        workers: int,
        flip: bool,
        autoencoder: nn.Module | None = None,
    ) -> None:
        self.model, self.objective, self.autoencoder = model, objective, autoencoder
        self._recipe, self._steps, self._ranks, self._pairs, self._words = recipe, steps, ranks, pairs, words
        self._seed, self._workers, self._flip = seed, workers, flip

    def blocks(self) -> Sequence[nn.Module]:
        """Those of the model."""
        found: Sequence[nn.Module] = self.model.blocks()
        return found

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return optimizer(self.model, self._recipe)

    def rate(self, number: int) -> float:
        """Warm-up and cosine."""
        return learning_rate(self._recipe, number, number / self._steps)

    def batches(self, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """(pixels [b, 3, H, W] uint8, ids [b, L] int64). Says which samples cannot be read, when it meets them."""
        ranks = self._ranks
        stream = data.batches(
            self._pairs, self._recipe.batch, tokenizer=self._words, seed=self._seed, start=start, rank=ranks.rank,
            world=ranks.world, workers=self._workers,
        )  # fmt: skip
        return announced(stream, self._pairs, ranks.first)

    def prepare(self, batch: tuple[torch.Tensor, ...], number: int) -> tuple[torch.Tensor, ...]:
        """What the objective takes, on the device; chance depends on seed and number alone."""
        pixels, ids = (part.to(self._ranks.device, non_blocking=True) for part in batch)
        pixels = data.to_unit(pixels)
        chance = Chance(self._seed, number, self._recipe.batch, self._ranks)
        if self._flip:
            pixels = torch.where(chance.uniform(1, 1, 1) < 0.5, pixels.flip(3), pixels)
        with torch.no_grad():
            return self.examples(pixels, ids, chance, number / self._steps)

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Pixels [b, 3, H, W] in [-1, 1] and ids [b, L] -> what the objective takes; `progress` of the run is over."""
        return pixels, ids

    def numbers(self) -> dict[str, float]:
        """Nothing but the loss."""
        return {}

    def save(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Model, classes or tokenizer, and autoencoder."""
        save(self.family, self.model.config, weights, Belongings(self._words, self.autoencoder), folder)
