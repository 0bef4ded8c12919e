"""The ring of 1 to 4 ranks against one process that holds the global batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from ring_cases import CASES, DTYPES, TwoTowers, everything, refusal, train
from rooms import KERNELS

import vlkern
from vlkern.ops import sigmoid_contrastive_loss
from vlkern.testing import assert_as_good, assert_same_direction, differentiate, in_float64

BACKENDS = ["reference", *(name for name in KERNELS if name == "cpu")]

on = pytest.mark.parametrize


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each of so many ranks found; they are started once."""
    known: dict[int, list[dict[str, Any]]] = {}

    def by(ranks: int) -> list[dict[str, Any]]:
        if ranks not in known:
            known[ranks] = launch(everything, ranks, tmp_path_factory.mktemp("ranks"), BACKENDS)
        return known[ranks]

    return by


def one_process(args: Any, kwargs: Any, ranks: int) -> list[torch.Tensor]:
    """Loss of the global batch on the reference, and gradients of `ranks` times it."""
    with vlkern.backend("sigmoid_loss=reference"):
        result = differentiate(sigmoid_contrastive_loss, args, kwargs, [torch.tensor(float(ranks))])
    return [*result.outputs, *result.gradients]


def together(results: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The ranks' results in the form of `one_process`: the mean loss, rows in order, sums over replicated scalars."""
    loss, image, text, scale, bias = zip(*results, strict=True)
    mean = torch.stack(loss).double().mean().to(loss[0].dtype)
    sums = [torch.stack(shares).double().sum().to(shares[0].dtype) for shares in (scale, bias)]
    return [mean, torch.cat(image), torch.cat(text), *sums]


def magnitudes(args: Any, valid: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_ij |g_ij <x_i, y_j>| and sum_ij |g_ij|: the sums that d_scale and d_bias round, before their terms cancel."""
    image, text, scale, bias = args
    dots, z = image @ text.T, 2 * torch.eye(len(image), dtype=image.dtype) - 1
    g = torch.sigmoid(-z * (scale * dots + bias)) / len(image)
    if valid is not None:
        rows, columns = valid if isinstance(valid, tuple) else (valid, valid)
        g = g * torch.outer(rows, columns) * len(image) / rows.sum().clamp(min=1)
    return (g * dots.abs()).sum(), g.sum()


def assert_all_as_good(ours: list[torch.Tensor], args: Any, kwargs: Any, ranks: int) -> None:
    """Loss and four gradients of `ranks` ranks, against the reference in this dtype and in float64."""
    wide, _ = in_float64((args, kwargs))
    results = list(zip(ours, one_process(args, kwargs, ranks), one_process(wide, kwargs, ranks), strict=True))
    for loss_or_rows in results[:3]:
        assert_as_good(*loss_or_rows)
    for gradients in results[1:3]:
        assert_same_direction(*gradients)
    for (scalar, low, exact), size in zip(results[3:], magnitudes(wide, **kwargs), strict=True):
        rounding = torch.finfo(scalar.dtype).eps * ranks * size
        assert (scalar - exact).abs() <= 2 * ((low - exact).abs() + rounding)


@on("dtype", DTYPES)
@on("name", CASES)
@on("backend", BACKENDS)
@on("ranks", [1, 2, 3, 4])
def test_ring_agrees_with_one_process(found, ranks, backend, name, dtype):
    ours = together([rank[f"{backend} {name} {dtype}"] for rank in found(ranks)])
    assert_all_as_good(ours, *CASES[name].whole(ranks, DTYPES[dtype]), ranks)


@on("ranks", [1, 2, 3, 4])
def test_float64_agrees_to_the_last_digits(found, ranks):
    exact = one_process(*CASES["empty_slots"].whole(ranks, torch.float64), ranks)
    for one, other in zip(together([rank["float64"] for rank in found(ranks)]), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@on("backend", BACKENDS)
@on("ranks", [1, 2, 3, 4])
def test_same_bits_again_and_same_loss_without_gradients(found, ranks, backend):
    for rank in found(ranks):
        for name in CASES:
            for dtype in DTYPES:
                key = f"{backend} {name} {dtype}"
                assert all(torch.equal(a, b) for a, b in zip(rank[key], rank[f"{key} again"], strict=True))
                torch.testing.assert_close(rank[f"{key} loss"], rank[key][0], rtol=1e-6, atol=0)


@on("ranks", [1, 2, 3, 4])
def test_the_next_texts_are_on_their_way_before_a_block_is_computed(found, ranks):
    """And a hop carries what docs/distributed.md says: the texts and their mask, or their gradient in float32."""
    texts, gradient = 6 * 10 * 2 + 6, 6 * 10 * 4
    expected = ["block"]
    if ranks > 1:
        expected = [texts, *[texts, "block", gradient] * (ranks - 2), "block", gradient, "block"]
    assert all(rank["events"] == expected for rank in found(ranks))


@on("dtype, element, gradient", [("float32", 4, 4), ("bfloat16", 2, 2), ("float16", 2, 4)])
def test_memory_does_not_grow_with_the_number_of_ranks(found, dtype, element, gradient):
    """From four ranks on all buffers exist at once; before, fewer. Masks and scalars add less than one row."""
    b, d = 64, 256
    peaks = found(1)[0]["larger rings"][dtype]
    for ranks in (2, 3, 4):
        # gloo's threads may let go of a buffer a moment after wait() returns: of one buffer, never of one per rank.
        buffer = b * d * 4
        assert all(abs(rank["memory"][dtype] - peaks[ranks]) <= buffer for rank in found(ranks))
    assert peaks[2] < peaks[3] < peaks[4] == peaks[5] == peaks[16] == peaks[64]
    formula = b * d * (12 + 2 * element + 2 * gradient)  # docs/distributed.md
    assert formula <= peaks[64] < formula + d


@on("name", ["rows", "columns", "dtype", "valid", "gradients", "grad_output"])
@on("ranks", [2, 3, 4])
def test_ranks_that_differ_are_refused_on_every_rank(found, ranks, name):
    last = ranks - 1
    alike, same = "must be alike on every rank of group, got", "[4, 8] torch.float32 on rank 0"
    expected = {
        "rows": f"image {alike} {same}, [5, 8] torch.float32 on rank {last}",
        "columns": f"image {alike} {same}, [4, 9] torch.float32 on rank {last}",
        "dtype": f"image {alike} {same}, [4, 8] torch.bfloat16 on rank {last}",
        "valid": f"valid {alike} None on rank 0, a mask on rank {last}",
        "gradients": f"requires_grad {alike} False on rank 0, True on rank {last}",
        "grad_output": f"the gradient of the loss must be the same on every rank of group, got {[2.0] * last + [3.0]}",
    }
    for rank in found(ranks):
        assert rank["refusals"][name] == f"ValueError: {expected[name]}"


@on("ranks", [3, 4])
def test_subgroups_work_side_by_side(found, ranks):
    outcome = [rank["subgroup"] for rank in found(ranks)]
    for members in {tuple(rank["members"]) for rank in outcome}:
        ours = together([outcome[r]["result"] for r in members])
        assert_all_as_good(ours, *CASES["empty_slots"].whole(len(members), torch.float32), len(members))
    for rank in outcome:
        assert rank["outsider"] == "ValueError: group must contain this process, got a group of other ranks"


def test_runs_when_called_from_compiled_code(found):
    ours = together([rank["compiled"] for rank in found(2)])
    assert_all_as_good(ours, *CASES["odd"].whole(2, torch.float32), 2)


@on("dtype", ["float64", "float32"])
@on("ranks", [2, 3])
def test_distributed_data_parallel_is_one_process_at_the_global_batch(found, ranks, dtype):
    alone = {}
    for name in ("float64", dtype):
        model = TwoTowers(getattr(torch, name))
        before = [p.detach().clone() for p in model.parameters()]
        losses = train(model, getattr(torch, name), slice(None), None)
        alone[name] = [torch.stack(losses), *(p.detach() for p in model.parameters())]
    assert all((new - old).abs().max() > 0.01 for new, old in zip(alone[dtype][1:], before, strict=True))
    outcome = [rank["ddp"][dtype] for rank in found(ranks)]
    losses = torch.stack([torch.stack(rank["losses"]) for rank in outcome]).mean(0)
    for rank in outcome:
        for ours, low, exact in zip([losses, *rank["parameters"]], alone[dtype], alone["float64"], strict=True):
            if dtype == "float64":
                torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
            else:
                assert_as_good(ours, low, exact)


def test_group_must_be_a_usable_process_group():
    pairs = torch.ones(2, 3)

    def call(group: Any) -> None:
        sigmoid_contrastive_loss(pairs, pairs, 1.0, 0.0, group=group)

    assert refusal(call, "world") == "TypeError: group must be a torch.distributed.ProcessGroup, got str"
    assert not dist.is_initialized()
    alone = dist.ProcessGroup(dist.HashStore(), 0, 1)
    assert refusal(call, alone).startswith("ValueError: group must belong to an initialised torch.distributed")
