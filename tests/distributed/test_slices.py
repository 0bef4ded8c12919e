"""A vocabulary in two ranks' slices against one process that holds all of it."""

from typing import Any

import pytest
import torch
from ranks import launch
from rooms import KERNELS
from slice_cases import CASES, CLASSES, everything, whole

import vlkern
from vlkern.kernels.linear_cross_entropy.samples import magnitudes
from vlkern.ops import linear_cross_entropy, linear_log_probs
from vlkern.testing import Run, assert_as_good, differentiate, in_float64

BACKENDS = ["reference", *(name for name in KERNELS if name == "cpu")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; they are started once."""
    return launch(everything, 2, tmp_path_factory.mktemp("ranks"), BACKENDS)


def one_process(args: Any, kwargs: Any) -> Run:
    with vlkern.backend("linear_cross_entropy=reference"):
        return differentiate(linear_cross_entropy, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_slices_are_the_whole_vocabulary(found, name):
    args, kwargs = whole(name)
    low, exact = one_process(args, kwargs), one_process(*in_float64((args, kwargs)))
    sizes = [None, *magnitudes(*low.cotangents, *args, **kwargs)]
    for backend in BACKENDS if CASES[name][2] != torch.float64 else ["reference"]:
        ours, other = (rank[f"{name} {backend}"] for rank in found)
        assert torch.equal(ours[0], other[0]) and torch.equal(ours[1], other[1])  # the loss, d_hidden
        together = [*ours[:2], *(torch.cat(pair) for pair in zip(ours[2:], other[2:], strict=True))]
        assert len(ours[2]) == CLASSES
        results = zip(together, low.outputs + low.gradients, exact.outputs + exact.gradients, sizes, strict=True)
        for one, two, three, size in results:
            if one.dtype == torch.float64:
                torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-12)
            else:
                assert_as_good(one, two, three, magnitude=size)


def test_log_probabilities(found):
    args, _ = whole("plain")
    for rank in found:
        torch.testing.assert_close(rank["log probs"], linear_log_probs(*args), rtol=1e-6, atol=1e-6)


def test_both_ranks_refuse_what_only_one_of_them_got_wrong(found):
    alike = "hidden must be alike on every rank of group, got [41, 24] torch.float32 on rank 0, "
    for rank in found:
        assert rank["refusals"] == {
            "hidden": alike + "[41, 23] torch.float32 on rank 1",
            "gradients": alike + "[41, 24] torch.float32, with grad on rank 1",
            "67": "target must be in [0, 67) or ignore_index (-1), got 67 at position 5",
            "-3": "target must be >= 0 or ignore_index (-100), got -3 at position 5",
        }
