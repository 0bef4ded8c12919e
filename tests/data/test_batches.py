"""Batches depend on the seed and the step alone, not on ranks, workers or where a run was taken up again."""

import itertools
import multiprocessing
import pickle
import random

import numpy as np
import pytest
import shards
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vlkern._random import draws
from vlkern.data import ByteTokenizer, DataError, PairShards, batches
from vlkern.data.batches import Steps, _Collate, _Items

TOKENIZER = ByteTokenizer(12)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """30 pictures in 3 shards; picture and both captions tell the number."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = {}
        for i in range(10 * shard, 10 * shard + 10):
            members[f"{i}.png"] = shards.picture(color=(i, 0, 0))
            members[f"{i}.json"] = b'{"captions": ["a %d", "b %d"]}' % (i, i)
        shards.write(folder / f"{shard}.tar", members)
    return PairShards(folder, 4)


def take(pairs, count, *, batch=12, **options):
    stream = batches(pairs, batch, tokenizer=TOKENIZER, **options)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def numbers(batch):
    """The pictures of a batch. The captions must be theirs."""
    pixels, ids = batch
    found = pixels[:, 0, 0, 0].tolist()
    assert [text.split()[1] for text in TOKENIZER.decode(ids)] == [str(i) for i in found]
    return found


def test_what_comes(pairs):
    for pixels, ids in take(pairs, 3):
        assert pixels.shape == (12, 3, 4, 4) and pixels.dtype == torch.uint8
        assert ids.shape == (12, 12) and ids.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_batch_of_one(pairs, world, workers):
    whole = take(pairs, 5, seed=3)
    parts = [take(pairs, 5, seed=3, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert all(len(pixels) == 12 // world for part in parts for pixels, _ in part)
    joined = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert same(joined, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_taken_up_again(pairs, workers):
    whole = take(pairs, 9)
    for start in (0, 1, 2, 5):
        assert same(take(pairs, 9 - start, start=start, workers=workers), whole[start:])


def test_a_pass(pairs):
    """30 pictures, 12 a batch: 24 different ones in each pass, in another order, others left out."""
    steps = [numbers(batch) for batch in take(pairs, 40)]
    passes = [a + b for a, b in zip(steps[::2], steps[1::2], strict=True)]
    assert all(len(set(part)) == 24 for part in passes)
    assert len({tuple(part) for part in passes}) == 20
    assert set().union(*passes) == set(range(30))
    whole = [numbers(batch) for batch in take(pairs, 2, batch=30)]
    assert sorted(whole[0]) == sorted(whole[1]) == list(range(30))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.data())
def test_plan(count, choice):
    """The same properties of the numbers alone, for any sizes."""
    world = choice.draw(st.integers(1, 5))
    batch = world * choice.draw(st.integers(1, max(1, count // world)))
    if batch > count:
        return
    start, seed = choice.draw(st.integers(0, 50)), choice.draw(st.integers(-5, 2**65))
    per_pass, plan = (
        count // batch,
        lambda s, r, w: itertools.islice(Steps(count, batch, seed, s, r, w), 2 * per_pass + 1),
    )
    whole = list(plan(start, 0, 1))
    ranks = [list(plan(start, rank, world)) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert list(plan(start + 1, 0, 1))[:-1] == whole[1:]
    first = start % per_pass
    one_pass = [i for step in whole[per_pass - first :][:per_pass] for i, _ in step]
    assert len(one_pass) == len(set(one_pass)) == per_pass * batch
    assert set(one_pass) <= set(range(count))


def test_a_stream_that_is_closed_ends_its_workers(pairs):
    before = set(multiprocessing.active_children())
    stream = batches(pairs, 12, tokenizer=TOKENIZER, workers=2)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before


def test_seeds_and_captions_differ(pairs):
    assert not same(take(pairs, 2, seed=0), take(pairs, 2, seed=1))
    letters = [text.split()[0] for _, ids in take(pairs, 200) for text in TOKENIZER.decode(ids)]
    assert abs(letters.count("a") / len(letters) - 0.5) < 0.05


def test_the_order_is_written_down():
    """A change here breaks the resuming of every run that was started before."""
    assert np.argsort(draws(10, 0, 0), kind="stable").tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]
    assert np.argsort(draws(10, 1, 2), kind="stable").tolist() == [3, 9, 8, 4, 2, 6, 7, 0, 1, 5]
    assert next(iter(Steps(10, 2, 7, 12, 0, 1))) == [(9, 18308776529382479869), (3, 10562024942873170505)]


def test_orders_are_uniform():
    """Every sample comes at every place equally often (chi-square of 8 x 8 counts, 49 degrees of freedom)."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), np.argsort(draws(8, 5, epoch))] += 1
    assert 20 < ((counts - 500) ** 2 / 500).sum() < 95


def test_global_generators_are_left_alone(pairs):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    take(pairs, 2)
    take(pairs, 2, workers=1)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


@pytest.fixture
def wounded(tmp_path):
    members = {}
    for i in range(30):
        members[f"{i}.png"] = shards.picture(color=(i, 0, 0)) if i not in (3, 4, 20) else b"\x89PNG"
        members[f"{i}.txt"] = b"a %d" % i
    return shards.write(tmp_path / "a.tar", members)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures(wounded, workers):
    """Replaced alike for every split, and told in this process."""
    pairs = PairShards(wounded, 4)
    whole = take(pairs, 3, batch=30, workers=workers)
    assert sorted(numbers(whole[0])) == sorted([i for i in range(30) if i not in (3, 4, 20)] + [5, 5, 21])
    assert [line.split(":")[1] for line in pairs.skipped] == [" sample 3", " sample 4", " sample 20"]
    parts = [take(PairShards(wounded, 4), 3, batch=30, rank=rank, world=2) for rank in range(2)]
    assert same([tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_pictures(wounded, workers):
    """One line, also when a worker found it."""
    with pytest.raises(
        DataError, match=r"^more than 2 bad samples; the last: \S*a.tar: sample \d+: no readable picture.*$"
    ):
        take(PairShards(wounded, 4, bad_limit=2), 2, batch=30, workers=workers)
    with pytest.raises(DataError, match=r"^more than 1 bad samples; the last"):
        take(PairShards(wounded, 4, bad_limit=1), 2, batch=30, workers=workers)


def test_spawned_workers(pairs):
    """What a worker needs can be pickled, as it must be where processes are not forked."""
    items, collate = pickle.loads(pickle.dumps((_Items(pairs), _Collate(TOKENIZER))))
    plan = Steps(30, 12, 0, 0, 0, 1)
    loader = DataLoader(
        items, batch_sampler=plan, collate_fn=collate, num_workers=1, multiprocessing_context="spawn", prefetch_factor=1
    )
    found = [(pixels, ids) for pixels, ids, _ in itertools.islice(loader, 2)]
    assert same(found, take(pairs, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ValueError, "global_batch must be at least 1, got 0"),
        ({"start": -1}, ValueError, "start must be at least 0, got -1"),
        ({"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ({"world": 0}, ValueError, "world must be at least 1, got 0"),
        ({"world": 2, "rank": 2}, ValueError, "rank must be 0 to 1 in a world of 2, got 2"),
        ({"world": 5}, ValueError, "global_batch must be a multiple of world, got 12 for 5 ranks"),
        ({"batch": 31}, DataError, "a batch of 31 needs at least as many pairs, got 30"),
    ],
)
def test_bad_input(pairs, options, error, message):
    """At once, not at the first batch."""
    with pytest.raises(error, match=message):
        batches(pairs, options.pop("batch", 12), tokenizer=TOKENIZER, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned(wounded, workers):
    pairs = PairShards(wounded, 4)
    found = take(pairs, 3, batch=30, workers=workers)
    assert all(pixels.is_pinned() and ids.is_pinned() for pixels, ids in found)
    assert len(pairs.skipped) == 3
