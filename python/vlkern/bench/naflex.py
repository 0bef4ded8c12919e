"""`python -m vlkern.bench.naflex`: the image encoder of SigLIP 2 NaFlex on ragged pictures, beside transformers.

transformers takes them as a batch padded to the longest picture, with masks; here they are packed. As a second rival
its model runs on one picture after the other, unpadded. All have the same weights and give the same outputs, which is
checked against float64 first. The results are written and shown like those of an op.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from vlkern.bench import peers
from vlkern.bench.models import Call, Event, add_arguments, blocks_flops, call_of, run
from vlkern.layers.patches import to_padded
from vlkern.models.naflex import PRESETS, NaflexVisionConfig, NaflexVisionTower

NAME = "naflex"
#: Rows and columns of patches of the pictures: up to 256, from square to 1 : 5.
SHAPES = ((16, 16), (8, 16), (20, 12), (6, 30), (10, 10), (12, 8), (16, 14), (5, 20))


def flops(c: NaflexVisionConfig, shapes: Sequence[tuple[int, int]]) -> float:
    """Of the image tower, without padding: patches, blocks, and pooling with its MLP."""
    weights = 2 * 3 * c.patch**2 * c.width + 4 * c.width**2
    pooling = 4 * c.width**2 + 4 * c.width * c.mlp
    return float(sum(weights * h * w + blocks_flops(c, h * w) + pooling for h, w in shapes))


class _OneByOne(nn.Module):
    """transformers' tower on each picture of a padded batch by itself, without its padding."""

    def __init__(self, model: nn.Module, lengths: Sequence[int]) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, values: torch.Tensor, mask: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        alone = ((values[i, None, :n], mask[i, None, :n], sides[i, None]) for i, n in enumerate(self.lengths))
        return torch.cat([self.model(*picture).pooler_output for picture in alone])


def event(preset: str, shapes: Sequence[tuple[int, int]]) -> Event:
    """Image encoding up to the pooled vector."""
    config = PRESETS[preset]
    v = config.vision
    ours = NaflexVisionTower(v)
    theirs: nn.Module = peers.load("transformers").Siglip2VisionModel(peers.transformers_config(config).vision_config)
    theirs.load_state_dict(ours.state_dict())
    sides = torch.tensor(shapes, dtype=torch.int32)
    lengths = sides.prod(1)
    patches = torch.randn(int(lengths.sum()), 3 * v.patch**2, generator=torch.Generator().manual_seed(0))
    padded = to_padded(patches, sides, int(lengths.max()))
    slow = _OneByOne(theirs, lengths.tolist())

    def enter(dtype: torch.dtype) -> dict[str, Callable[[], Call]]:
        return {
            "vlkern": lambda: call_of(ours, dtype, (patches, sides), lambda y: y),
            "transformers": lambda: call_of(theirs, dtype, padded, lambda y: y.pooler_output),
            "transformers, one by one": lambda: call_of(slow, dtype, padded, lambda y: y),
        }

    truth = call_of(ours, torch.float64, (patches, sides), lambda y: y)
    return Event(f"{preset} image", list(patches.shape), "forward", flops(v, shapes), enter, truth)


def main(argv: list[str] | None = None) -> int:
    """Runs the race, prints it and writes <out>/<hardware>/naflex.json with its plots."""
    parser = argparse.ArgumentParser(prog="python -m vlkern.bench.naflex", description=__doc__)
    parser.add_argument("--preset", default="siglip2-base-patch16-naflex", choices=sorted(PRESETS))
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run(NAME, parser, args, ("transformers",), [partial(event, args.preset, SHAPES)])


if __name__ == "__main__":
    sys.exit(main())
