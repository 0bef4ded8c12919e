"""GIVT: what sees what, caches, samplers, beams, parallel decoding, sizes, files, bad input."""

import dataclasses
import math

import pytest
import torch
from peers import randomize

from vlkern import models
from vlkern.generation import givt as causal
from vlkern.generation import masked_givt as masked
from vlkern.generation.givt import Beams, Sampler
from vlkern.layers.mixture import MixtureHead
from vlkern.models import givt
from vlkern.models.adaptor import Adaptor, AdaptorConfig
from vlkern.models.givt import Givt, GivtConfig
from vlkern.models.siglip import VisionConfig
from vlkern.recipes.givt import Objective

CAUSAL = GivtConfig(32, 2, 4, 48, length=9, channels=4, components=3, labels=5)
MASKED = dataclasses.replace(CAUSAL, style="masked")
LABELS = torch.tensor([3, 0, 4])


def model(config=CAUSAL, **more):
    net = randomize(Givt(dataclasses.replace(config, **more)))
    with torch.no_grad():  # densities about as wide as the tokens
        net.head.linear.weight *= 0.3
    return net


def tokens(seed=0, batch=3):
    return torch.randn(batch, 9, 4, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_token_sees_a_later_one():
    """Exactly: the gradient of a token's likelihood in later ones is zero, in earlier ones it is not."""
    net, z = model(), tokens().requires_grad_()
    nll = net.nll(z, LABELS)
    for i in (0, 4, 8):
        (grad,) = torch.autograd.grad(nll[1, i], z, retain_graph=True)
        assert bool((grad[[0, 2]] == 0).all()) and bool((grad[1, i + 1 :] == 0).all())
        assert bool((grad[1, : i + 1].abs().amax(1) > 0).all())


@pytest.mark.parametrize("mask", givt.MASKS)
def test_hidden_tokens_are_not_seen(mask):
    """Exactly; all others are."""
    net, hide = model(MASKED, mask=mask), torch.rand(3, 9, generator=generator()) < 0.4
    z = tokens().requires_grad_()
    (grad,) = torch.autograd.grad(net(z, LABELS, mask=hide).square().sum(), z)
    assert torch.equal(grad.abs().amax(2) == 0, hide)


def test_labels_matter_unless_they_are_dropped():
    net, z = model(), tokens()
    drop = torch.tensor([True, False, True])
    plain, dropped = net(z, LABELS, drop=None), net(z, LABELS, drop=drop)
    assert torch.equal(plain[1], dropped[1]) and not torch.allclose(plain[0], dropped[0])
    assert torch.equal(net(z, LABELS.flip(0), drop=drop)[0], dropped[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cached_is_uncached(dtype):
    """With a class and without, side by side in one cache."""
    net, z = model().to(dtype), tokens().to(dtype)
    labels, drop = causal.both(net, LABELS)
    z = z.repeat(2, 1, 1)
    want, caches, x = net(z, labels, drop=drop), net.new_caches(6), net.begin(labels, drop)
    for i in range(9):
        got = net.head(net.extend(x, caches))
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(got.float(), want[:, i].float(), rtol=tolerance, atol=tolerance)
        x = net.embed(z[:, i])
    with pytest.raises(ValueError, match="capacity of 9 tokens"):
        net.extend(x, caches)


def test_sampling_follows_its_generator_and_restores_dropout():
    net = model(dropout=0.5).train()
    drawn = [causal.sample(net, LABELS, Sampler(generator=generator(seed))) for seed in (0, 0, 1)]
    assert drawn[0].shape == (3, 9, 4) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert net.training and not drawn[0].requires_grad


@torch.no_grad()
def test_temperature_and_guidance():
    """A likelier sequence the colder it is drawn; guidance makes the class likelier than others."""
    net, labels = model(), torch.tensor([3]).expand(64)

    def nll(**options):
        z = causal.sample(net, labels, Sampler(generator=generator(), **options))
        return float(net.nll(z, labels).mean()), float(net.nll(z, (labels + 1) % 5).mean())

    (warm, other), (cold, _), (sure, away) = nll(), nll(temperature=0.5), nll(guidance=2.0)
    assert cold < warm - 0.5 and away - sure > other - warm
    assert nll(guidance=0.0) == (warm, other)
    means = [causal.sample(net, labels, Sampler(temperature=0.0, generator=generator(seed))) for seed in (0, 1)]
    assert not torch.equal(*means)  # the component is still drawn
    assert nll(temperature=0.0)[0] < cold


@pytest.mark.parametrize("layout", ["joint", "per_channel", "multivariate"])
@torch.no_grad()
def test_a_beam_is_a_sample_and_more_are_likelier(layout):
    """One beam with one fan draws what `sample` draws; scores are the likelihood of the whole sequence."""
    net = model(layout=layout, components=1 if layout == "multivariate" else 3)
    z, score = causal.beam_search(net, LABELS, Sampler(generator=generator()), Beams(1, 1))
    assert torch.equal(z, causal.sample(net, LABELS, Sampler(generator=generator())))
    torch.testing.assert_close(score, -net.nll(z, LABELS).sum(1), rtol=1e-4, atol=1e-4)
    many, best = causal.beam_search(net, LABELS, Sampler(generator=generator()), Beams(3, 8))
    torch.testing.assert_close(best, -net.nll(many, LABELS).sum(1), rtol=1e-4, atol=1e-4)
    assert bool((best > score + 1).all())


def test_beams_are_drawn_without_replacement():
    """With probabilities that go as exp(score / temperature); the best ones as it falls."""
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 4.0]])
    assert causal._kept(scores, Beams(2, 2), None).tolist() == [1, 3, 4, 7]
    kept = [causal._kept(scores[:1], Beams(2, 2, 2.0), generator(seed)).tolist() for seed in range(2000)]
    assert all(a != b for a, b in kept)
    weights = (scores[0] / 2).softmax(0)
    found = torch.tensor([first for first, _ in kept]).bincount(minlength=4) / 2000
    torch.testing.assert_close(found, weights, rtol=0, atol=0.04)


def test_parallel_decoding_keeps_what_it_knows():
    net = model(MASKED)
    sampler, before = Sampler(guidance=0.5, generator=generator()), None
    for number, step in enumerate(masked.steps(net, LABELS, sampler, count=4), 1):
        left = masked.hidden_again(torch.tensor([9]), 9, number / 4)
        assert step.hidden.sum(1).tolist() == [int(left)] * 3 and bool((step.tokens[step.hidden] == 0).all())
        if before is not None:
            assert torch.equal(step.tokens[~before.hidden], before.tokens[~before.hidden])
            assert bool((before.hidden | ~step.hidden).all())
        before = step
    assert number == 4 and not step.hidden.any() and bool(step.tokens.isfinite().all())
    again = masked.sample(net, LABELS, Sampler(guidance=0.5, generator=generator()), count=4)
    assert torch.equal(again, step.tokens)


def test_equal_components_part():
    """They start at zero, but their means a little apart: else their gradients would be the same for ever."""
    head = MixtureHead(8, channels=2, components=4)
    hidden, z = torch.ones(32, 8), torch.randn(32, 2, generator=generator()).sign() * 3
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        head.nll(hidden, z).mean().backward()
        optimizer.step()
    one_gaussian = math.log(2 * math.pi * math.e * 9)
    assert head.nll(hidden, z).mean().item() < one_gaussian - 2


def test_the_adaptor_learns_with_the_model():
    config = dataclasses.replace(CAUSAL, adaptor=AdaptorConfig(4, (3, 3), blocks=2, bottleneck=8))
    net, z = model(config), tokens()
    torch.testing.assert_close(net.latents_of(net.tokens_of(z)), z, rtol=1e-4, atol=1e-4)
    Objective(net)(z, LABELS).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.adaptor.parameters())
    jacobian = torch.autograd.functional.jacobian(net.tokens_of, z[:1]).reshape(36, 36)
    assert abs(float(torch.linalg.slogdet(jacobian.double())[1])) < 1e-3


def test_files(tmp_path):
    encoder = VisionConfig(32, 1, 2, 48, image_size=(8, 12), patch=4)
    for i, config in enumerate(
        (
            dataclasses.replace(CAUSAL, adaptor=AdaptorConfig(4, (3, 3), blocks=2)),
            dataclasses.replace(MASKED, labels=0, layout="per_channel", unlabelled=False),
            dataclasses.replace(CAUSAL, encoder=encoder),
        )
    ):
        net = model(config)
        models.save_pretrained(net, tmp_path / str(i))
        again = models.load_pretrained(tmp_path / str(i))
        assert isinstance(again, Givt) and again.config == config
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("givt-causal-base-256", 86.4),
        ("givt-causal-256", 304.0),
        ("givt-causal-large-256", 1664.3),
        ("givt-masked-256", 304.0),
    ],
)
def test_sizes_of_the_paper(name, millions):
    with torch.device("meta"):
        net = Givt(givt.PRESETS[name])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_compiled_without_a_break():
    net = Objective(model(depth=1))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    drop = torch.tensor([True, False, True])
    torch.testing.assert_close(compiled(tokens(), LABELS, drop), net(tokens(), LABELS, drop))


BAD_SIZES = [
    ({"heads": 3}, "width must be even and a multiple of the 3 heads, got 32"),
    ({"channels": 0}, "channels must be an integer from 1 on, got 0"),
    ({"layout": "full"}, "layout must be one of joint, per_channel, multivariate, got 'full'"),
    ({"layout": "multivariate"}, "components must be 1 with layout multivariate, got 3"),
    ({"style": "prefix"}, "style must be one of causal, masked, got 'prefix'"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"adaptor": AdaptorConfig(4, (3, 2), 2)}, "adaptor must have 9 tokens of 4 channels, got 6 of 4"),
    ({"encoder": VisionConfig(64, 1, 2, 48, (8, 8), 4)}, "encoder must have the width of the model, 32, got 64"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SIZES)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CAUSAL, **change)
    with pytest.raises(ValueError, match="half of it a multiple of 3 groups, got 8"):
        AdaptorConfig(6, (2, 2), bottleneck=8)
    with pytest.raises(ValueError, match="channels must be even"):
        AdaptorConfig(5, (2, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.nll(tokens()[:, :8], LABELS), ValueError, r"tokens must have shape \[3, 9, 4\], got \[3, 8, 4\]"),
        (lambda m: m.nll(tokens(), LABELS[:2]), ValueError, "labels must have shape"),
        (lambda m: m.nll(tokens(), LABELS + 1), ValueError, "labels must be from 0 to 4, got 5"),
        (lambda m: m.nll(tokens(), LABELS.float()), TypeError, "labels must be int32 or int64"),
        (lambda m: m.nll(tokens()), TypeError, "labels must be a tensor, got NoneType"),
        (lambda m: m.nll(tokens(), LABELS, drop=LABELS), TypeError, "drop must be bool"),
        (lambda m: m.nll(tokens(), LABELS, mask=tokens()[..., 0] > 0), ValueError, "mask must be None for"),
        (lambda m: m.nll(tokens(), LABELS, encoded=tokens()), ValueError, "encoded must not be given"),
        (lambda m: m.encode(tokens()), ValueError, "pixels must be None: the model has no encoder"),
        (lambda m: causal.sample(m, LABELS, Sampler(guidance=-1)), ValueError, "guidance must be at least 0, got -1"),
        (lambda m: causal.beam_search(m, LABELS, Sampler(guidance=1)), ValueError, "must have guidance 0"),
        (lambda m: Beams(beams=0), ValueError, "beams must be a positive integer, got 0"),
        (lambda m: masked.sample(m, LABELS), ValueError, "model must be of style masked, got causal"),
        (lambda m: masked.masked_ratio(LABELS / 5, "linear"), ValueError, "schedule must be cosine or pow:K"),
        (lambda m: model(MASKED).new_caches(2), ValueError, "style must be causal"),
        (lambda m: model(MASKED).nll(tokens(), LABELS), ValueError, "mask must be given for style masked"),
        (lambda m: causal.sample(model(unlabelled=False), LABELS, Sampler(guidance=1)), ValueError, "must be 0"),
        (lambda m: model(unlabelled=False).begin(LABELS, LABELS > 0), ValueError, "the model always has its label"),
        (lambda m: model(labels=0).begin(LABELS), TypeError, "labels must be the number of examples"),
        (lambda m: Adaptor(AdaptorConfig(4, (3, 3), 1))(tokens()[:, :8]), ValueError, "z_BLd must have shape"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(model())


def test_no_example():
    """An empty batch gives empty tensors."""
    net, none = model(), torch.zeros(0, dtype=torch.int64)
    assert net.nll(torch.zeros(0, 9, 4), none).shape == (0, 9)
    assert causal.sample(net, none).shape == (0, 9, 4)
    with pytest.raises(ValueError, match="tokens must hold an example at least"):
        net.loss(torch.zeros(0, 9, 4), none)
