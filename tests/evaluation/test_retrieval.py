import torch
from hypothesis import given
from hypothesis import strategies as st

from vlkern.evaluation import recall


def test_by_hand():
    similarity = torch.tensor([[3.0, 1, 2], [5, 4, 6], [9, 8, 7]])  # ranks 1, 3, 3
    assert recall(similarity, (1, 2, 3)) == {1: torch.tensor(1 / 3).item(), 2: torch.tensor(1 / 3).item(), 3: 1.0}


def test_ties_count_against_the_query():
    assert recall(torch.zeros(4, 4), (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_counts_by_sorting(n, seed):
    similarity = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    order = similarity.argsort(dim=1, descending=True)
    for k, value in recall(similarity, (1, 5, 10)).items():
        hits = [i in order[i, :k] for i in range(n)]
        assert abs(value - sum(hits) / n) < 1e-6
