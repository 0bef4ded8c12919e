"""The sampler against transformers' filters, the reference numbers, and the distribution that it must draw from."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import ROOT
from transformers.generation import logits_process as peer

from vlkern.generation import GREEDY, Completion, Sampler, best_of, sampling

GOLDEN = np.load(ROOT / "tests/golden/paligemma_sampling.npz")
CONFIG = json.loads(str(GOLDEN["config"]))


def chi_squared(counts, expected):
    """Probability of counts at least as far from what is expected."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2)


def logits_of(rows, vocabulary, seed=0):
    return 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", range(len(CONFIG["nucleus"])))
def test_nucleus_golden(number):
    case = CONFIG["nucleus"][number]
    logits, want = (torch.tensor(GOLDEN[f"{name}{number}"][:, 0]) for name in ("in/logits", "out/nucleus_logits"))
    found = Sampler(temperature=case["t"], top_p=case["p"]).filter(logits)
    kept = want > -1e6
    assert torch.equal(found > -math.inf, kept)
    # Ours are relative to the largest.
    want = want - want.amax(-1, keepdim=True)
    torch.testing.assert_close(found[kept], want[kept], rtol=0, atol=2e-6)


def test_scores_golden():
    completions = []
    for tokens, log_probs in zip(GOLDEN["in/seq_tokens"].tolist(), GOLDEN["in/seq_logp"].tolist(), strict=True):
        count = tokens.index(CONFIG["eos_token"]) + 1 if CONFIG["eos_token"] in tokens else len(tokens)
        completions.append(Completion("", tuple(tokens[:count]), tuple(log_probs[:count]), "end"))
    scores = [completion.score for completion in completions]
    np.testing.assert_allclose(scores, GOLDEN["out/seq_scores"], rtol=1e-6)
    best = best_of(completions, CONFIG["n"])
    for found, tokens in zip(best, GOLDEN["out/best_of_n_tokens"].tolist(), strict=True):
        assert list(found.tokens) == tokens[: len(found.tokens)]
    with pytest.raises(ValueError, match="n must divide the number of completions, 12, got 5"):
        best_of(completions, 5)


def warped(logits, temperature, top_k, top_p, min_p):
    """By transformers, in the order in which it applies them."""
    steps = [peer.TemperatureLogitsWarper(temperature)]
    steps += [peer.TopKLogitsWarper(top_k)] if top_k else []
    steps += [peer.TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
    steps += [peer.MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        logits = step(None, logits)
    return logits


@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.1])
def test_filters_are_those_of_transformers(top_k, top_p, min_p):
    logits = logits_of(16, 300)
    want = warped(logits, 0.7, top_k, top_p, min_p)
    found = Sampler(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p).filter(logits)
    assert torch.equal(found > -math.inf, want > -math.inf)
    torch.testing.assert_close(found.softmax(-1), want.softmax(-1), rtol=1e-5, atol=1e-7)


def test_top_p_of_a_flat_distribution(monkeypatch):
    """More tokens than it looks at first."""
    logits = 0.1 * logits_of(3, 700)
    whole = Sampler(top_p=0.8).filter(logits)
    monkeypatch.setattr(sampling, "_HEAD", 64)
    assert torch.equal(Sampler(top_p=0.8).filter(logits), whole)
    assert torch.equal(whole > -math.inf, warped(logits, 1.0, None, 0.8, None) > -math.inf)


def test_repetition_penalty_is_that_of_transformers():
    logits, ids = logits_of(4, 50), torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    want = peer.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(Sampler(repetition_penalty=1.3).penalise(logits, seen), want)


def test_equal_logits_stay_together():
    """Whatever order a sort would give them."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])

    def kept(**filters):
        return (Sampler(**filters).filter(logits)[0] > -math.inf).nonzero()[:, 0].tolist()

    assert kept(top_k=1) == [1, 3]
    assert kept(top_k=3) == [1, 2, 3, 4, 5]
    assert kept(top_p=0.0) == [1, 3]
    assert kept(top_p=0.7) == [1, 2, 3, 4, 5]
    assert kept(min_p=math.exp(-1)) == [1, 2, 3, 4, 5]
    assert kept(min_p=1.0) == [1, 3]
    assert GREEDY.draw(logits, torch.zeros(1)).tolist() == [1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.floats(-80, 80, width=32), min_size=6, max_size=6), min_size=1, max_size=3),
    temperature=st.floats(1e-3, 100),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(0, 1),
    min_p=st.none() | st.floats(0, 1),
    u=st.floats(0, 1 - 2**-52),
)
def test_what_is_drawn_was_kept(rows, temperature, top_k, top_p, min_p, u):
    sampler, logits = Sampler(temperature, top_k, top_p, min_p), torch.tensor(rows)
    kept = sampler.filter(logits)
    chosen = sampler.draw(logits, torch.full((len(rows),), u, dtype=torch.float64))
    assert (kept.gather(1, chosen[:, None]) > -math.inf).all()
    assert (kept.amax(-1) == 0).all()
    # Each row by itself gives the same.
    for row, token in zip(logits, chosen.tolist(), strict=True):
        assert sampler.draw(row[None], torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_no_number_falls_behind_the_last_token():
    last = torch.tensor([1 - 2.0**-52], dtype=torch.float64)
    for vocabulary in (1, 3, 1000):
        assert Sampler().draw(torch.zeros(1, vocabulary), last).tolist() == [vocabulary - 1]
    assert Sampler().draw(torch.tensor([[0.0, -200.0]]), last).tolist() == [0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.05}])
def test_distribution(filters):
    """40,000 draws by 100 seeds fit the probabilities, and neighbouring draws of a stream are independent."""
    sampler = Sampler(seed=list(range(100)), **filters)
    logits = logits_of(1, 12, seed=3) / 3
    u = sampler.uniforms(100, 400)
    tokens = sampler.draw(logits.expand(u.numel(), -1), u.flatten())
    p = sampler.filter(logits)[0].double().softmax(-1)
    kept = p > 0
    counts = torch.bincount(tokens, minlength=12)
    assert counts[~kept].sum() == 0
    assert chi_squared(counts[kept].double(), p[kept] * len(tokens)) > 1e-3
    pairs = tokens.view(100, -1)
    table = torch.bincount((pairs[:, :-1:2] * 12 + pairs[:, 1::2]).flatten(), minlength=144).double()
    expected = torch.outer(p, p).flatten() * table.sum()
    often = expected > 5
    assert chi_squared(table[often], expected[often]) > 1e-3


def test_seeds():
    def numbers(seed, rows, steps):
        return Sampler(seed=seed).uniforms(rows, steps)

    assert torch.equal(numbers(5, 1, 9), numbers(5, 3, 20)[2:, :9])  # a row's stream knows no batch and no length
    several = numbers([5, 6, -1], 3, 9)
    assert torch.equal(several[:1], numbers(5, 1, 9)) and len(set(several.flatten().tolist())) == 27
    fresh = [numbers(None, 2, 4) for _ in range(2)]
    assert len(set(torch.cat(fresh).flatten().tolist())) == 16
    assert all((u >= 0).all() and (u < 1).all() for u in [several, *fresh])
    with pytest.raises(ValueError, match="seed must be one number or one for each of the 2 rows, got 3"):
        numbers([1, 2, 3], 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
        ({"temperature": "warm"}, "temperature must be a number, got str"),
        ({"top_k": 0}, "top_k must be a whole number above 0, got 0"),
        ({"top_k": 2.0}, "top_k must be a whole number above 0, got 2.0"),
        ({"top_p": 1.1}, "top_p must be from 0 to 1, got 1.1"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive finite number, got 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": [1, "2"]}, "seed must be a whole number or one for each row"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Sampler(**arguments)


def test_filters_keep_the_likeliest_for_every_combination():
    """Also where 16-bit logits or a tiny temperature make everything else vanish."""
    logits = torch.tensor([[60000.0, -60000.0, 0.0]])
    for dtype, temperature in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1e-30, 1.0, 1e30)):
        found = Sampler(temperature=temperature, top_k=2, top_p=0.5, min_p=0.5).filter(logits.to(dtype))
        assert found[0, 0] == 0 and not found.isnan().any()
