"""The codec M2T as the training loop sees it: bits of noisy latents against squared error, at all rates at once."""

from collections.abc import Sequence

import torch
from torch import nn

from vlkern import data
from vlkern.models.elic import DOWNSAMPLING
from vlkern.models.m2t import M2T
from vlkern.recipes.autoencoders import AutoencoderTask, NoWords, psnr
from vlkern.recipes.contrastive import Recipe
from vlkern.recipes.pictures import Chance
from vlkern.train.ranks import Ranks

#: Learning rates of parts of the model, relative to that of the transformer. Transforms that learn fast stay restless:
#: with 0.0005 they lost what they began with at high qualities, 2 dB.
MULTIPLES = {"entropy": 1.0, "encoder": 0.3, "decoder": 0.3, "log_gain": 2.0, "log_ungain": 2.0}
#: Share of a tile's tokens that are masked in an example of MT, at least and at most.
MASKED = (0.05, 0.99)
#: The learning rate stays until this part of the run is over, and falls linearly to this part of itself.
FALLS, LAST = 0.5, 0.02


class Objective(nn.Module):
    """The mean over pictures of (bits per pixel + lambda 255^2 MSE) / sqrt(lambda).

    MSE is that of sub-pixels in [0, 1]. Each picture has a level of quality of its own, which gives lambda; without
    the last factor the highest qualities, where both terms are larger, would outweigh the others.

    Args:
        model: the codec.

    latest: [2] of the last batch: bits per pixel, and mean squared error of a sub-pixel in [-1, 1].

    Example:
        >>> objective = Objective(vlkern.models.create("m2t-tiny"))
        >>> loss = objective(torch.zeros(2, 3, 64, 64), torch.tensor([0, 3]), torch.rand(2, 16, 4, 4) - 0.5)
    """

    weights: torch.Tensor

    def __init__(self, model: M2T) -> None:
        super().__init__()
        self.model = model
        levels = range(model.config.levels)
        weights = torch.tensor([model.config.distortion_weight(level) for level in levels])
        self.register_buffer("weights", weights, persistent=False)
        self.latest = torch.zeros(2)

    def forward(
        self, pixels: torch.Tensor, level: torch.Tensor, noise: torch.Tensor, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `M2T.forward` takes -> loss []."""
        reconstruction, bits = self.model(pixels, level, noise, known)
        error = (reconstruction - pixels).square().flatten(1).mean(1)
        if known is not None:  # MT: the bits of what is masked stand for those of all tokens
            known = known.reshape(len(pixels), -1)
            bits = bits.reshape(len(pixels), -1) * (known.shape[1] / (~known).sum(1).clamp(min=1)).unsqueeze(1)
        rate = bits.reshape(len(pixels), -1).sum(1) * (3 / pixels[0].numel())
        self.latest = torch.stack([rate.mean(), error.mean()]).detach()
        weight = self.weights[level]
        return ((rate + weight * (255**2 / 4) * error) / weight.sqrt()).mean()


@torch.no_grad()
def start_from_principal_components(model: M2T, pixels: torch.Tensor) -> None:
    """Set the strided convolutions to an orthonormal transform: block by block of 2 x 2, what varies most is kept.

    Stage by stage the principal components of 2 x 2 neighbours (all their channels) become the kernels of a
    convolution, and transposed those of the synthesis. The other taps and channels keep a small part of what they
    started with. An untrained codec begins so as a block transform, rather than as noise.

    Args:
        model: with fresh parameters.
        pixels: [B, 3, H, W] in [-1, 1], a few dozen pictures.
    """
    strided = [m for m in model.encoder if isinstance(m, nn.Conv2d)]
    transposed = [m for m in model.decoder if isinstance(m, nn.ConvTranspose2d)]
    x = pixels
    for down, up in zip(strided, reversed(transposed), strict=True):
        used = x.shape[1]
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * used)
        _, vectors = torch.linalg.eigh(patches.double().T @ patches.double())  # not centred: 0 is a grey
        count = min(4 * used, down.out_channels)
        basis = vectors.flip(1).T[:count].float().reshape(count, used, 2, 2)
        for conv in (down, up):
            conv.weight.mul_(0.1)
        down.weight[:count] = 0
        down.weight[:count, :used, 2:4, 2:4] = basis
        up.weight[:, :used] = 0
        up.weight[:count, :used, 2:4, 2:4] = basis
        x = (patches @ basis.flatten(1).T).unflatten(0, (len(x), x.shape[2] // 2, -1)).permute(0, 3, 1, 2)


def known_tokens(share: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Masks of MT: in each tile the first tokens of a random order are masked.

    Args:
        share: [T] of the tokens that are masked, uniform in [0, 1), which stands for `MASKED`.
        order: [T, N] uniform in [0, 1): the smallest come first.

    Returns:
        [T, N] bool, False for what is masked: at least one token.
    """
    least, most = MASKED
    count = ((least + (most - least) * share) * order.shape[1]).round().clamp(min=1)
    return order.argsort(1).argsort(1) >= count.unsqueeze(1)


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with a rate for each of `MULTIPLES`; vectors do not decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        multiple = MULTIPLES[name.partition(".")[0]]
        decays = p.dim() > 1 and "gain" not in name
        groups.setdefault((multiple, decays), []).append(p)
    ordered = [
        # PyTorch multiplies the decay with the learning rate.
        {
            "params": params,
            "weight_decay": recipe.weight_decay / (recipe.rate * multiple) if decays else 0.0,
            "multiple": multiple,
        }
        for (multiple, decays), params in sorted(groups.items(), key=lambda group: group[0])
    ]
    return torch.optim.AdamW(ordered, lr=recipe.rate, betas=recipe.betas, fused=True)


class M2TTask(AutoencoderTask):
    """What the loop trains: see vlkern.train.task.Task. Crops, each at a random level of quality.

    Args:
        model: on the device of `ranks`.
        recipe: hyper-parameters.
        steps: of the whole run, for the learning rate.
        ranks: the processes.
        pairs: pictures that a `RandomCrop` cuts to a side that 16 divides.
        seed: of order and chance.
        workers: processes that read, for this rank.
        flip: whether half of the crops are mirrored.
    """

    family = M2T

    def __init__(
        self,
        model: M2T,
        recipe: Recipe,
        steps: int,
        ranks: Ranks,
        pairs: data.PairShards,
        *,
        seed: int,
        workers: int,
        flip: bool,
    ) -> None:
        objective = Objective(model).to(ranks.device)
        super().__init__(
            model, objective, recipe, steps, ranks, pairs, NoWords(), seed=seed, workers=workers, flip=flip
        )

    def blocks(self) -> Sequence[nn.Module]:
        """None: FSDP gathers parameters when a module is called, and a block is used in parts."""
        return []

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return optimizer(self.model, self._recipe)

    def rate(self, number: int) -> float:
        """Warm-up, constant, then linear."""
        warm = min((number + 1) / max(self._recipe.warm_up, 1), 1.0)
        falling = max(LAST, min(1.0, (1 - number / self._steps) / (1 - FALLS)))
        return self._recipe.rate * warm * falling

    def examples(
        self, pixels: torch.Tensor, ids: torch.Tensor, chance: Chance, progress: float
    ) -> tuple[torch.Tensor, ...]:
        """Crops, their levels of quality, noise in place of rounding, and MT's masks."""
        c = self.model.config
        h, w = (side // DOWNSAMPLING for side in pixels.shape[2:])
        level = (chance.uniform() * c.levels).long().clamp(max=c.levels - 1)
        noise = chance.uniform(c.channels, h, w) - 0.5
        if not c.bidirectional:
            return pixels, level, noise
        tiles = -(-h // c.tile) * -(-w // c.tile)
        share, order = chance.uniform(tiles), chance.uniform(tiles, c.tokens)
        return pixels, level, noise, known_tokens(share.flatten(), order.flatten(0, 1))

    def numbers(self) -> dict[str, float]:
        """Of the last batch, whose levels are random: bits per pixel, and PSNR in decibels."""
        rate, error = self.latest()
        return {"bpp": rate, "psnr": psnr(error)}
