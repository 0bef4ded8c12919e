"""The same pictures in padded and in packed batches, through the same tower: tokens wasted and pictures per second.

A padded batch has as many slots for each picture as its largest one needs. Slots without a patch are masked as keys,
yet computed like all others: every layer's matmuls run over them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlkern import data
from vlkern.bench.timing import Clock, race, spread
from vlkern.layers.patches import Places, pack_pictures, to_padded
from vlkern.models.naflex import PRESETS, NaflexVisionTower

MODEL = "naflex-tiny"
#: Of a picture's longer side, in pixels: those that come along are no larger.
LONGEST = 64
#: How many pictures are encoded, and how many at once.
PICTURES, BATCH = 256, 64
ROUNDS = 5
#: Of a token, relative to its length, between the two forms; bfloat16 rounds 8 times for each layer.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Packing:
    """Pictures, their tokens, the slots of the padded batches, and "packed", "padded" -> median seconds for all."""

    pictures: int
    tokens: int
    slots: int
    seconds: dict[str, float]

    @property
    def wasted(self) -> float:
        """Share of the slots that hold no patch."""
        return 1 - self.tokens / self.slots

    def rate(self, form: str) -> float:
        """Pictures per second."""
        return self.pictures / self.seconds[form]

    @property
    def speedup(self) -> float:
        """Time of padded over time of packed."""
        return self.seconds["padded"] / self.seconds["packed"]


def _size(patch: int) -> Callable[[int, int], tuple[int, int]]:
    """For `decode_image`: a picture's own size, if it is not above LONGEST, in whole patches."""

    def size(height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, LONGEST / max(height, width))
        h, w = (max(1, round(side * scale / patch)) * patch for side in (height, width))
        return h, w

    return size


class _Batch:
    """Some pictures in both forms, ready for the tower."""

    def __init__(self, pictures: Sequence[torch.Tensor], patch: int, device: str) -> None:
        patches, shapes = pack_pictures(pictures, patch)
        self.patches, self.shapes = data.to_unit(patches).to(device), shapes.to(device)
        slots = int(shapes.prod(1).max())
        padded, mask, _ = to_padded(self.patches, self.shapes, slots)
        self.padded, self.mask = padded.flatten(0, 1), mask.flatten().bool()
        self.at = _padded_places(self.shapes, slots)

    def run_packed(self, tower: NaflexVisionTower) -> torch.Tensor:
        """[T, D], the tokens of all patches."""
        return tower.tokens(self.patches, self.shapes)

    def run_padded(self, tower: NaflexVisionTower) -> torch.Tensor:
        """[S N, D], N slots for each picture."""
        x_TD = tower.embeddings(self.padded, self.at)
        return tower.post_layernorm(tower.encoder(x_TD, self.at.start, self.at.stop))


def _padded_places(shapes: torch.Tensor, slots: int) -> Places:
    """Where each slot is: a picture's patches come first, and all of its slots attend to these alone.

    Empty slots take the position of the picture's first patch, as in transformers.
    """
    lengths = shapes.prod(1, dtype=torch.int32)
    ends = slots * torch.arange(len(shapes) + 1, dtype=torch.int32, device=shapes.device)
    picture = torch.arange(len(shapes), device=shapes.device).repeat_interleave(slots)
    start = ends[picture]
    within = torch.arange(len(picture), dtype=torch.int32, device=shapes.device) - start
    within = within.where(within < lengths[picture], 0)
    h, w = shapes[picture].unbind(1)
    return Places(ends, start, start + lengths[picture], within // w, within % w, h, w)


@torch.no_grad()
def measure(files: Sequence[bytes], dtype: torch.dtype, device: str) -> Packing:
    """Encode the first PICTURES in both forms, in turn, and compare the tokens before that.

    Raises:
        RuntimeError: the tokens differ.
    """
    tower = NaflexVisionTower(PRESETS[MODEL].vision).to(device).eval()
    patch = tower.config.patch
    pictures = [data.decode_image(file, _size(patch)) for file in files[:PICTURES]]
    batches = [_Batch(pictures[i : i + BATCH], patch, device) for i in range(0, len(pictures), BATCH)]

    def every(run: Callable[[_Batch, NaflexVisionTower], torch.Tensor]) -> list[torch.Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return [run(batch, tower) for batch in batches]

    for batch, packed, padded in zip(batches, every(_Batch.run_packed), every(_Batch.run_padded), strict=True):
        error = (padded[batch.mask] - packed).norm(dim=1) / packed.norm(dim=1)
        if not bool((error < TOLERANCE[dtype]).all()):
            raise RuntimeError(f"packed and padded tokens must agree, but they differ by {float(error.max()):.1e}")
    calls = {"packed": lambda: every(_Batch.run_packed), "padded": lambda: every(_Batch.run_padded)}
    times = race(calls, Clock(device, cold=False), rounds=ROUNDS, fixed=True)
    return Packing(
        len(pictures),
        sum(len(batch.patches) for batch in batches),
        sum(len(batch.padded) for batch in batches),
        {form: spread(ms)["median"] / 1e3 for form, ms in times.items()},
    )
