"""What the trained model is asked: retrieval on pictures it has not seen, and free searches among them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlkern import data
from vlkern.evaluation import recall
from vlkern.models.siglip import Siglip


@dataclass(frozen=True)
class Retrieval:
    """Recall@k in both directions; query and answer of picture i are the picture and its first caption."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    pictures: int

    def chance(self, k: int) -> float:
        """Recall@k of a random order."""
        return min(k, self.pictures) / self.pictures


@torch.no_grad()
def embed_pictures(model: Siglip, pairs: data.Pairs, batch: int = 100) -> torch.Tensor:
    """[N, E], normalised, float32."""
    device = model.logit_scale.device
    return torch.cat([model.encode_image(data.to_unit(part).to(device)) for part in pairs.pixels.split(batch)])


@torch.no_grad()
def embed_texts(model: Siglip, tokenizer: data.ByteTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """[Q, E], normalised, float32."""
    return model.encode_text(tokenizer(texts).to(model.logit_scale.device))


def retrieval(model: Siglip, tokenizer: data.ByteTokenizer, pairs: data.Pairs, images: torch.Tensor) -> Retrieval:
    """Recall@1, 5 and 10 of first captions against all pictures and of pictures against all first captions."""
    texts = embed_texts(model, tokenizer, [captions[0] for captions in pairs.captions])
    similarity = texts @ images.T
    return Retrieval(recall(similarity), recall(similarity.T), len(pairs))


def search(
    model: Siglip, tokenizer: data.ByteTokenizer, images: torch.Tensor, queries: Sequence[str], count: int = 8
) -> list[list[tuple[int, float]]]:
    """For each query the best `count` pictures as (index, cosine), best first."""
    values, index = (embed_texts(model, tokenizer, queries) @ images.T).topk(min(count, len(images)))
    return [list(zip(i, v, strict=True)) for i, v in zip(index.tolist(), values.tolist(), strict=True)]
