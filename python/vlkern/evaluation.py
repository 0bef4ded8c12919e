"""Retrieval: how often the right partner is among the first k."""

from collections.abc import Sequence

import torch


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
