"""The training run: batches of (augmented picture, one of its captions) until the steps or the minutes are used up."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlkern import data
from vlkern.data.augment import augment
from vlkern.models.siglip import Siglip
from vlkern.recipes import contrastive
from vlkern.recipes.contrastive import Recipe


@dataclass(frozen=True)
class Budget:
    """The run ends after `steps` or `seconds`, whichever comes first; the learning rate follows what is used up."""

    steps: int
    seconds: float

    def progress(self, step: int, elapsed: float) -> float:
        """0 at the start, 1 at the end. While time does not bind, it depends on the step alone."""
        return max(step / self.steps, elapsed / self.seconds)


@dataclass
class History:
    """What happened: the loss of each step, before the update, and the seconds that the step took."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        """Of a step."""
        return statistics.median(self.seconds)


class Batches:
    """An endless shuffled stream of (pixels [B, 3, S, S] in [-1, 1], ids [B, L]): every picture once per pass."""

    def __init__(self, pairs: data.Pairs, tokenizer: data.ByteTokenizer, batch: int, seed: int) -> None:
        self.pixels, self.batch = pairs.pixels, min(batch, len(pairs))
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = tokenizer([c for captions in pairs.captions for c in captions])
        self.counts = torch.tensor([len(captions) for captions in pairs.captions])
        self.first = self.counts.cumsum(0) - self.counts

    def _captions(self, index: torch.Tensor) -> torch.Tensor:
        """One caption of each picture, all of them equally likely."""
        counts = self.counts[index]
        draw = (torch.rand(len(index), generator=self.generator) * counts).long()
        return self.ids[self.first[index] + draw.minimum(counts - 1)]  # the product may be rounded up to the count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches that reach over the end of a pass into the next one are not cut."""
        queue = torch.empty(0, dtype=torch.int64)
        while True:
            if len(queue) < self.batch:
                queue = torch.cat([queue, torch.randperm(len(self.pixels), generator=self.generator)])
            index, queue = queue.split([self.batch, len(queue) - self.batch])
            yield augment(data.to_unit(self.pixels[index]), self.generator), self._captions(index)


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU PyTorch's flash attention takes a third of a step for these 16 tokens; plain matmuls take a tenth."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train(
    model: Siglip,
    recipe: Recipe,
    batches: Batches,
    budget: Budget,
    *,
    autocast: bool,
    show: Callable[[History, float], None],
) -> History:
    """Train `model` in place; `show(history, progress)` is called after each step.

    The same seed gives the same run as long as the steps run out before the time does.
    """
    device = model.logit_scale.device
    optimizer = contrastive.optimizer(model, recipe)
    history, start = History(), time.perf_counter()
    begin = start
    model.train()
    for pixels, ids in batches:
        progress = budget.progress(len(history.losses), begin - start)
        if progress >= 1:
            break
        rate = contrastive.learning_rate(recipe, len(history.losses), progress)
        with _attention(device):
            loss = contrastive.step(
                model, optimizer, recipe, rate, pixels.to(device), ids.to(device), autocast=autocast
            )
        end = time.perf_counter()
        history.losses.append(loss)
        history.seconds.append(end - begin)
        begin = end
        show(history, budget.progress(len(history.losses), end - start))
    model.eval()
    return history
