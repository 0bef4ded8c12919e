"""The vocabulary's cross-entropy: against F.cross_entropy, properties, edges, memory, bad input.

What all rooms share is in test_contract.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, agree, device, dtypes

import vlkern
from vlkern._native import TRITON_INTERPRETS
from vlkern._op import REGISTRY
from vlkern.bench import oracle
from vlkern.bench.case import Case, backend_contestant
from vlkern.bench.memory import extra_memory
from vlkern.bench.rivals import RACES
from vlkern.kernels.linear_cross_entropy.samples import SAMPLES, Sample
from vlkern.ops import linear_cross_entropy, linear_log_probs
from vlkern.testing import differentiate, record

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

OP = REGISTRY["linear_cross_entropy"]
every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
EXAMPLES, SEEDS = (6, range(2)) if TRITON_INTERPRETS else (25, range(8))
fuzz = hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


def tokens(t, v, d, dtype=torch.float32, seed=0, where="cpu"):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, d, generator=g, dtype=torch.float64)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64) * d**-0.5
    return hidden.to(where, dtype), weight.to(where, dtype), torch.randint(v, (t,), generator=g).to(where)


def eager(
    hidden, weight, target, *, bias=None, softcap=None, z_loss=0.0, logit_scale=1.0, reduction="mean", **of_pytorch
):
    """The definition once more, with PyTorch's own cross-entropy."""
    z = logit_scale * F.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    counts = target != of_pytorch.get("ignore_index", -100)
    losses = F.cross_entropy(z, target, reduction="none", **of_pytorch)
    losses = losses + z_loss * z.logsumexp(1).square() * counts
    return losses if reduction == "none" else losses.sum() / (counts.sum() if reduction == "mean" else 1)


def chosen(name):
    return vlkern.backend(f"linear_cross_entropy={name}")


def run(name, args, kwargs=None, **more):
    with chosen(name):
        return differentiate(linear_cross_entropy, args, kwargs or {}, **more)


calls = st.fixed_dictionaries(
    {
        "softcap": st.none() | st.sampled_from([0.5, 5.0, 30.0]),
        "ignore_index": st.sampled_from([-100, -1, 0, 2]),
        "label_smoothing": st.sampled_from([0.0, 0.125, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-4, 0.1]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "logit_scale": st.sampled_from([1.0, 0.0625, -2.0]),
    }
)
sizes = st.tuples(st.integers(0, 40), st.integers(1, 90), st.integers(1, 40))


def call(size, options, bias, every, dtype, seed=0, where="cpu"):
    hidden, weight, target = tokens(*size, dtype, seed, where)
    target[::every] = options["ignore_index"]
    extra = {"bias": torch.linspace(-1, 1, len(weight), device=where).to(dtype)} if bias else {}
    return (hidden, weight, target), {**options, **extra}


@fuzz
@hypothesis.given(size=sizes, options=calls, bias=st.booleans(), every=st.integers(2, 4))
def test_reference_is_pytorchs_cross_entropy(size, options, bias, every):
    args, kwargs = call(size, options, bias, every, torch.float64)
    hypothesis.assume((args[2] != options["ignore_index"]).any())
    ours, exact = run("reference", args, kwargs), differentiate(eager, args, kwargs)
    for a, b in zip(ours.outputs + ours.gradients, exact.outputs + exact.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", KERNELS)
@fuzz
@hypothesis.given(size=sizes, options=calls, bias=st.booleans(), every=st.integers(1, 4), data=st.data())
def test_kernels_agree_whatever_the_options(name, size, options, bias, every, data):
    dtype = data.draw(st.sampled_from(dtypes(name)))
    agree(OP, name, [call(size, options, bias, every, dtype, seed, device(name)) for seed in SEEDS])


@every_backend
def test_log_probabilities(name):
    hidden, weight, target = tokens(30, 50, 16, where=device(name))
    target[3] = -100
    with chosen(name):
        ours = linear_log_probs(hidden, weight, target, softcap=4.0, logit_scale=2.0)
    z = 4 * torch.tanh(2 * (hidden @ weight.T) / 4)
    exact = z.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0].masked_fill(target < 0, 0)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    with chosen(name):
        gradient = torch.autograd.functional.vjp(lambda h: linear_log_probs(h, weight, target), hidden, ours)[1]
        negative = torch.autograd.functional.vjp(
            lambda h: linear_cross_entropy(h, weight, target, reduction="none"), hidden, ours
        )[1]
    assert torch.equal(gradient, -negative) and gradient.any()


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_that_counts(name, reduction):
    """No token at all, or only ignored ones: zero, not NaN, and zero gradients."""
    for t in (0, 5):
        hidden, weight, target = tokens(t, 7, 4, where=device(name))
        bias = torch.ones(7, device=device(name))
        found = run(name, (hidden, weight, target.fill_(-100)), {"reduction": reduction, "bias": bias, "z_loss": 0.1})
        assert found.outputs[0].shape == ((t,) if reduction == "none" else ())
        for result in found.outputs + found.gradients:
            assert not result.any()


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_may_hold_anything(name, reduction):
    """They equal tokens that are not there, bit by bit on the CPU."""
    for dtype in dtypes(name) if name in KERNELS else (torch.float32,):
        hidden, weight, target = tokens(40, 30, 16, dtype, where=device(name))
        keep = torch.arange(40) % 3 != 0
        hidden[~keep], target[~keep] = math.nan, -100
        some = run(name, (hidden, weight, target), {"reduction": reduction})
        rest = run(name, (hidden[keep], weight, target[keep]), {"reduction": reduction}, cotangents=[
            c[keep] if c.dim() else c for c in some.cotangents
        ])  # fmt: skip
        assert not some.gradients[0][~keep].any()
        pairs = [(some.gradients[0][keep], rest.gradients[0]), (some.gradients[1], rest.gradients[1])]
        pairs.append((some.outputs[0][keep] if reduction == "none" else some.outputs[0], rest.outputs[0]))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=4 * torch.finfo(a.dtype).eps)


@every_backend
def test_one_class_has_no_loss(name):
    hidden, _, target = tokens(6, 1, 8, where=device(name))
    found = run(name, (hidden, torch.ones(1, 8, device=device(name)), target))
    for result in found.outputs + found.gradients:
        assert result.abs().max() < 1e-6


@every_backend
@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_logits_stay_finite(name, size, softcap):
    hidden, weight, target = tokens(20, 45, 8, where=device(name))
    for sign in (1, -1):
        found = run(name, (hidden * size * sign, weight, target), {"softcap": softcap})
        assert all(result.isfinite().all() for result in found.outputs + found.gradients)
        with chosen(name):
            assert linear_log_probs(hidden * size * sign, weight, target, softcap=softcap).isfinite().all()


@every_backend
def test_nan_is_not_swallowed(name):
    """A model that has diverged must show in the loss and in every gradient that saw the NaN."""
    hidden, weight, target = tokens(20, 45, 8, where=device(name))
    hidden[7, 3] = math.nan
    found = run(name, (hidden, weight, target), {"softcap": 5.0})
    assert found.outputs[0].isnan() and found.gradients[0][7].isnan().all() and found.gradients[1].isnan().all()
    assert found.gradients[0][:7].isfinite().all()


@every_backend
def test_float16_keeps_small_gradients(name):
    """Shares of 1 / n leave float16's range; a loss scale saves them, if nothing rounds before it."""
    where, loss_scale = device(name), 2.0**16
    hidden, weight, target = tokens(400, 60, 16, torch.float16, where=where)
    args = hidden * 3e-3, weight * 3e-3, target
    ours = run(name, args, cotangents=[torch.tensor(loss_scale)])
    exact = run("reference", (args[0].double(), args[1].double(), target), cotangents=[torch.ones(())])
    for kept, wanted in zip(ours.gradients, exact.gradients, strict=True):
        assert wanted.abs().max() < 2 * torch.finfo(torch.float16).smallest_normal
        assert (kept.double() / loss_scale - wanted).norm() <= 0.002 * wanted.norm()


@every_backend
def test_autocast_casts_the_matmuls_only(name):
    where, lower = device(name), dtypes(name if name in KERNELS else "cpu")[-1]
    hidden, weight, target = tokens(33, 40, 24, where=where)
    bias = torch.linspace(-1, 1, 40, device=where)
    with torch.autocast(where, lower):
        inside = run(name, (hidden, weight, target), {"bias": bias})
    with chosen(name):
        outside = linear_cross_entropy(hidden.to(lower), weight.to(lower), target, bias=bias)
    assert inside.outputs[0].dtype == torch.float32
    torch.testing.assert_close(inside.outputs[0], outside, rtol=1e-6, atol=0)
    assert all(g.dtype == torch.float32 for g in inside.gradients)


@every_backend
def test_a_second_backward_finds_the_gradients_unchanged(name):
    """The backward multiplies in place only where nobody can ask again."""
    hidden, weight, target = tokens(20, 30, 8, where=device(name))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with chosen(name):
        loss = 3 * linear_cross_entropy(*leaves, target)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = [g.clone() for g in first]
        second = torch.autograd.grad(loss, leaves)
        single = torch.autograd.grad(linear_cross_entropy(*leaves, target), leaves)
    for a, b, c, d in zip(first, again, second, single, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        torch.testing.assert_close(a, 3 * d, rtol=1e-6, atol=1e-9)


@every_backend
def test_a_frozen_weight_costs_nothing(name):
    hidden, weight, target = tokens(20, 30, 8, where=device(name))
    with record() as seen, chosen(name):
        linear_cross_entropy(hidden.requires_grad_(), weight, target).backward()
        linear_cross_entropy(hidden.detach(), weight.requires_grad_(), target, reduction="none").sum().backward()
    gradients = [call for call in seen if len(call.args) > 6]
    assert [call.args[-2:] for call in gradients] == [(True, False), (False, True)]
    with torch.no_grad():
        rows = [[len(result) for result in call.op(*call.args)[-3:]] for call in gradients]
    assert rows == [[20, 0, 0], [0, 30, 0]]


@pytest.mark.skipif("cpu" not in KERNELS, reason="the CPU's memory")
def test_memory_is_a_tenth_of_eagers():
    """High-water marks of fresh processes: what is held beyond inputs and gradients."""
    eager = next(rival for rival in RACES["linear_cross_entropy"].rivals if rival.name == "eager")
    both = "forward+backward"

    def extra(contestant, dtype):
        return extra_memory(Case("linear_cross_entropy", Sample("memory", 4096, 4096, 16), dtype), contestant, (both,))

    ours = backend_contestant("linear_cross_entropy", "cpu")
    of_eager = extra(eager, torch.float32)[both]
    assert of_eager > 2 * 4096 * 4096 * 4
    for dtype in (torch.float32, torch.bfloat16):
        assert extra(ours, dtype)[both] < of_eager / 10


def test_the_benchmarks_truth_in_blocks_is_the_reference(monkeypatch):
    sample = next(sample for sample in SAMPLES if sample.name == "above_a_tile")
    inputs = Case("linear_cross_entropy", sample, torch.float32).inputs().to(torch.float64)
    monkeypatch.setattr(oracle, "_LOGITS", 10 * sample.v)
    with chosen("reference"):
        want = inputs.run(linear_cross_entropy, "forward+backward")
    for a, b in zip(oracle._cross_entropy_in_blocks(inputs), want, strict=True):
        torch.testing.assert_close(a, b)


H, W, Y = torch.ones(4, 8), torch.ones(5, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "hidden must be a tensor, got ndarray", (H.numpy(), W, Y), {}),
        (TypeError, "weight must be float.*got torch.int64", (H, W.long(), Y), {}),
        (TypeError, "weight must have the dtype of hidden, torch.float32, got torch.float16", (H, W.half(), Y), {}),
        (ValueError, r"hidden must have shape \[T, D\], got \[1, 4, 8\]", (H[None], W, Y), {}),
        (ValueError, r"hidden must have shape \[T, 7\], got \[4, 8\]", (H, W[:, :7], Y), {}),
        (ValueError, r"weight must hold at least one class .*got \[0, 8\]", (H, W[:0], Y), {}),
        (ValueError, r"weight must hold .* one channel.*got \[5, 0\]", (H[:, :0], W[:, :0], Y), {}),
        (ValueError, "weight must be on the device of hidden, cpu, got meta", (H, W.to("meta"), Y), {}),
        (TypeError, "target must be int64, got torch.int32", (H, W, Y.int()), {}),
        (ValueError, r"target must have shape \[4\], got \[3\]", (H, W, Y[:3]), {}),
        (ValueError, r"target must be in \[0, 5\) or ignore_index \(-100\), got 5 at position 2",
         (H, W, torch.tensor([4, 0, 5, 6])), {}),
        (ValueError, r"target must be in \[0, 5\) or ignore_index \(-2\), got -100 at position 1",
         (H, W, torch.tensor([-2, -100, 0, 0])), {"ignore_index": -2}),
        (TypeError, "ignore_index must be an int, got float", (H, W, Y), {"ignore_index": -100.0}),
        (ValueError, r"bias must have shape \[5\], got \[4\]", (H, W, Y), {"bias": H[:, 0]}),
        (ValueError, "softcap must be a positive finite number, got 0", (H, W, Y), {"softcap": 0.0}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", (H, W, Y), {"label_smoothing": 1.5}),
        (ValueError, "z_loss must be a finite number, got nan", (H, W, Y), {"z_loss": math.nan}),
        (TypeError, "logit_scale must be a number, got str", (H, W, Y), {"logit_scale": "1"}),
        (ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'", (H, W, Y), {"reduction": "avg"}),
        (TypeError, "group must be a torch.distributed.ProcessGroup, got str", (H, W, Y), {"group": "world"}),
    ],
)  # fmt: skip
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*args, **kwargs)
