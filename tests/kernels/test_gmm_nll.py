"""The likelihood of mixtures: against torch.distributions, extremes, memory, bad input.

What all rooms share is in test_contract.py.
"""

import math

import pytest
import torch
from rooms import KERNELS, agree, device, dtypes

import vlkern
from vlkern import _mixture
from vlkern._native import TRITON_INTERPRETS
from vlkern._op import REGISTRY
from vlkern.bench import mixtures
from vlkern.bench.case import Case, backend_contestant
from vlkern.bench.memory import extra_memory
from vlkern.kernels.gmm_nll import samples
from vlkern.ops import gmm_nll
from vlkern.testing import differentiate

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

OP = REGISTRY["gmm_nll"]
every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
EXAMPLES, SEEDS = (2, range(2)) if TRITON_INTERPRETS else (20, range(6))
fuzz = hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
layouts = pytest.mark.parametrize("layout", _mixture.LAYOUTS)


def run(name, args, kwargs=None, **more):
    with vlkern.backend(f"gmm_nll={name}"):
        return differentiate(gmm_nll, args, kwargs or {}, **more)


def tokens(n, k, d, layout="joint", dtype=torch.float32, seed=0, where="cpu"):
    args, _ = samples.inputs(samples.Sample("", (n,), k, d, layout), dtype, where, seed)
    return args


def joint(logits, loc, raw):
    """Parameters of one dimension from three lists, one token."""
    parts = torch.tensor([loc, raw]).T.reshape(1, -1)
    return torch.cat([torch.tensor([logits]), parts], 1)


@fuzz
@hypothesis.given(
    layout=st.sampled_from(_mixture.LAYOUTS), n=st.integers(1, 5), k=st.integers(1, 9), d=st.integers(1, 9)
)
def test_reference_is_that_of_torch_distributions(layout, n, k, d):
    args = tokens(n, k, d, layout, torch.float64)
    ours = run("reference", args, {"layout": layout})
    exact = differentiate(lambda p, z: _in_float64(p, z, layout), args, {})
    for a, b in zip(ours.outputs + ours.gradients, exact.outputs + exact.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def _in_float64(params, target, layout):
    """bench/mixtures.py computes in float32."""
    import torch.distributions as D

    logits, loc, raw = _mixture.split(params, target.shape[-1], layout)
    parts = D.Normal(loc, (raw + (raw.square() + 4).sqrt()) / 2)
    parts = D.Independent(parts, 1) if layout == "joint" else parts
    return -D.MixtureSameFamily(D.Categorical(logits=logits), parts).log_prob(target)


@layouts
def test_rivals_compute_the_same(layout):
    args = tokens(7, 5, 6, layout)
    ours = run("reference", args, {"layout": layout})
    for rival in (mixtures.nll, mixtures.distribution_nll):
        theirs = differentiate(rival, args, {"layout": layout})
        for a, b in zip(ours.outputs + ours.gradients, theirs.outputs + theirs.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", KERNELS)
@fuzz
@hypothesis.given(data=st.data())
def test_kernels_agree(name, data):
    """Any sizes and dtypes, also a target of another dtype, and scales that are clamped."""
    layout = data.draw(st.sampled_from(_mixture.LAYOUTS))
    k, d = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 70))
    n = data.draw(st.integers(0, 3 if TRITON_INTERPRETS else 30))
    dtype, of_target = data.draw(st.sampled_from(dtypes(name))), data.draw(st.sampled_from(dtypes(name)))
    least, calls = data.draw(st.sampled_from([1e-6, 0.75])), []
    for seed in SEEDS:
        params, target = tokens(n, k, d, layout, dtype, seed, device(name))
        calls.append(((params, target.to(of_target)), {"layout": layout, "min_scale": least}))
    agree(OP, name, calls)


@every_backend
def test_leading_shapes_and_dtypes(name):
    where = device(name)
    params, target = torch.randn(2, 3, 4 * 11, device=where), torch.randn(2, 3, 5, device=where)
    with vlkern.backend(name):
        flat = gmm_nll(params.reshape(6, -1), target.reshape(6, -1))
        assert torch.equal(gmm_nll(params, target), flat.reshape(2, 3))
        assert gmm_nll(params[0, 0], target[0, 0]).shape == ()
        assert gmm_nll(params[..., :30], target, layout="per_channel").shape == (2, 3, 5)
        assert gmm_nll(params.half(), target).dtype == torch.float32


@every_backend
@layouts
def test_extreme_arguments_stay_finite(name, layout):
    """Scales from min_scale to the largest float, targets as far from everything as float32 allows."""
    sizes = torch.tensor([0.0, 1.0, 1e4, 1e18, 3e38])
    raw = torch.cat([sizes, -sizes]).to(device(name))
    for at in (0.0, -1e10, 3e38):
        zero = torch.zeros_like(raw)
        parts = torch.stack([zero, zero, raw], 1)
        target = torch.full((10, 1), at, device=device(name))
        shape = (10,) if layout == "joint" else (10, 1)
        found = run(name, (parts, target), {"layout": layout}, cotangents=[torch.ones(shape)])
        for result in found.outputs + found.gradients:
            assert result.isfinite().all(), at
        if at == 0:
            exact = torch.where(raw < 0, 1 / raw.double().neg(), raw.double())
            near = (raw.double() + (raw.double().square() + 4).sqrt()) / 2
            scale = torch.where(raw.abs() < 1e5, near, exact).clamp(min=1e-6)
            expected = scale.log() + 0.5 * math.log(2 * math.pi)
            torch.testing.assert_close(found.outputs[0].flatten().double(), expected, rtol=1e-5, atol=1e-5)


@every_backend
def test_a_clamped_scale_has_no_gradient(name):
    params = joint([0.0, 0.0], [0.1, -0.1], [-3.0, 3.0]).to(device(name))
    target = torch.zeros(1, 1, device=device(name))
    found = run(name, (params, target), {"min_scale": 0.5})
    d_raw = found.gradients[0][0, 3::2]
    assert d_raw[0] == 0 and d_raw[1] != 0


@every_backend
def test_far_components_and_masked_ones_get_zeros(name):
    """A share below float32 is none; a logit of -inf takes its component out."""
    params = joint([0.0, 0.0, -math.inf], [0.0, 1e3, 0.0], [0.0, 0.0, 0.0]).to(device(name))
    target = torch.full((1, 1), 0.5, device=device(name))
    found = run(name, (params, target))
    expected = math.log(2) + 0.125 + 0.5 * math.log(2 * math.pi)
    assert found.outputs[0].item() == pytest.approx(expected, rel=1e-6)
    d_params = found.gradients[0][0]
    assert d_params.isfinite().all() and d_params[2] == 0 and not d_params[5:].any() and d_params[3:5].all()


@every_backend
def test_equal_components_stay_equal(name):
    """Bit by bit: a head that starts with equal rows remains one Gaussian."""
    target = torch.randn(3, 20, device=device(name))
    found = run(name, (torch.zeros(3, 37 * 41, device=device(name)), target))
    parts = found.gradients[0][:, 37:].reshape(3, 37, 40)
    assert parts.any() and torch.equal(parts, parts[:, :1].expand_as(parts))
    assert found.gradients[0][:, :37].abs().max() < 1e-6


@every_backend
@layouts
def test_nan_is_not_swallowed(name, layout):
    params, target = tokens(4, 7, 3, layout, where=device(name))
    for i, j in ((0, 0), (1, params.shape[1] - 1), (2, params.shape[1] // 2)):
        params[i, j] = math.nan
    target[3, 1] = math.nan
    found = run(name, (params, target), {"layout": layout})
    broken = found.outputs[0].isnan()
    assert (broken if layout == "joint" else broken.any(1)).all()
    assert found.gradients[0].isnan().any(1).all()


@every_backend
@pytest.mark.parametrize(("n", "k", "d"), [(2, 256, 128), (8, 16, 32)])
def test_saved_bytes(name, n, k, d):
    """Parameters and target, which the caller has, and one number per component: below 2 % of the parameters."""
    args, saved = [a.requires_grad_() for a in tokens(n, k, d, where=device(name))], []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, vlkern.backend(name):
        gmm_nll(*args)
    own = {a.data_ptr() for a in args}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) <= 0.02 * args[0].nbytes


@pytest.mark.skipif("cpu" not in KERNELS, reason="the CPU's memory")
@pytest.mark.parametrize(("n", "k", "d"), [(24, 1024, 128), (4096, 16, 32)])
def test_extra_memory_is_a_twentieth_of_the_parameters(n, k, d):
    case, both = Case("gmm_nll", samples.Sample("memory", (n,), k, d), torch.float32), "forward+backward"
    parameters = case.inputs().args[0].nbytes
    assert extra_memory(case, backend_contestant("gmm_nll", "cpu"), (both,))[both] < 0.05 * parameters


X, Z = torch.ones(4, 18), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "params must be a tensor, got list", ([1.0], Z), {}),
        (TypeError, "target must be float64.*got torch.int64", (X, Z.long()), {}),
        (ValueError, r"params must hold P = k \(1 \+ 2 d\) .* a multiple of 9, got \[4, 17\]", (X[:, 1:], Z), {}),
        (ValueError, r"params must hold P = k .*got \[4, 0\]", (X[:, :0], Z), {}),
        (ValueError, r"params must hold P = k .*got \[\]", (X[0, 0], Z), {}),
        (ValueError, r"params must hold P = 3 k d .* a multiple of 12, got \[4, 18\]", (X, Z),
         {"layout": "per_channel"}),
        (ValueError, r"target must have shape \[4, 4\], got \[3, 4\]", (X, Z[:3]), {}),
        (ValueError, r"target must have shape \[4, 4\], got \[4\]", (X, Z[0]), {}),
        (ValueError, r"target must have shape \[..., d\] with at least one dimension, got \[4, 0\]", (X, Z[:, :0]), {}),
        (ValueError, "target must be on the device of params, cpu, got meta", (X, Z.to("meta")), {}),
        (ValueError, "layout must be 'joint' or 'per_channel', got 'both'", (X, Z), {"layout": "both"}),
        (ValueError, "min_scale must be a positive finite number, got -1", (X, Z), {"min_scale": -1}),
        (ValueError, "min_scale must be in .*got 1e-40", (X, Z), {"min_scale": 1e-40}),
        (TypeError, "min_scale must be a number, got str", (X, Z), {"min_scale": "1"}),
    ],
)  # fmt: skip
def test_bad_input(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        gmm_nll(*args, **kwargs)


def test_split_and_components():
    row = torch.arange(18.0)
    logits, loc, raw = _mixture.split(row, 4)
    assert logits.tolist() == [0, 1] and loc.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]] and raw[1, 0] == 14
    logits, loc, raw = _mixture.split(row, 2, "per_channel")
    assert logits.tolist() == [[0, 1, 2], [3, 4, 5]] and loc[0, 0] == 6 and raw[1, 2] == 17
    assert _mixture.components(row, 4) == 2 and _mixture.components(row, 2, "per_channel") == 3
    with pytest.raises(TypeError, match="dims must be an int, got float"):
        _mixture.split(row, 4.0)
    with pytest.raises(ValueError, match="dims must be at least 1, got 0"):
        _mixture.components(row, 0)
