"""open_clip's SigLIP loss on this library's kernels. open_clip itself is not needed and not imported."""

import torch
import torch.distributed as dist

from vlkern.ops import sigmoid_contrastive_loss

_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class SigLipLoss(torch.nn.Module):
    """Takes the place of `open_clip.loss.SigLipLoss`: same constructor, same call, same loss and gradients to rounding.

    Logits are float32 also for bfloat16 features, and the loss is float32. No [B, B] tensor is made, and with several
    ranks the texts travel round one ring (docs/distributed.md), whatever `dist_impl` says.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank: this process in the default process group.
        world_size: ranks over which the batch is spread. Above 1, torch.distributed must be initialised, with this rank
            and world size, when the loss is called.
        dist_impl: one of open_clip's names `bidir` (also None), `shift`, `reduce` and `gather`, which give the same
            numbers.
        chunk_size: accepted; memory is linear in B at any value.

    Raises:
        TypeError: rank, world_size or chunk_size is no integer.
        ValueError: rank is outside 0 .. world_size - 1, dist_impl is unknown, or chunk_size is negative.

    Source: open_clip 3.3 and 4.2, open_clip/loss.py.

    Example:
        >>> from vlkern.interop.open_clip import SigLipLoss
        >>> loss = SigLipLoss()(image_features, text_features, logit_scale, logit_bias)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank, self.world_size = _integer("rank", rank, 0), _integer("world_size", world_size, 1)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size, {self.world_size}, got {self.rank}")
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _DIST_IMPLS:
            raise ValueError(f"dist_impl must be one of {', '.join(_DIST_IMPLS)}, got {dist_impl!r}")
        self.chunk_size = _integer("chunk_size", chunk_size, 0)

    def _group(self) -> "dist.ProcessGroup | None":
        if self.world_size == 1:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"world_size must be 1 without an initialised torch.distributed, got {self.world_size}")
        actual = dist.get_rank(), dist.get_world_size()
        if actual != (self.rank, self.world_size):
            raise ValueError(
                f"rank and world_size must be those of torch.distributed, {actual}, got {(self.rank, self.world_size)}"
            )
        return dist.group.WORLD

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The local mean of the sigmoid loss.

        Args:
            image_features: [B, D], L2-normalised.
            text_features: [B, D], likewise; row i belongs to row i of the images.
            logit_scale: temperature factor, `exp` already applied, as open_clip's models return it.
            logit_bias: added to every logit; None is 0.
            output_dict: return `{"contrastive_loss": loss}`, as open_clip's training loop asks.

        Returns:
            loss [] float32, or the dict.

        Raises:
            TypeError, ValueError: as `vlkern.ops.sigmoid_contrastive_loss`; ValueError also when rank or world_size are
                not those of torch.distributed.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        loss = sigmoid_contrastive_loss(image_features, text_features, logit_scale, bias, group=self._group())
        return {"contrastive_loss": loss} if output_dict else loss
