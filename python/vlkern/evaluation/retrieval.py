"""Retrieval: how often a right partner is among the first k, of pictures for texts and of texts for pictures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

#: Cosines of float32 embeddings that differ by less are rounding: such pairs count as equally similar.
ROUNDING = 1e-6


def recall(similarity: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Recall@k of queries against candidates; the right candidate of query i is number i.

    Only that one counts, even where another candidate would fit as well; ties count against the query.

    Args:
        similarity: [Q, N], Q <= N.
        ks: how many candidates are looked at.

    Returns:
        k -> fraction of the queries, 0 to 1. Chance is min(k, N) / N.

    Example:
        >>> recall(text @ image.T)[10]
    """
    right = similarity.diagonal()[:, None]
    better = (similarity >= right).sum(1) - 1
    return {k: (better < k).float().mean().item() for k in ks}


def _check_k(k: int, candidates: int) -> None:
    if not 1 <= k <= candidates:
        raise ValueError(f"k must be 1 to {candidates}, the number of candidates, got {k}")


@dataclass(frozen=True, eq=False)
class Direction:
    """The queries of one direction, by what stands before their first right answer.

    ranks       [Q] wrong candidates that are at least as similar as the best right one
    right       [Q] right candidates of each query
    candidates  how many candidates there are, N
    """

    ranks: torch.Tensor
    right: torch.Tensor
    candidates: int

    def recall(self, k: int) -> float:
        """The fraction of queries with a right answer among the first k. Raises ValueError unless 1 <= k <= N."""
        _check_k(k, self.candidates)
        return (self.ranks < k).double().mean().item()

    def chance(self, k: int) -> float:
        """Recall@k of a random order: 1 - C(N - r, k) / C(N, k) for a query with r right candidates, on average."""
        _check_k(k, self.candidates)
        counts, times = (found.tolist() for found in self.right.unique(return_counts=True))
        n = self.candidates
        missed = [times * math.comb(n - r, k) / math.comb(n, k) for r, times in zip(counts, times, strict=True)]
        return 1 - math.fsum(missed) / len(self.right)


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Both directions, over all pictures and all texts of a set."""

    text_to_image: Direction
    image_to_text: Direction

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return self.text_to_image.candidates

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return self.image_to_text.candidates


def _check(image_NE: torch.Tensor, text_TE: torch.Tensor, owner_T: torch.Tensor) -> None:
    if image_NE.dim() != 2 or not len(image_NE):
        raise ValueError(f"image must have shape [N, E], N > 0, got {list(image_NE.shape)}")
    if text_TE.dim() != 2 or text_TE.shape[1] != image_NE.shape[1]:
        raise ValueError(f"text must have shape [T, {image_NE.shape[1]}], got {list(text_TE.shape)}")
    if owner_T.shape != text_TE.shape[:1] or owner_T.dtype != torch.int64:
        raise ValueError(f"owner must be int64 of shape [{len(text_TE)}], got {owner_T.dtype} {list(owner_T.shape)}")
    n = len(image_NE)
    if not torch.equal(owner_T.unique(), torch.arange(n, device=owner_T.device)):
        raise ValueError(f"owner must name each of the {n} pictures at least once, 0 to {n - 1}, and nothing else")


def _blocks(n: int, size: int) -> Iterable[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def retrieval(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, *, block: int = 2048) -> Retrieval:
    """Rank all texts for each picture and all pictures for each text. A picture may have several texts.

    Text to image: right is the picture that the text belongs to. Image to text: right is any of the picture's texts, so
    the best of them counts. Candidates that are as similar as the right one, to rounding, stand before it: a model for
    which all is alike finds nothing.

    The [N, T] similarities are looked at in blocks, both directions in one sweep; extra memory is a few block^2.

    Args:
        image: [N, E] of length 1.
        text: [T, E] of length 1, same dtype and device.
        owner: [T] int64, the number of the picture that each text belongs to; every picture has at least one text.
        block: side of a block.

    Raises:
        ValueError: a shape, `owner` or `block` is none of these.

    Example:
        >>> image = torch.eye(3)
        >>> found = retrieval(image, image[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2]))
        >>> found.text_to_image.recall(1), found.image_to_text.recall(1)
        (1.0, 1.0)
    """
    _check(image, text, owner)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    n, t = len(image), len(text)
    right_T = torch.cat([(image[owner[part]] * text[part]).sum(1) for part in _blocks(t, block)]) - ROUNDING
    best_N = right_T.new_full((n,), -torch.inf).scatter_reduce(0, owner, right_T, "amax")
    text_ranks, image_ranks = torch.zeros_like(owner), owner.new_zeros(n)
    # Ones in float32 are counted by matrix-vector products, exactly: a third of the time of summing bools.
    mark, ones = (torch.ones(shape, device=image.device) for shape in ((min(block, n), min(block, t)), max(n, t)))
    for rows in _blocks(n, block):
        for columns in _blocks(t, block):
            similarity = image[rows] @ text[columns].T
            mine = owner[columns] - rows.start
            own = torch.nonzero((mine >= 0) & (mine < rows.stop - rows.start)).squeeze(1)
            similarity[mine[own], own] = -torch.inf
            marked = mark[: len(similarity), : len(mine)]
            torch.ge(similarity, right_T[columns], out=marked)
            text_ranks[columns] += (ones[: len(marked)] @ marked).long()
            torch.ge(similarity, best_N[rows, None], out=marked)
            image_ranks[rows] += (marked @ ones[: len(mine)]).long()
    counts = torch.bincount(owner, minlength=n)
    return Retrieval(
        Direction(text_ranks.cpu(), torch.ones(t, dtype=torch.int64), n),
        Direction(image_ranks.cpu(), counts.cpu(), t),
    )
