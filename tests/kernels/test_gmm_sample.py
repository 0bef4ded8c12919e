"""Draws from mixtures: golden values, distributions, guidance and bad input. What all rooms share is in
test_contract.py.

Seeds are fixed. A distribution is rejected below a probability of 1e-3 (Kolmogorov-Smirnov), a frequency beyond 4.5
standard deviations.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rooms import KERNELS, device

import vlkern
from vlkern import _mixture
from vlkern.kernels.gmm_sample import ROUNDS, reference
from vlkern.ops import gmm_guided_sample, gmm_sample

every_backend = pytest.mark.parametrize("name", ("reference", *KERNELS))
GOLDEN = Path(__file__).parents[1] / "golden/givt_cfg_density.npz"
LIKELY = 1e-3
#: loc_c, scale_c, loc_u, scale_u, guidance
LAWS = {
    "givt": (0.5, 1.0, 0.0, 1.0, 0.4),
    "strong": (0.5, 1.0, 0.0, 1.0, 3.0),
    "jetformer": (0.5, 1.0, 0.0, 1.0, 9.0),
    "wide_unconditional": (0.0, 1.0, -1.0, 1.5, 9.0),
    "narrow_conditional": (1.0, 0.2, -0.5, 1.5, 0.6),
    "narrow_unconditional": (0.5, 1.0, 0.0, 0.6, 0.4),
    "flat": (0.2, 1.0, 0.0, 0.5345, 0.4),
}
every_law = pytest.mark.parametrize("law", LAWS)


def chosen(name):
    return vlkern.backend(f"gmm_sample={name}")


def seeded(name, seed=0):
    return torch.Generator(device(name)).manual_seed(seed)


def raw(scale):
    """What squareplus makes a scale."""
    return scale - 1 / scale


def one_gaussian(loc, scale, rows, dims, on):
    """[rows, P]: mixtures of one component, which is the same in every dimension."""
    row = torch.tensor([0.0] + [loc] * dims + [raw(scale)] * dims, device=on)
    return row.expand(rows, -1).contiguous()


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def probability(distance, n):
    """That the empirical distribution of n draws is farther than `distance` from its law: Kolmogorov's series."""
    t = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * t * t) for j in range(1, 101)))


def assert_follows(draws, cdf):
    x = draws.flatten().double().cpu().sort().values
    want, n = cdf(x), len(x)
    above, below = torch.arange(1, n + 1) / n - want, want - torch.arange(n) / n
    found = probability(max(above.max().item(), below.max().item()), n)
    assert found > LIKELY, f"probability {found:.1e}"


def assert_alike(one, other):
    """Two samples of one law."""
    a, b = (t.flatten().double().cpu().sort().values for t in (one, other))
    both = torch.cat([a, b])
    in_a, in_b = (torch.searchsorted(t, both, right=True) / len(t) for t in (a, b))
    found = probability((in_a - in_b).abs().max().item(), len(a) * len(b) / (len(a) + len(b)))
    assert found > LIKELY, f"probability {found:.1e}"


@pytest.mark.parametrize("kind", ["single", "joint"])
def test_golden_guidance(kind, monkeypatch):
    """GIVT's own candidates from its proposal: the first that is accepted, in every channel."""
    monkeypatch.setattr(reference, "NARROW", math.inf)
    with np.load(GOLDEN) as file:
        f = {key: torch.from_numpy(file[key]) for key in file if key != "config"}
        w = json.loads(str(file["config"]))["w"]
    conditional, unconditional = (f[f"in/{kind}_logits_{c}"].reshape(6, -1) for c in ("cond", "uncond"))
    gauss = [tuple(f[f"out/{kind}_{c}_{what}"] for what in ("loc", "scale")) for c in ("cond", "uncond")]
    law, loc = reference.Guided.of(*gauss, w), gauss[0][0]
    torch.testing.assert_close(law.proposal, f[f"out/{kind}_proposal_scale"])
    delta = f[f"in/{kind}_points"] - loc
    of_c, of_u = (torch.distributions.Normal(*g).log_prob(loc) for g in gauss)
    log_p = (1 + w) * of_c - w * of_u + law.slope * delta - law.curvature * delta.square() / 2
    torch.testing.assert_close(log_p, f[f"out/{kind}_log_p_unnormalized"], rtol=1e-4, atol=1e-4)

    joint, dims, uniform = kind == "joint", 4, torch.zeros(6, 4)
    if joint:  # in the middle of the component that was recorded
        weights = _mixture.split(conditional, dims)[0].softmax(-1)
        component = f["in/joint_component"].reshape(6, 1)
        uniform = (weights.cumsum(-1) - weights / 2).gather(1, component).squeeze(1)
    eps, tries, chances = (f[f"in/{kind}_{what}"].reshape(-1, 6, dims) for what in ("eps_fallback", "eps", "uniform"))
    z = reference.gmm_guided_sample(
        conditional, unconditional, uniform, eps[0], tries, chances, dims, joint, w, 1.0, 1.0, 1e-6
    )
    torch.testing.assert_close(z, f[f"out/{kind}_sample"].reshape(6, dims), rtol=1e-5, atol=1e-5)


@every_backend
def test_components_come_as_often_as_they_weigh(name):
    logits, rows, dims, k = torch.tensor([0.5, -1, 2, 0, -30, 1.5, -float("inf")]), 3, 2048, 7
    for temperature in (1.0, 2.0):
        loc = torch.arange(7.0).expand(dims, k)
        params = torch.stack([logits.expand(dims, k), loc, torch.zeros(dims, k)]).flatten().expand(rows, -1)
        with chosen(name):
            z = gmm_sample(
                params.to(device(name)), dims=dims, layout="per_channel", temperature=0.0,
                mixture_temperature=temperature, generator=seeded(name),
            )  # fmt: skip
        p, n = (temperature * logits).softmax(0), z.numel()
        counts = z.cpu().flatten().long().bincount(minlength=k)
        assert counts[4] == counts[6] == 0
        assert ((counts - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt() + 1e-3).all()


@every_backend
def test_one_component_for_all_dimensions_of_a_joint_mixture(name):
    n, k, d = 60, 3, 4
    params = torch.cat([torch.zeros(n, k), torch.arange(float(k)).repeat_interleave(2 * d).expand(n, -1)], 1)
    with chosen(name):
        z = gmm_sample(params.to(device(name)), dims=d, temperature=0.0, generator=seeded(name)).cpu()
    assert (z == z[:, :1]).all()
    assert z[:, 0].unique().tolist() == [0, 1, 2]


@every_backend
def test_plain_draws_are_normal(name):
    params = one_gaussian(1.5, 0.7, 3, 4096, device(name))
    with chosen(name):
        z = gmm_sample(params, dims=4096, temperature=0.9, generator=seeded(name))
        assert_follows(z, lambda x: normal_cdf((x - 1.5) / 0.63))
        means = gmm_sample(params, dims=4096, temperature=0.0, generator=seeded(name))
    assert (means == 1.5).all()


@every_backend
def test_truncated_draws_are_truncated_normal(name):
    params, t = one_gaussian(0.0, 1.0, 3, 4096, device(name)), 1.2
    with chosen(name):
        z = gmm_sample(params, dims=4096, truncation=t, generator=seeded(name))
    assert z.abs().max() <= t
    low, high = normal_cdf(torch.tensor([-t, t], dtype=torch.float64))
    assert_follows(z, lambda x: (normal_cdf(x) - low) / (high - low))


def law_of(law):
    """The distribution function that the docstring states, failures of all rounds included, by integration."""
    loc, scale, loc_u, scale_u, w = LAWS[law]
    x = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    delta = x - loc
    a, b = (1 + w) / scale**2 - w / scale_u**2, w * (loc - loc_u) / scale_u**2
    g = b * delta - a * delta.square() / 2
    log_p = g - (g[delta.abs() <= 10]).max()
    log_env = -delta.square() / (8 * max(scale, scale_u) ** 2)
    density = torch.minimum(log_p, log_env).exp()
    proposal = log_p.exp() if a * 4 * max(scale, scale_u) ** 2 > 1 else log_env.exp()
    failed = (1 - (density.sum() / proposal.sum()).item()) ** ROUNDS
    cdf = (1 - failed) * density.cumsum(0) / density.sum() + failed * normal_cdf(delta / scale)
    return lambda at: torch.from_numpy(np.interp(at.numpy(), x.numpy(), cdf.numpy()))


def guided(law, name, rows=3, dims=4096):
    loc, scale, loc_u, scale_u, w = LAWS[law]
    both = (one_gaussian(m, s, rows, dims, device(name)) for m, s in ((loc, scale), (loc_u, scale_u)))
    with chosen(name):
        return gmm_guided_sample(*both, dims=dims, guidance=w, generator=seeded(name))


@every_backend
@every_law
def test_guided_draws_follow_their_law(name, law):
    assert_follows(guided(law, name), law_of(law))


def official(law, n):
    """GIVT's sampler, step by step: 1000 candidates, the maximum on a grid, the conditional where all are refused."""
    loc, scale, loc_u, scale_u, w = LAWS[law]
    g = torch.Generator().manual_seed(5)
    with_, without = torch.distributions.Normal(loc, scale), torch.distributions.Normal(loc_u, scale_u)
    proposal = torch.distributions.Normal(loc, 2 * max(scale, scale_u))

    def p(x):
        return ((1 + w) * with_.log_prob(x) - w * without.log_prob(x)).exp()

    factor = p(loc + torch.linspace(-10, 10, 1001)).max() / proposal.log_prob(torch.tensor(loc)).exp()
    drawn = []
    for _ in range(n // 500):
        x = loc + proposal.scale * torch.randn(1000, 500, generator=g)
        u = torch.rand(1000, 500, generator=g)
        accepted = u * factor * proposal.log_prob(x).exp() < p(x)
        first = x.gather(0, accepted.int().argmax(0, keepdim=True))[0]
        drawn.append(torch.where(accepted.any(0), first, loc + scale * torch.randn(500, generator=g)))
    return torch.cat(drawn)


@pytest.mark.parametrize("law", ["givt", "jetformer", "wide_unconditional", "narrow_conditional"])
def test_guided_draws_are_those_of_givt(law):
    assert_alike(guided(law, KERNELS[0]), official(law, 4000))


@every_backend
@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_guided_draws_are_the_same_on_every_backend(name, layout):
    dims, k = 6, 5
    size = k * (1 + 2 * dims) if layout == "joint" else 3 * k * dims
    both = torch.randn(2, 10, size, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    options = {"dims": dims, "layout": layout, "guidance": 1.5, "temperature": 0.9, "mixture_temperature": 1.2}
    with chosen("reference"):
        want = gmm_guided_sample(*both, **options, generator=noise)
    if device(name) == "cpu":
        with chosen(name):
            z = gmm_guided_sample(*both, **options, generator=noise.manual_seed(2))
        torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_without_guidance_it_is_the_plain_draw(name, layout):
    params = torch.randn(9, 3 * 5 * 11 if layout == "per_channel" else 5 * 23, device=device(name))
    options = {"dims": 11, "layout": layout, "mixture_temperature": 0.8}
    with chosen(name):
        plain = gmm_sample(params, **options, generator=seeded(name))
        assert torch.equal(gmm_guided_sample(params, params + 1, guidance=0, generator=seeded(name), **options), plain)
        options["temperature"] = 0
        means = gmm_sample(params, **options, generator=seeded(name))
        assert torch.equal(gmm_guided_sample(params, params + 1, guidance=2, generator=seeded(name), **options), means)


@every_backend
def test_extreme_parameters_are_finite(name):
    """Impossible and huge logits, scales from the smallest to 1e30; u = 0 chooses no impossible component."""
    logits = torch.tensor([[-float("inf"), 0.0], [-3e38, 3e38], [0.0, -3e38], [1e4, -1e4]])
    d = 6
    scales = torch.tensor([-1e30, -1e4, -3.0, 3.0, 1e4, 1e30]).expand(4, 2, 1, d)
    params = torch.cat([logits, torch.cat([torch.ones_like(scales), scales], 2).flatten(1)], 1).to(device(name))
    uniform, normal = torch.tensor([0.0, 0.0, 1 - 2**-24, 0.5]), torch.full((4, d), -2.0)
    with chosen(name):
        z = gmm_sample(params, dims=d, noise=(uniform.to(params.device), normal.to(params.device)))
        assert z.isfinite().all()
        torch.testing.assert_close(z[:, 0].cpu(), torch.full((4,), 1 - 2e-6))
        other = params.clone()
        other[:, 2:] *= -1
        for w in (0.5, 5.0):
            assert gmm_guided_sample(params, other, dims=d, guidance=w, generator=seeded(name)).isfinite().all()


@every_backend
def test_shapes_and_dtypes(name):
    params = torch.randn(2 * 9, device=device(name)).bfloat16()
    with chosen(name):
        z = gmm_sample(params, dims=4, generator=seeded(name))
        torch.manual_seed(3)
        one = gmm_sample(params.expand(5, 2, -1), dims=4)
        torch.manual_seed(3)
        same = gmm_sample(params.expand(5, 2, -1), dims=4)
    assert z.shape == (4,) and z.dtype == torch.float32
    assert one.shape == (5, 2, 4) and torch.equal(one, same)


P, NOISE = torch.ones(3, 10), (torch.zeros(3), torch.zeros(3, 2))


@pytest.mark.parametrize("function", [gmm_sample, gmm_guided_sample])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"params": 1}, TypeError, "params must be a tensor, got int"),
        ({"params": P.int()}, TypeError, "params must be float64, float32, bfloat16 or float16, got torch.int32"),
        ({"dims": 3}, ValueError, "params must hold P = .* for d = 3 a multiple of 7, got \\[3, 10\\]"),
        (
            {"layout": "per_channel"},
            ValueError,
            "params must hold P = 3 k d numbers, .* of 6, got \\[3, 10\\]",
        ),
        ({"layout": "full"}, ValueError, "layout must be 'joint' or 'per_channel', got 'full'"),
        ({"dims": 0}, ValueError, "dims must be at least 1, got 0"),
        ({"dims": 2.0}, TypeError, "dims must be an int, got float"),
        ({"temperature": -1}, ValueError, "temperature must not be negative, got -1"),
        ({"temperature": float("inf")}, ValueError, "temperature must be a finite number, got inf"),
        ({"mixture_temperature": 0}, ValueError, "mixture_temperature must be a positive finite number, got 0"),
        ({"min_scale": 0.0}, ValueError, "min_scale must be a positive finite number, got 0.0"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_bad_input(function, options, error, message):
    options = {"params": P, "dims": 2, **options}
    params = options.pop("params")
    more = {} if function is gmm_sample else {"unconditional": P, "guidance": 1.0}
    with pytest.raises(error, match=message):
        function(params, **more, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"truncation": 0}, ValueError, "truncation must be a positive finite number, got 0"),
        ({"truncation": "1"}, TypeError, "truncation must be a number, got str"),
        ({"noise": NOISE[0]}, TypeError, "noise must be a tuple \\(uniform, normal\\) or None, got Tensor"),
        ({"noise": (NOISE[0], torch.zeros(3))}, ValueError, "noise: normal must have shape \\[3, 2\\], got \\[3\\]"),
        ({"noise": NOISE, "truncation": 1.0}, ValueError, "noise must be None where truncation or generator is given"),
    ],
)
def test_bad_noise(options, error, message):
    with pytest.raises(error, match=message):
        gmm_sample(P, dims=2, **options)


@pytest.mark.parametrize(
    ("unconditional", "guidance", "error", "message"),
    [
        (torch.ones(2, 10), 1.0, ValueError, "unconditional must have shape \\[3, 10\\], got \\[2, 10\\]"),
        (P.half(), 1.0, TypeError, "unconditional must have the dtype of params, torch.float32, got torch.float16"),
        (P, -0.5, ValueError, "guidance must not be negative, got -0.5"),
        (P, None, TypeError, "guidance must be a number, got NoneType"),
        (P.clone().requires_grad_(), 1.0, ValueError, "unconditional must not require a gradient"),
    ],
)
def test_bad_guidance(unconditional, guidance, error, message):
    with pytest.raises(error, match=message):
        gmm_guided_sample(P, unconditional, dims=2, guidance=guidance)
