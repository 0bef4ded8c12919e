"""A step of parallel decoding: what is drawn, what stays, what is masked again. The rest is in test_contract.py."""

import pytest
import torch
from rooms import KERNELS, device, dtypes

import vlkern
from vlkern.kernels.masked_decode_step.samples import MASK, SAMPLES, inputs
from vlkern.ops import masked_decode_step

every_backend = pytest.mark.parametrize("name", ("reference", *(k for k in KERNELS if k != "cuda")))


def step(name, logits, ids, count, noise, **options):
    arguments = (t.to(device(name)) for t in (logits, ids, count, noise))
    with vlkern.backend(f"masked_decode_step={name}"):
        return [t.cpu() for t in masked_decode_step(*arguments, **{"mask": MASK, **options})]


@every_backend
def test_the_same_numbers_give_the_same_tokens_on_every_backend(name):
    for sample in SAMPLES[1:7]:
        for dtype in dtypes("triton" if name == "triton" else "cpu"):
            args, kwargs = inputs(sample, dtype, "cpu")
            with vlkern.backend("masked_decode_step=reference"):
                want = masked_decode_step(*args, **kwargs)
            kwargs = {k: v.to(device(name)) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            got = step(name, *args, **kwargs)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@every_backend
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_exactly_as_many_as_asked_for_are_masked_and_they_are_the_least_confident(name, temperature):
    g = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(4, 37, 11, generator=g), torch.rand(4, 37, 2, generator=g)
    ids = torch.randint(0, 11, (4, 37), generator=g).masked_fill(torch.rand(4, 37, generator=g) < 0.7, MASK)
    unknown, count = ids == MASK, torch.tensor([0, 1, 20, 99])
    following, filled, log_p = step(name, logits, ids, count, noise, temperature=temperature)
    again = following == MASK
    assert again.sum(1).tolist() == torch.minimum(count, unknown.sum(1)).tolist()
    assert not (again & ~unknown).any() and torch.equal(following[~again], filled[~again])
    assert torch.equal(filled[~unknown], ids[~unknown]) and not log_p[~unknown].any()
    own = logits.log_softmax(-1).gather(-1, filled[..., None])[..., 0]
    torch.testing.assert_close(log_p[unknown], own[unknown])
    confidence = own - temperature * (-noise[..., 1].log()).log()
    for row in (1, 2):
        kept = confidence[row][unknown[row] & ~again[row]]
        assert confidence[row][again[row]].max() <= kept.min() + 1e-5


@every_backend
def test_of_equal_confidences_the_first_are_masked(name):
    ids = torch.tensor([[MASK, 1, MASK, MASK, 0, MASK]])
    logits = torch.zeros(1, 6, 3)
    following, filled, _ = step(name, logits, ids, torch.tensor([2]), torch.zeros(1, 6, 2))
    assert following.tolist() == [[MASK, 1, MASK, 0, 0, 0]] and filled.tolist() == [[0, 1, 0, 0, 0, 0]]


@every_backend
def test_tokens_follow_their_distribution(name):
    """Their frequencies, for numbers u that are spread evenly, are the probabilities to within one draw a class."""
    n, v = 120, 70
    logits = 1.5 * torch.randn(v, generator=torch.Generator().manual_seed(1))
    noise = torch.stack([(torch.arange(n) + 0.5) / n, torch.full((n,), 0.5)], -1)[None]
    ids, none = torch.full((1, n), MASK), torch.tensor([0])
    for guidance in (0.0, 2.0):
        guided = {"unconditional": torch.zeros(1, n, v, device=device(name)), "guidance": guidance} if guidance else {}
        _, filled, _ = step(name, logits.expand(1, n, v), ids, none, noise, **guided)
        shares = torch.bincount(filled[0], minlength=v)
        assert (shares - n * (logits * (1 + guidance)).softmax(0)).abs().max() <= 1.01
        assert torch.equal(filled[0], filled[0].sort().values)


@every_backend
def test_the_ends_of_the_numbers(name):
    """u = 0 draws the first class that has a probability, the largest u the last; g at its ends gives no infinity."""
    logits = torch.tensor([-torch.inf, 1.0, 2.0, -200.0, -torch.inf]).expand(1, 4, 5)
    most = 1 - 2.0**-24
    noise = torch.tensor([[[0.0, 0.0], [most, most], [0.5, 0.0], [0.5, most]]])
    ids = torch.full((1, 4), MASK)
    following, filled, log_p = step(name, logits, ids, torch.tensor([2]), noise, temperature=1.0)
    assert filled.tolist() == [[1, 2, 2, 2]]
    assert (following == MASK).tolist() == [[True, False, True, False]]
    assert log_p.isfinite().all()


@every_backend
def test_nan_is_not_swallowed(name):
    logits = torch.zeros(1, 3, 70)
    logits[0, 1, 5] = torch.nan
    following, filled, log_p = step(name, logits, torch.full((1, 3), MASK), torch.tensor([1]), torch.rand(1, 3, 2))
    assert log_p.isnan().tolist() == [[False, True, False]]
    assert (following == MASK).tolist() == [[False, True, False]] and 0 <= filled[0, 1] < 70


def test_bad_input():
    logits, ids, count, noise = torch.zeros(2, 3, 5), torch.full((2, 3), 9), torch.tensor([1, 1]), torch.zeros(2, 3, 2)
    bad = [
        (TypeError, "logits must be a tensor, got int", {"logits": 1}),
        (ValueError, r"logits must have shape \[B, N, V\] with at least one class, got \[2, 3, 0\]",
         {"logits": logits[..., :0]}),
        (TypeError, "noise must be torch.float32 for logits in torch.float16, got torch.float16",
         {"logits": logits.half(), "noise": noise.half()}),
        (TypeError, "ids must be int64, got torch.int32", {"ids": ids.int()}),
        (ValueError, r"ids must have shape \[2, 3\], got \[2, 2\]", {"ids": ids[:, 1:]}),
        (ValueError, r"count must have shape \[2\], got \[1\]", {"count": count[:1]}),
        (ValueError, "count must be at least 0, got -1", {"count": -count}),
        (ValueError, r"noise must have shape \[2, 3, 2\]", {"noise": noise[..., 0]}),
        (ValueError, r"noise must lie in \[0, 1\), got 1 to 1", {"noise": noise + 1}),
        (TypeError, "unconditional must have the dtype of logits", {"unconditional": logits.half()}),
        (ValueError, "guidance must be 0 without unconditional logits, got 2", {"guidance": 2}),
        (ValueError, "temperature must be at least 0, got -1", {"temperature": -1.0}),
        (ValueError, "mask must be no class, below 0 or at least 5, got 4", {"mask": 4}),
        (TypeError, "mask must be a whole number, got float", {"mask": 9.0}),
    ]  # fmt: skip
    for error, message, changed in bad:
        arguments = {"logits": logits, "ids": ids, "count": count, "noise": noise, "mask": 9, **changed}
        with pytest.raises(error, match=message):
            masked_decode_step(**arguments)
