"""vlkern.masks against brute-force matrices."""

import torch

from vlkern import masks


def dense(mask, Nq, Nk=None):
    """[Nq, Nk] bool: what the bounds let through."""
    start, stop = mask.bounds(Nq, Nk)
    n = Nq if Nk is None else Nk
    assert start.dtype == stop.dtype == torch.int32 and start.shape == stop.shape == (Nq,)
    assert start.is_contiguous() and stop.is_contiguous()
    assert bool(((start >= 0) & (start <= stop) & (stop <= n)).all())
    j = torch.arange(n)
    return (j >= start[:, None]) & (j < stop[:, None])


def test_the_masks_of_the_design() -> None:
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    images = masks.spans(torch.tensor([1, 5]), torch.tensor([3, 8]))
    start, stop = (masks.documents(cu) & (masks.causal() | images) & masks.window(3)).bounds(9)
    assert start.tolist() == [0, 0, 0, 1, 4, 4, 4, 5, 6]
    assert stop.tolist() == [1, 3, 3, 4, 5, 8, 8, 8, 9]
