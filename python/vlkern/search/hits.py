"""The pictures that fit a text best."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vlkern.evaluation.encoder import Encoder


class Hit(NamedTuple):
    """One picture for one text: its number, their cosine, and how likely the model takes them for a pair."""

    picture: int
    cosine: float
    probability: float


def best(encoder: Encoder, images: torch.Tensor, queries: Sequence[str], count: int = 8) -> list[list[Hit]]:
    """For each text the pictures that are most similar to it, best first.

    Args:
        encoder: embeds the texts.
        images: [N, E], as from `Encoder.pictures`.
        queries: texts.
        count: how many hits each, at most N.

    Raises:
        ValueError: `count` is not 1 to N.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"count must be 1 to {len(images)}, the number of pictures, got {count}")
    found = []
    for text in encoder.texts(queries):
        cosine, picture = (images @ text).topk(count)
        columns = picture.tolist(), cosine.tolist(), encoder.probability(cosine).tolist()
        found.append([Hit(*row) for row in zip(*columns, strict=True)])
    return found
