"""The likelihood of mixtures from hidden states: against two steps, weights of tokens, memory, bad input.

What all rooms share is in test_contract.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from rooms import KERNELS, agree, device, dtypes

import vlkern
from vlkern import _mixture
from vlkern._native import TRITON_INTERPRETS
from vlkern._op import REGISTRY
from vlkern.bench import oracle
from vlkern.bench.case import Case, backend_contestant
from vlkern.bench.memory import extra_memory
from vlkern.kernels.linear_gmm_nll import samples
from vlkern.ops import gmm_nll, linear_gmm_nll
from vlkern.testing import differentiate, record

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

OP = REGISTRY["linear_gmm_nll"]
every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
EXAMPLES, SEEDS = (2, range(1)) if TRITON_INTERPRETS else (20, range(6))
fuzz = hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


def run(name, args, kwargs=None, **more):
    with vlkern.backend(f"linear_gmm_nll={name}"):
        return differentiate(linear_gmm_nll, args, kwargs or {}, **more)


def head(n, width, k, d, layout="joint", dtype=torch.float32, seed=0, where="cpu", bias=True):
    return samples.inputs(samples.Sample("", n, width, k, d, layout, bias), dtype, where, seed)[0]


def two_steps(hidden, weight, bias, target, **kwargs):
    return gmm_nll(F.linear(hidden, weight, bias), target, **kwargs)


def assert_same(ours, exact, tolerance):
    for a, b in zip(ours.outputs + ours.gradients, exact.outputs + exact.gradients, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("layout", _mixture.LAYOUTS)
def test_reference_is_a_linear_layer_and_a_mixture(layout):
    args = head(9, 6, 4, 3, layout, torch.float64)
    with vlkern.backend("gmm_nll=reference"):
        exact = differentiate(two_steps, args, {"layout": layout})
    assert_same(run("reference", args, {"layout": layout}), exact, 1e-12)


@pytest.mark.parametrize("name", KERNELS)
@fuzz
@hypothesis.given(data=st.data())
def test_kernels_agree(name, data):
    layout = data.draw(st.sampled_from(_mixture.LAYOUTS))
    n, width = data.draw(st.integers(0, 3 if TRITON_INTERPRETS else 200)), data.draw(st.integers(1, 40))
    k, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype, bias = data.draw(st.sampled_from(dtypes(name))), data.draw(st.booleans())
    calls = [head(n, width, k, d, layout, dtype, seed, device(name), bias) for seed in SEEDS]
    agree(OP, name, [(args, {"layout": layout}) for args in calls])


@pytest.mark.skipif("cpu" not in KERNELS, reason="tiles of the CPU")
@pytest.mark.parametrize("sizes", [(1100, 3, 127, 33, "joint"), (1100, 3, 1100, 2, "per_channel")])
def test_blocks_that_do_not_fit_at_once(sizes):
    """More parameters than wait for their products: d_hidden is summed over several turns."""
    args = head(*sizes)
    assert args[0].shape[0] * args[1].shape[0] > 1 << 22
    kwargs = {"layout": sizes[4]}
    assert_same(run("cpu", args, kwargs), differentiate(two_steps, args, kwargs), 1e-4)


@every_backend
def test_tokens_of_no_weight_change_nothing(name):
    args = head(12, 8, 5, 4, where=device(name))
    keep = torch.arange(12, device=device(name)) % 3 != 0
    some = run(name, args, cotangents=[keep.float()])
    rest = run(name, (args[0][keep], args[1], args[2], args[3][keep]), cotangents=[torch.ones(8)])
    assert not some.gradients[0][~keep].any() and not some.gradients[3][~keep].any()
    for i in (1, 2):
        torch.testing.assert_close(some.gradients[i], rest.gradients[i], rtol=1e-5, atol=1e-5)


@every_backend
def test_a_frozen_weight_costs_nothing(name):
    hidden, weight, bias, target = head(5, 8, 3, 4, where=device(name))
    with record() as seen, vlkern.backend(f"linear_gmm_nll={name}"):
        linear_gmm_nll(hidden.requires_grad_(), weight, bias, target).sum().backward()
        linear_gmm_nll(hidden.detach(), weight.requires_grad_(), None, target).sum().backward()
    backward = [call for call in seen if len(call.args) > 8]
    assert [call.args[-2:] for call in backward] == [(True, False), (False, True)]
    with torch.no_grad():
        rows = [[len(result) for result in call.op(*call.args)] for call in backward]
    assert rows == [[5, 0, 27, 5], [0, 27, 0, 5]]


@every_backend
def test_autocast_casts_the_matmuls_only(name):
    where, lower = device(name), dtypes(name if name in KERNELS else "cpu")[-1]
    hidden, weight, bias, target = head(6, 8, 3, 4, where=where)
    with torch.autocast(where, lower):
        inside = run(name, (hidden, weight, bias, target))
    with vlkern.backend(f"linear_gmm_nll={name}"):
        outside = linear_gmm_nll(hidden.to(lower), weight.to(lower), bias, target)
    assert inside.outputs[0].dtype == torch.float32
    torch.testing.assert_close(inside.outputs[0], outside, rtol=1e-6, atol=0)
    assert all(g.dtype == torch.float32 for g in inside.gradients)


@every_backend
def test_nan_is_not_swallowed(name):
    args = head(6, 8, 3, 4, where=device(name))
    args[0][2, 1] = math.nan
    found = run(name, args)
    assert found.outputs[0].isnan().tolist() == [i == 2 for i in range(6)]
    assert found.gradients[0][2].isnan().all() and found.gradients[1].isnan().any()
    assert found.gradients[0][:2].isfinite().all()


@pytest.mark.skipif("cpu" not in KERNELS, reason="the CPU's memory")
def test_the_parameters_never_exist():
    """The high-water mark of a fresh process stays below a third of what the parameters alone would take."""
    sample, both = samples.Sample("memory", 1024, 4, 512, 32), "forward+backward"
    extra = extra_memory(
        Case("linear_gmm_nll", sample, torch.float32), backend_contestant("linear_gmm_nll", "cpu"), (both,)
    )
    assert extra[both] < 4 * 1024 * 512 * 65 / 3


def test_the_benchmarks_truth_in_blocks_is_the_reference():
    inputs = Case("linear_gmm_nll", samples.Sample("", 70, 4, 3, 2), torch.float32).inputs().to(torch.float64)
    with vlkern.backend("linear_gmm_nll=reference"):
        want = inputs.run(linear_gmm_nll, "forward+backward")
    for a, b in zip(oracle._linear_mixture_in_blocks(inputs), want, strict=True):
        torch.testing.assert_close(a, b)


H, W, Z = torch.ones(4, 8), torch.ones(18, 8), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "hidden must be a tensor, got list", ([1.0], W, None, Z), {}),
        (TypeError, "weight must have the dtype of hidden, .*got torch.float16", (H, W.half(), None, Z), {}),
        (ValueError, r"hidden must have shape \[N, D\], got \[1, 4, 8\]", (H[None], W, None, Z), {}),
        (ValueError, r"hidden must have shape \[N, 7\], got \[4, 8\]", (H, W[:, :7], None, Z), {}),
        (ValueError, r"weight must hold at least one parameter .*got \[0, 8\]", (H, W[:0], None, Z), {}),
        (ValueError, r"weight must hold P = k \(1 \+ 2 d\) .*multiple of 9, got \[17, 8\]", (H, W[1:], None, Z), {}),
        (ValueError, r"weight must hold P = 3 k d .*multiple of 12, got \[18, 8\]", (H, W, None, Z),
         {"layout": "per_channel"}),
        (ValueError, r"bias must have shape \[18\], got \[4\]", (H, W, H[:, 0], Z), {}),
        (TypeError, "bias must be float.*got torch.int64", (H, W, W[:, 0].long(), Z), {}),
        (ValueError, r"target must have shape \[4, 4\], got \[3, 4\]", (H, W, None, Z[:3]), {}),
        (ValueError, r"target must have shape .* at least one dimension, got \[4, 0\]", (H, W, None, Z[:, :0]), {}),
        (ValueError, "target must be on the device of hidden, cpu, got meta", (H, W, None, Z.to("meta")), {}),
        (ValueError, "layout must be 'joint' or 'per_channel', got 'x'", (H, W, None, Z), {"layout": "x"}),
        (ValueError, "min_scale must be a positive finite number, got nan", (H, W, None, Z), {"min_scale": math.nan}),
    ],
)  # fmt: skip
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        linear_gmm_nll(*args, **kwargs)
