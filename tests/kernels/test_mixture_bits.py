"""The bits of symbols: against torch.distributions, in the tails, at the bounds, extremes, bad input.

What all rooms share is in test_contract.py.
"""

import math

import pytest
import torch
from rooms import KERNELS, agree, device, dtypes

import vlkern
from vlkern._native import TRITON_INTERPRETS
from vlkern._op import REGISTRY
from vlkern.bench import mixtures
from vlkern.kernels.mixture_bits import samples
from vlkern.ops import mixture_bits
from vlkern.testing import differentiate

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

OP = REGISTRY["mixture_bits"]
every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
EXAMPLES, SEEDS = (2, range(2)) if TRITON_INTERPRETS else (20, range(6))
LOWEST, HIGHEST = math.log(0.11), math.log(256)


def run(name, symbols, params, **more):
    """Bits, d_symbols and d_params."""
    with vlkern.backend(f"mixture_bits={name}"):
        found = differentiate(mixture_bits, (symbols, params), {}, **more)
    return found.outputs[0], *found.gradients


def ones(symbols):
    return {"cotangents": [torch.ones(symbols.shape)]}


def single(distance, scale, where="cpu", dtype=torch.float32):
    """One component a symbol, some distances (in scales) right or left of it."""
    distance, scale = (t.flatten() for t in torch.meshgrid(distance, scale, indexing="ij"))
    means = torch.linspace(-3, 3, len(distance), dtype=torch.float64)
    params = torch.stack([torch.zeros_like(means), means, scale.log()])[None, :, None].to(where, dtype)
    symbols = (params[0, 1].double() + distance * params[0, 2].double().exp()).to(where, dtype)
    return symbols, params


def test_reference_is_that_of_torch_distributions():
    (symbols, params), _ = samples.inputs(samples.Sample("", (20,), 3, 30), torch.float64, "cpu")
    ours = run("reference", symbols, params)
    theirs = differentiate(mixtures.distribution_bits, (symbols, params), {})
    for a, b in zip(ours, theirs.outputs + theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_rivals_compute_the_same():
    (symbols, params), _ = samples.inputs(samples.Sample("", (20,), 3, 30), torch.float32, "cpu")
    theirs = differentiate(mixtures.bits, (symbols, params), {})
    for a, b in zip(run("reference", symbols, params), theirs.outputs + theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@every_backend
def test_tails_are_exact(name):
    """P to 7e-6 of itself up to six scales, for every scale; of a kernel also between the forms that it has."""
    many = (13, 9) if TRITON_INTERPRETS else (97, 40)
    distance, scale = torch.linspace(-6, 6, many[0]).double(), torch.logspace(-0.958, 2.408, many[1]).double()
    symbols, params = single(distance, scale, device(name))
    exact = run("reference", symbols.double().cpu(), params.double().cpu(), **ones(symbols))
    found = run(name, symbols, params, **ones(symbols))
    slack = 20 if name == "reference" else 1  # in float32 it has no series for wide components
    assert (found[0].cpu() - exact[0]).abs().max() < slack * 1e-5
    for ours, wide in zip(found[1:], exact[1:], strict=True):
        assert ((ours.cpu() - wide).abs() / (1 + wide.abs())).max() < slack * 6e-5


@pytest.mark.parametrize("name", KERNELS)
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_kernels_agree(name, data):
    """Any sizes and dtypes, also symbols of another dtype."""
    most = (3, 40, 3) if TRITON_INTERPRETS else (9, 150, 9)
    k, c, n = data.draw(st.integers(1, most[0])), data.draw(st.integers(1, most[1])), data.draw(st.integers(0, most[2]))
    dtype, of_symbols = data.draw(st.sampled_from(dtypes(name))), data.draw(st.sampled_from(dtypes(name)))
    calls = []
    for seed in SEEDS:
        sample = samples.Sample("", (n,), k, c, data.draw(st.booleans()))
        (symbols, params), _ = samples.inputs(sample, dtype, device(name), seed)
        calls.append(((symbols.to(of_symbols), params), {}))
    agree(OP, name, calls)


@every_backend
def test_below_the_bound_the_gradient_points_home(name):
    """50 scales off, and further: bits stay at those of 1e-9, a step against the gradient goes to the component."""
    from_edge = torch.tensor([-1e6, -50.0, -7.0, 7.0, 50.0, 127.0, 1e6], dtype=torch.float64)[:, None]
    scale = torch.tensor([0.11, 0.5, 30.0, 256.0], dtype=torch.float64)
    symbols = (from_edge * scale + 0.5 * from_edge.sign()).flatten().to(device(name), torch.float32)
    params = torch.stack([torch.zeros(28), torch.zeros(28), scale.log().float().repeat(7)])[:, None].to(symbols)
    bits, d_symbols, d_params = (t.cpu() for t in run(name, symbols, params, **ones(symbols)))
    assert (bits - -math.log2(1e-9)).abs().max() < 2e-6
    side, near = symbols.sign().cpu(), from_edge.abs().expand(7, 4).flatten() < 60
    assert (d_symbols * side > 0).all() and (d_params[1, 0] * side < 0).all() and (d_params[2] < 0).all()
    wide = symbols.double().cpu()[near], params.double().cpu()[..., near]
    exact = differentiate(_unbounded, wide, {}, cotangents=[torch.ones(int(near.sum()))])
    torch.testing.assert_close(d_symbols[near].double(), exact.gradients[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_params[..., near].double(), exact.gradients[1], rtol=1e-5, atol=1e-5)


def _unbounded(symbols, params):
    """-log2 P of one component, from the logarithms of tails."""
    scale, away = params[2, 0].exp(), (symbols - params[1, 0]).abs()
    near, far = (torch.special.log_ndtr((edge - away) / scale) for edge in (0.5, -0.5))
    return -(near + torch.log1p(-torch.exp(far - near))) / math.log(2)


@every_backend
def test_the_nearest_component_is_pulled(name):
    """Far from everything, a symbol belongs to whom it is nearest to in scales, whatever the weights."""
    params = torch.tensor([[20.0, 0.0], [0.0, 10.0], [0.0, 0.0]])[..., None].to(device(name))
    _, d_symbols, d_params = run(name, torch.tensor([100.0], device=device(name)), params)
    assert abs(d_params[1, 0]) < 1e-6 * abs(d_params[1, 1]) and d_symbols.item() == -d_params[1, 1].item()


@every_backend
def test_scales_beyond_their_range_come_back_but_do_not_leave(name):
    raw = torch.tensor([LOWEST - 1, LOWEST - 1, HIGHEST + 1, HIGHEST + 1, 0.0])
    symbols = torch.tensor([0.0, 3.0, 0.0, 900.0, 3.0])  # inside: a smaller scale is better; outside: a larger one
    params = torch.stack([torch.zeros(5), torch.zeros(5), raw])[:, None].to(device(name))
    bits, _, d_params = run(name, symbols.to(device(name)), params, **ones(symbols))
    d_raw = d_params[2, 0].cpu()
    assert d_raw[0] == 0 and d_raw[1] < 0 and d_raw[2] > 0 and d_raw[3] == 0 and d_raw[4] < 0
    inside = params.clone()
    inside[2].clamp_(LOWEST, HIGHEST)
    torch.testing.assert_close(bits, run(name, symbols.to(device(name)), inside)[0])


@every_backend
def test_extreme_arguments_stay_finite(name):
    sizes = torch.tensor([0.0, 1e-30, 1.0, 1e4, 1e18, 3e38])
    values = torch.cat([sizes, -sizes])
    grid = torch.cartesian_prod(values, values, values, values)
    if TRITON_INTERPRETS:
        grid = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))[:200]]
    grid = grid.T.reshape(4, 1, 1, -1).to(device(name))
    symbols, second = grid[0, 0], torch.zeros_like(grid[1:])
    params = torch.cat([grid[1:], second], 1).reshape(3, 2, -1)
    bits, d_symbols, d_params = run(name, symbols[0], params, **ones(symbols[0]))
    assert bits.isfinite().all() and d_symbols.isfinite().all() and d_params.isfinite().all()
    assert (bits >= 0).all()


@every_backend
def test_nan_is_not_swallowed(name):
    (symbols, params), _ = samples.inputs(samples.Sample("", (4,), 3, 9), torch.float32, device(name))
    symbols[0, 1] = params[1, 0, 2, 1] = params[2, 1, 0, 1] = params[3, 2, 1, 1] = math.nan
    bits, _, d_params = run(name, symbols, params)
    assert bits[:, 1].isnan().all() and d_params[..., 1].isnan().flatten(1).any(1).all()
    assert bits[:, 2:].isfinite().all() and d_params[..., 2:].isfinite().all()


@every_backend
def test_probabilities_add_up_to_one(name):
    """Over all integers, for narrow and wide components."""
    most = 80.0 if TRITON_INTERPRETS else 2000.0
    symbols = torch.arange(-most, most + 1, device=device(name))[:, None].expand(-1, 3)
    raw = torch.tensor([[LOWEST, 0.0, HIGHEST], [1.0, -1.0, 3.0]]).clamp(max=2.4 if TRITON_INTERPRETS else HIGHEST)
    params = torch.stack([torch.zeros(2, 3), torch.tensor([[0.3, -0.5, 2.0], [-7.3, 9.0, 0.0]]), raw])
    with vlkern.backend(name):
        bits = mixture_bits(symbols, params.to(device(name)).expand(len(symbols), 3, 2, 3))
    total = torch.exp2(-bits.double()).masked_fill(bits > 29.8, 0).sum(0)
    assert (total - 1).abs().max() < (1e-4 if name == "reference" else 1e-6)


@every_backend
def test_nothing_but_the_arguments_is_saved(name):
    saved = []
    (symbols, params), _ = samples.inputs(samples.Sample("", (9,), 3, 40), torch.float32, device(name))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t)
    with hooks, vlkern.backend(name):
        mixture_bits(symbols.requires_grad_(), params.requires_grad_())
    assert set(saved) == {symbols.data_ptr(), params.data_ptr()}


Y, X = torch.ones(2, 5), torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "symbols must be a tensor, got list", ([1.0], X)),
        (TypeError, "symbols must be float64.*got torch.int32", (Y.int(), X)),
        (TypeError, "params must be float64.*got torch.int64", (Y, X.long())),
        (ValueError, r"symbols must have shape \[..., C\] with at least one channel, got \[2, 0\]", (Y[:, :0], X)),
        (ValueError, r"params must have shape \[..., 3, K, C\] .*got \[2, 2, 4, 5\]", (Y, X[:, :2])),
        (ValueError, r"params must have shape \[..., 3, K, C\] .*got \[2, 3, 0, 5\]", (Y, X[:, :, :0])),
        (ValueError, r"params must have shape \[2, 3, 4, 5\], got \[1, 3, 4, 5\]", (Y, X[:1])),
        (ValueError, "symbols must be on the device of params, meta, got cpu", (Y, X.to("meta"))),
    ],
)
def test_bad_input(error, message, args):
    with pytest.raises(error, match=message):
        mixture_bits(*args)
