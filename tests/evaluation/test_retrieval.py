from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vlkern.evaluation import recall, retrieval
from vlkern.evaluation.retrieval import Direction

GOLDEN = Path(__file__).parents[1] / "golden" / "image_text_eval.npz"


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


def embeddings(n, width, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("block", [7, 2048])
def test_papers_code(block):
    file = np.load(GOLDEN)
    image, text, owner = (torch.from_numpy(file[f"in/{name}"]) for name in ("zimg", "ztxt", "text_to_image"))
    torch.testing.assert_close(image @ text.T, torch.from_numpy(file["out/similarity"]))
    found = retrieval(image, text, owner, block=block)
    assert (found.pictures, found.texts) == (23, 69)
    for k in (1, 5, 10):
        assert found.image_to_text.recall(k) == pytest.approx(file[f"out/img2txt_Recall@{k}"].item(), abs=1e-12)
        assert found.text_to_image.recall(k) == pytest.approx(file[f"out/txt2img_Recall@{k}"].item(), abs=1e-12)


@given(st.integers(1, 20), st.integers(0, 30), st.integers(1, 50), st.integers(0, 10**6))
def test_blocks_equal_the_full_matrix(pictures, more, block, seed):
    draw = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(pictures), torch.randint(pictures, (more,), generator=draw)])
    owner = owner[torch.randperm(len(owner), generator=draw)]
    image, text = embeddings(pictures, 6, seed), embeddings(len(owner), 6, seed + 1)
    found = retrieval(image, text, owner, block=block)
    similarity, mine = image @ text.T, torch.arange(pictures)[:, None] == owner
    wrong = similarity.masked_fill(mine, -torch.inf)
    best = similarity.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
    assert found.image_to_text.ranks.tolist() == (wrong >= best - 1e-6).sum(1).tolist()
    assert found.text_to_image.ranks.tolist() == (wrong >= similarity[owner, range(len(owner))] - 1e-6).sum(0).tolist()


def test_one_text_each_is_the_plain_recall():
    image, text = embeddings(50, 8), embeddings(50, 8, seed=1)
    found = retrieval(image, text, torch.arange(50), block=16)
    for k in (1, 5, 10):
        assert found.image_to_text.recall(k) == pytest.approx(recall(image @ text.T)[k])
        assert found.text_to_image.recall(k) == pytest.approx(recall(text @ image.T)[k])


def test_autocast_changes_nothing():
    """Counts above 256 would be rounded."""
    image, text = embeddings(700, 8), embeddings(700, 8, seed=1)
    plain = retrieval(image, text, torch.arange(700))
    with torch.autocast("cpu", torch.bfloat16):
        found = retrieval(image, text, torch.arange(700))
    assert torch.equal(found.text_to_image.ranks, plain.text_to_image.ranks)
    assert torch.equal(found.image_to_text.ranks, plain.image_to_text.ranks)


def test_a_model_for_which_all_is_alike_finds_nothing():
    same = embeddings(1, 33).repeat(40, 1)
    found = retrieval(same, same, torch.arange(40), block=7)
    assert found.text_to_image.recall(39) == found.image_to_text.recall(39) == 0
    assert found.text_to_image.recall(40) == 1


def test_an_identical_text_of_another_picture_counts_against():
    image = torch.eye(3)
    found = retrieval(image, image[[0, 0, 2]], torch.tensor([0, 1, 2]))
    assert found.image_to_text.ranks.tolist() == [1, 2, 0]
    assert found.text_to_image.ranks.tolist() == [0, 2, 0]


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


def test_no_tensor_is_larger_than_a_block():
    image = embeddings(3000, 4)
    with Largest() as seen:
        retrieval(image, image, torch.arange(3000), block=200)
    assert seen.numel == 200 * 200


def test_chance():
    one = Direction(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 400)
    assert one.chance(10) == pytest.approx(10 / 400)
    # Of two right ones among four, three of the six pairs hold the first, and two of the rest the second.
    two = Direction(torch.zeros(1, dtype=torch.int64), torch.tensor([2]), 4)
    assert two.chance(2) == pytest.approx(5 / 6)
    mixed = Direction(torch.zeros(2, dtype=torch.int64), torch.tensor([1, 3]), 4)
    assert mixed.chance(1) == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert mixed.chance(4) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3)}, r"image must have shape \[N, E\], N > 0, got \[3\]"),
        ({"image": torch.zeros(0, 4)}, r"image must have shape"),
        ({"text": torch.zeros(3, 5)}, r"text must have shape \[T, 4\], got \[3, 5\]"),
        ({"owner": torch.tensor([0, 1])}, r"owner must be int64 of shape \[3\]"),
        ({"owner": torch.tensor([0, 1, 1])}, "owner must name each of the 3 pictures"),
        ({"owner": torch.tensor([0, 1, 3])}, "owner must name each of the 3 pictures"),
        ({"block": 0}, "block must be at least 1, got 0"),
    ],
)
def test_bad_input(change, message):
    arguments = {"image": torch.eye(4)[:3], "text": torch.eye(4)[:3], "owner": torch.arange(3), **change}
    with pytest.raises(ValueError, match=message):
        retrieval(**arguments)


def test_k_beyond_the_candidates():
    found = retrieval(torch.eye(3), torch.eye(3), torch.arange(3))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k must be 1 to 3, the number of candidates, got {k}"):
            found.text_to_image.recall(k)
