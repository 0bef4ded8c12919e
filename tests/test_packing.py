"""vlkern.packing against brute force, naive algorithms and the packs of a public data-loading library."""

import doctest
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkern.packing import METHODS, Packing, bins, pack

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sequence_packing.json").read_text())["tables"]


def problems(examples: int, most: int) -> st.SearchStrategy[tuple[list[int], int]]:
    """(lengths, capacity) with at most `examples` lengths and capacity up to `most`."""
    return st.integers(1, most).flatmap(
        lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=examples), st.just(capacity))
    )


def naive_first_fit(lengths: list[int], capacity: int, decreasing: bool) -> tuple[list[int], list[int]]:
    """(bin, offset) by the definition, O(n^2)."""
    used: list[int] = []
    bin, offset = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i] if decreasing else i):
        b = next((b for b, u in enumerate(used) if u + lengths[i] <= capacity), len(used))
        if b == len(used):
            used.append(0)
        bin[i], offset[i] = b, used[b]
        used[b] += lengths[i]
    return bin, offset


def naive_in_order(lengths: list[int], capacity: int) -> tuple[list[int], list[int]]:
    bins: list[list[int]] = []
    bin, offset = [], []
    for length in lengths:
        if not bins or sum(bins[-1]) + length > capacity:
            bins.append([])
        bin.append(len(bins) - 1)
        offset.append(sum(bins[-1]))
        bins[-1].append(length)
    return bin, offset


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """Optimum by exhaustive search over all assignments, symmetric ones once."""

    def search(i: int, used: tuple[int, ...], best: int) -> int:
        if len(used) >= best:
            return best
        if i == len(lengths):
            return len(used)
        for b in range(len(used)):
            if used[b] + lengths[i] <= capacity:
                best = search(i + 1, (*used[:b], used[b] + lengths[i], *used[b + 1 :]), best)
        return search(i + 1, (*used, lengths[i]), best)

    return search(0, (), len(lengths) + 1)


def fewest_bins_in_order(lengths: list[int], capacity: int) -> int:
    """Optimum over all ways to cut the list into consecutive runs that fit."""
    best = [0] + [len(lengths) + 1] * len(lengths)
    for stop in range(1, len(lengths) + 1):
        starts = [start for start in range(stop) if sum(lengths[start:stop]) <= capacity]
        best[stop] = 1 + min(best[start] for start in starts)
    return best[-1]


@pytest.mark.parametrize("method", METHODS)
@given(problems(60, 40))
def test_every_example_lies_once_and_apart(method: str, problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    packing = pack(lengths, capacity, method=method)
    taken = np.zeros((packing.bins, capacity), int)
    for length, b, start in zip(lengths, packing.bin, packing.offset, strict=True):
        assert start + length <= capacity
        taken[b, start : start + length] += 1
    assert taken.max(initial=0) <= 1  # disjoint
    filled = taken.sum(1)
    assert (filled > 0).all()  # no bin is empty
    assert all((taken[b, : filled[b]] == 1).all() for b in range(packing.bins))  # padding comes last
    assert packing.fill == (sum(lengths) / taken.size if lengths else 1.0)


@pytest.mark.parametrize("method", ["first_fit", "first_fit_decreasing"])
@given(problems(60, 40))
def test_first_fit_is_the_naive_one(method: str, problem: tuple[list[int], int]) -> None:
    packing = pack(*problem, method=method)
    assert (packing.bin.tolist(), packing.offset.tolist()) == naive_first_fit(*problem, "decreasing" in method)


@given(problems(60, 40))
def test_in_order_is_the_naive_one(problem: tuple[list[int], int]) -> None:
    packing = pack(*problem, method="in_order")
    assert (packing.bin.tolist(), packing.offset.tolist()) == naive_in_order(*problem)
    assert packing.order.tolist() == list(range(len(problem[0])))


@settings(deadline=None)
@given(problems(9, 24))
def test_guarantees(problem: tuple[list[int], int]) -> None:
    best = fewest_bins(*problem)
    assert best <= pack(*problem).bins <= (11 * best + 6) / 9
    assert best <= pack(*problem, method="first_fit").bins <= 17 * best / 10
    in_order = pack(*problem, method="in_order").bins
    assert in_order == fewest_bins_in_order(*problem)
    assert in_order <= max(2 * best - 1, 0)


def test_the_bound_is_tight() -> None:
    """A hard case: three bins are enough, first fit decreasing takes the four that its guarantee allows."""
    lengths = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6]
    assert fewest_bins(lengths, 61) == 3
    assert pack(lengths, 61).bins == 4 == (11 * 3 + 6) // 9


@given(problems(40, 30))
def test_helpers_describe_the_same_layout(problem: tuple[list[int], int]) -> None:
    lengths, _ = problem
    packing = pack(*problem)
    segment_ids, positions = packing.segment_ids(), packing.positions()
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    for b in range(packing.bins):
        members, cu_seqlens = packing.members(b), packing.cu_seqlens(b)
        assert cu_seqlens.dtype == np.int32
        assert np.diff(cu_seqlens).tolist() == [lengths[i] for i in members]
        assert cu_seqlens[:-1].tolist() == packing.offset[members].tolist()
        assert (segment_ids[b, cu_seqlens[-1] :] == 0).all() and (positions[b, cu_seqlens[-1] :] == 0).all()
        for k, (start, stop) in enumerate(pairwise(cu_seqlens)):
            assert (segment_ids[b, start:stop] == k + 1).all()
            assert (positions[b, start:stop] == np.arange(stop - start)).all()


@pytest.mark.parametrize("table", GOLDEN, ids=lambda t: f"capacity{t['pack_length']}_open{t['num_bins']}")
def test_golden(table: dict) -> None:
    """The library keeps `num_bins` packs open; with one it is `in_order`. Its rows check our layout in every case."""
    ids = np.array([p["ids"] for p in table["packs"]])
    starts = [np.argwhere(ids == i + 1)[0] for i in range(len(table["lengths"]))]
    bin, offset = np.array(starts).T
    packing = Packing(np.array(table["lengths"]), table["pack_length"], bin, offset, len(ids))
    assert packing.segment_ids().tolist() == [p["segment_ids"] for p in table["packs"]]
    assert packing.positions().tolist() == [p["positions"] for p in table["packs"]]
    if table["num_bins"] == 1:
        ours = pack(table["lengths"], table["pack_length"], method="in_order")
        assert (ours.bin == bin).all() and (ours.offset == offset).all() and ours.bins == len(ids)


@pytest.mark.parametrize("table", GOLDEN, ids=lambda t: f"capacity{t['pack_length']}_open{t['num_bins']}")
def test_first_fit_decreasing_needs_no_more_bins_than_the_library(table: dict) -> None:
    assert pack(table["lengths"], table["pack_length"]).bins <= len(table["packs"])


@pytest.mark.parametrize("method", ["first_fit", "first_fit_decreasing"])
def test_navit_padding_is_below_two_percent(method: str) -> None:
    """Patch n' Pack: resolutions U(64, 256), patches of 16, sequences of 256 tokens, 4096 bins."""
    side = np.random.default_rng(0).uniform(64, 256, 20_000)
    packing = pack(np.maximum(np.round((side / 16) ** 2), 1).astype(int), 256, method=method)
    assert packing.bins >= 4096
    assert 1 - packing.fill < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_million_lengths_take_less_than_two_seconds(method: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 1_000_000)
    start = time.perf_counter()
    packing = pack(lengths, 1024, method=method)
    assert time.perf_counter() - start < 2
    used = np.bincount(packing.bin, weights=lengths, minlength=packing.bins)
    assert used.max() <= 1024 and used.min() > 0


@pytest.mark.parametrize(
    "lengths",
    [
        (3, 1, 2),
        np.array([3, 1, 2], np.uint8),
        np.array([3, 0, 1, 0, 2])[::2],
        torch.tensor([3, 1, 2], dtype=torch.int32),
    ],
    ids=["tuple", "uint8", "strided", "tensor"],
)
def test_kinds_of_lengths(lengths: object) -> None:
    packing = pack(lengths, 4)
    assert packing.bin.tolist() == [0, 0, 1] and packing.offset.tolist() == [0, 3, 0]
    assert packing.lengths.dtype == packing.bin.dtype == packing.offset.dtype == np.int64


def test_the_result_does_not_change_with_the_input() -> None:
    lengths = np.array([3, 1, 2])
    packing = pack(lengths, 4)
    lengths[:] = 9
    assert packing.lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [[], np.zeros(0, np.int64)], ids=["list", "array"])
def test_nothing_to_pack(method: str, lengths: object) -> None:
    packing = pack(lengths, 8, method=method)
    assert packing.bins == 0 and packing.bin.shape == packing.offset.shape == (0,) and packing.fill == 1
    assert packing.segment_ids().shape == packing.positions().shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1, 2]], 8), ValueError, r"lengths must have one dimension, got shape \[1, 2\]"),
        ((5, 8), ValueError, r"lengths must have one dimension, got shape \[\]"),
        (([1.0], 8), TypeError, "lengths must hold integers, got float64"),
        (([True], 8), TypeError, "lengths must hold integers, got bool"),
        (([2**70], 8), TypeError, "lengths must hold integers, got object"),
        ((["a"], 8), TypeError, "lengths must hold integers, got <U1"),
        (([1, 0], 8), ValueError, r"lengths must be between 1 and the capacity, 8, got lengths\[1\] = 0"),
        (([-3], 8), ValueError, r"got lengths\[0\] = -3"),
        (([1, 2, 9, 10], 8), ValueError, r"lengths must be between 1 and the capacity, 8, got lengths\[2\] = 9"),
        ((np.array([2**63], np.uint64), 8), ValueError, r"got lengths\[0\] = 9223372036854775808"),
        (([1], 0), ValueError, "capacity must be between 1 and 2147483647, got 0"),
        (([1], 2**31), ValueError, "capacity must be between 1 and 2147483647, got 2147483648"),
        (([1], 8.0), TypeError, "capacity must be an integer, got float"),
        (([1], True), TypeError, "capacity must be an integer, got bool"),
    ],
)
def test_bad_input(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(*arguments)


def test_unknown_method() -> None:
    with pytest.raises(
        ValueError, match="method must be one of first_fit_decreasing, first_fit, in_order, got 'best_fit'"
    ):
        pack([1], 8, method="best_fit")


def test_bin_out_of_range() -> None:
    with pytest.raises(IndexError, match="bin must be between 0 and 1, got 2"):
        pack([8, 8], 8).members(2)


def test_native_code_checks_again() -> None:
    from vlkern import _host

    for method in METHODS:
        with pytest.raises(ValueError, match="between 1 and the capacity"):
            getattr(_host, method)(np.array([1, 9]), 8)


def test_the_example_of_the_docstring_runs() -> None:
    failed, tried = doctest.testmod(bins)
    assert tried > 2 and failed == 0
