"""JetFormer by itself: rows of many lengths, sampling from caches against whole rows, what it saves and refuses."""

import math
from dataclasses import replace

import pytest
import torch
from goldens import assert_close
from peers import randomize

import vlkern
from vlkern import flows, models, ops
from vlkern.bench import jetformer as bench
from vlkern.generation import jetformer as sampling
from vlkern.layers.init import shapes_only
from vlkern.models.jet import JetConfig
from vlkern.models.jetformer import PRESETS, SPECIAL, JetFormer, JetFormerConfig
from vlkern.models.patch_pca import PatchPca, PatchPcaConfig

#: Pictures of 8 pixels: 4 tokens of 48 numbers, 5 of them modelled.
CONFIG = JetFormerConfig(
    JetConfig(2, 1, 48, depth=2, block_depth=1, width=16, heads=2, kinds=("channels",)),
    4, 5, 3, width=24, depth=2, heads=3, head_dim=8, mlp=32, vocabulary=20 + SPECIAL, text_length=4,
)  # fmt: skip
VARIANTS = {
    "texts": CONFIG,
    "classes": replace(CONFIG, text_length=1, repeats=3, tied=True),
    "prefix": replace(CONFIG, causal_prefix=False, shared_norm=False, boi_token=False, tied=True),
}
EACH = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def build(config=CONFIG):
    torch.manual_seed(0)
    return randomize(JetFormer(config)).eval()


def batch(config, count=3):
    """Pixels, words, lengths and who comes first."""
    g = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, 8, 8, generator=g) * 2 - 1
    ids = torch.randint(20, (count, config.text_length), generator=g)
    return pixels, ids, 1 + torch.arange(count) % config.text_length, torch.arange(count) % 2 == 0


@EACH
def test_rows_do_not_see_each_other(config):
    """A batch of texts of many lengths in both orders, and each row alone."""
    model, (pixels, ids, lengths, first) = build(config), batch(config)
    bits, nats = model(pixels, ids, lengths, first)
    for b in range(len(ids)):
        alone = model(pixels[b : b + 1], ids[b : b + 1, : lengths[b]], None, first[b : b + 1])
        torch.testing.assert_close(torch.stack([bits[b], nats[b]]), torch.cat(alone), rtol=1e-5, atol=1e-5)
    with_pads = ids.clone()
    with_pads[0, lengths[0] :] = 7
    torch.testing.assert_close(model(pixels, with_pads, lengths, first)[0], bits)


@EACH
def test_what_an_element_sees(config):
    """The likelihood of a token or word depends on what comes before it in the row, and on nothing behind."""
    model, (pixels, ids, _, first) = build(config), batch(config, 2)
    with torch.no_grad():
        soft = model.encode(pixels)[0][..., : config.modelled]
        plain = model.outputs(soft, ids, None, first)
        other = soft.clone()
        other[:, 2] += 1
        moved = model.outputs(other, ids, None, first)
    same = (plain.image[0] == moved.image[0]).all(1)  # the text first: tokens 0 to 2 are said before token 2 is seen
    assert same.tolist() == [True, True, True, False]
    assert torch.equal(plain.text[0], moved.text[0])
    assert not (plain.text[1] == moved.text[1]).all(1).any()  # the picture first
    if config.causal_prefix:
        assert torch.equal(plain.image[1, :3], moved.image[1, :3])
    elif not config.boi_token:
        assert not (plain.image[1] == moved.image[1]).all(1).any()


@EACH
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_cached_sampling_is_uncached_sampling(config, guidance, monkeypatch):
    """Every draw comes from the mixtures that whole rows give; guided ones also from those without the text."""
    model, (_, ids, lengths, _) = build(config), batch(config)
    seen = []
    for name in ("gmm_sample", "gmm_guided_sample"):
        draw = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *p, draw=draw, **o: (seen.append((p, o)), draw(*p, **o))[1])
    g = torch.Generator().manual_seed(3)
    tokens = sampling.sample_tokens(model, ids, lengths, guidance=guidance, temperature=0.9, generator=g)
    assert len(seen) == config.tokens and all(o["temperature"] == 0.9 for _, o in seen)
    with torch.no_grad():
        soft = tokens[..., : config.modelled]
        whole = [model.outputs(soft, ids, lengths)]
        if guidance:
            whole.append(model.outputs(soft, model.unlabelled(len(ids))))
        for i, out in enumerate(whole):
            assert_close(torch.stack([p[i] for p, _ in seen], 1), model.mixture(out.image), 2e-5)
    again = sampling.sample_tokens(model, ids, lengths, guidance=guidance, temperature=0.9, generator=g.manual_seed(3))
    assert torch.equal(tokens, again)


def test_captions_from_caches():
    """Greedy words are the best ones of whole rows; at a temperature they are drawn."""
    model, (pixels, *_) = build(), batch(CONFIG)
    found = sampling.caption(model, pixels)
    assert found.shape == (3, 4)
    with torch.no_grad():
        soft = model.encode(pixels)[0][..., :5]
        out = model.outputs(soft, found, None, torch.zeros(3, dtype=torch.bool))
        assert torch.equal(model.text_logits(out.text).argmax(-1), found)
    drawn = [
        sampling.caption(model, pixels, 6, temperature=5.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_bits_are_a_density():
    """Against the definition: log-densities of all tokens and the Jacobian of everything before them."""
    config = replace(CONFIG, pca=PatchPcaConfig((4, 4), 48), flow=replace(CONFIG.flow, depth=1))
    model, (pixels, ids, *_) = build(config).double(), batch(config, 1)
    pixels = pixels.double()
    model.pca.fit(torch.randn(50, 3, 8, 8))
    with vlkern.backend("reference"):
        tokens, logdet = model.encode(pixels)
        jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x)[0].flatten(), pixels)
        expected = jacobian.reshape(192, 192).slogdet().logabsdet
        torch.testing.assert_close(logdet[0].double(), expected, rtol=1e-5, atol=1e-3)
        params = model.image_head(model.outputs(tokens[..., :5], ids).image)[0]
        bits = model(pixels, ids)[0]
        torch.testing.assert_close(model.decode(tokens), pixels, rtol=1e-6, atol=1e-6)
    weights, rest = params[:, :3].softmax(-1), params[:, 3:].view(4, 3, 2, 5)
    scale = (rest[:, :, 1] + (rest[:, :, 1] ** 2 + 4).sqrt()) / 2
    soft = torch.distributions.Normal(rest[:, :, 0], scale).log_prob(tokens[0, :, None, :5]).sum(-1).exp()
    noise = torch.distributions.Normal(0.0, 1.0).log_prob(tokens[0, :, 5:]).sum()
    log_p = (weights * soft).sum(-1).log().sum() + noise + expected - 192 * math.log(127.5)
    torch.testing.assert_close(bits[0].double(), -log_p / 192 / math.log(2), rtol=1e-5, atol=1e-5)


def test_components_part():
    """The means of the mixtures begin apart, so that they do not get the same gradients for ever."""
    torch.manual_seed(0)
    model, (pixels, ids, *_) = JetFormer(CONFIG), batch(CONFIG)
    model(pixels, ids)[0].mean().backward()
    means = model.image_head.bias.grad[3:].view(3, 2, 5)[:, 0]
    assert (means[0] - means[1]).abs().max() > 1e-6
    assert not model.image_head.weight.any()


def test_dropout():
    """In training alone, and what the seed says."""
    model, (pixels, ids, *_) = build(replace(CONFIG, dropout=0.5)), batch(CONFIG)
    torch.testing.assert_close(model(pixels, ids)[0], build()(pixels, ids)[0])
    model.train()
    torch.manual_seed(0)
    first = model(pixels, ids)[0]
    assert not torch.equal(first, model(pixels, ids)[0])
    torch.manual_seed(0)
    assert torch.equal(first, model(pixels, ids)[0])


def test_autocast():
    """The flow stays in float32, the rest computes in bfloat16; every parameter gets its gradient."""
    model, (pixels, ids, lengths, first) = build(), batch(CONFIG)
    exact = torch.stack(model(pixels, ids, lengths, first))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = model.encode(pixels)
        low = torch.stack(model(pixels, ids, lengths, first))
    assert torch.equal(tokens, model.encode(pixels)[0])
    assert low.dtype == torch.float32 and 0 < float((low - exact).detach().abs().max()) < 0.1
    low.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EACH
def test_saved_and_loaded(config, tmp_path):
    model = build(replace(config, pca=PatchPcaConfig((4, 4), 48, whiten=False)))
    model.pca.fit(torch.randn(50, 3, 8, 8))
    models.save_pretrained(model, tmp_path)
    again = models.load_pretrained(tmp_path)
    assert again.config == model.config
    pixels, ids, *_ = batch(config)
    assert torch.equal(model(pixels, ids)[0], again(pixels, ids)[0])


@pytest.mark.parametrize(("name", "billions"), [("350m-imagenet256", 1.07), ("1.3b-imagenet256", 2.66)])
def test_the_papers_parameter_counts(name, billions):
    with shapes_only():
        model = JetFormer(PRESETS[f"jetformer-{name}"])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    c = model.config
    assert (c.image_size, c.tokens, c.numbers, c.head, c.vocabulary * c.repeats) == (256, 256, 768, 263_168, 16_048)


def test_presets():
    assert {name for name in PRESETS if "text256" in name} == {
        f"jetformer-{s}-text256" for s in ("350m", "750m", "1.3b")
    }
    assert {name: PRESETS[name].image_size for name in PRESETS if "tiny" in name} == {
        "jetformer-tiny": 32,
        "jetformer-tiny-classes": 32,
        "jetformer-tiny-64": 64,
    }


def test_fitted_components():
    """The first components of patches with one loud direction are that direction; whitened codes have variance one."""
    g = torch.Generator().manual_seed(0)
    loud = torch.randn(48, generator=g).view(3, 4, 4)
    pixels = 0.1 * torch.randn(400, 3, 4, 4, generator=g) + torch.randn(400, 1, 1, 1, generator=g) * loud / loud.norm()
    pca = PatchPca(PatchPcaConfig((4, 4), 6)).fit(pixels)
    direction = (loud / loud.norm()).permute(1, 2, 0).flatten()
    assert abs(float(pca.components[0] @ direction)) > 0.99
    codes, _ = pca.encode(pixels)
    torch.testing.assert_close(codes.flatten(0, 1).T.cov(), torch.eye(6), rtol=0, atol=2e-3)
    torch.testing.assert_close(pca.logdet, -pca.explained_variance.log().sum() / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modelled": 49}, "modelled must be at most the 48 numbers of a token, got 49"),
        ({"mixtures": 0}, "mixtures must be a positive integer, got 0"),
        ({"vocabulary": 3}, "vocabulary must have more than the 3 special words, got 3"),
        ({"patch": 2}, "flow must have patch 1 and 12 channels, got 1 and 48"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"pca": PatchPcaConfig((4, 4), 48, groups=2)}, "pca must have patches of 4 x 4 in one group"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_bad_input():
    model, (pixels, ids, *_) = build(), batch(CONFIG)
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, 8, 8\], B > 0, got \[3, 3, 8, 9\]"):
        model(torch.zeros(3, 3, 8, 9), ids)
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, 8, 8\], B > 0, got \[0, 3, 8, 8\]"):
        model.encode(pixels[:0])
    with pytest.raises(TypeError, match="pixels must be float64"):
        model.encode(pixels.to(torch.uint8))
    with pytest.raises(ValueError, match="ids must be from 0 to 22, got 23"):
        model(pixels, ids + 23 - ids.max())
    with pytest.raises(ValueError, match=r"ids must be \[B, L\] with L from 1 to 4, got \[3, 5\]"):
        model(pixels, torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        model(pixels, ids.float())
    with pytest.raises(ValueError, match=r"soft must have shape \[2, 4, 5\], got \[3, 4, 5\]"):
        model(pixels, ids[:2])
    with pytest.raises(ValueError, match=r"lengths must have shape \[3\], got \[2\]"):
        model(pixels, ids, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"ids must be \[B, L\] with B > 0, got \[0, 4\]"):
        sampling.sample(model, ids[:0])
    for run in (lambda n: model(pixels, ids, n), lambda n: sampling.sample(model, ids, n)):
        with pytest.raises(ValueError, match="lengths must be from 1 to 4, got 5"):
            run(torch.tensor([1, 5, 2]))
        with pytest.raises(TypeError, match="lengths must be int32 or int64, got"):
            run(torch.ones(3))
    with pytest.raises(TypeError, match="text_first must be bool, got"):
        model(pixels, ids, None, torch.ones(3, dtype=torch.long))
    for name, value in (("guidance", -1.0), ("guidance", float("nan"))):
        with pytest.raises(ValueError, match=name):
            sampling.sample(model, ids, **{name: value})
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        sampling.caption(model, pixels, temperature=-1.0)
    with pytest.raises(ValueError, match="model must have texts that stand once in a row, got 3 repeats of classes"):
        sampling.caption(build(VARIANTS["classes"]), pixels)
    with pytest.raises(ValueError, match="components must be 1 to 48, got 49"):
        PatchPcaConfig((4, 4), 49)
    with pytest.raises(ValueError, match="groups must divide the 6 components, got 4"):
        PatchPcaConfig((4, 4), 6, groups=4)
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, H, W\] of whole patches of 4 x 4"):
        PatchPca(PatchPcaConfig((4, 4), 6)).encode(torch.zeros(1, 3, 6, 8))


def test_pictures_have_the_range_of_pictures():
    """Samples of a model that knows nothing yet: whatever it draws, pixels are in [-1, 1] and not all the same."""
    torch.manual_seed(0)
    model = JetFormer(CONFIG).eval()
    pixels = sampling.sample(model, model.unlabelled(2))
    assert pixels.shape == (2, 3, 8, 8) and float(pixels.abs().max()) <= 1 and float(pixels.std()) > 0.1
    assert flows.quantise(pixels).dtype == torch.uint8


def test_benchmark_compares_the_same():
    """A token from the cache and from whole rows, again and again; what is weighed is what is there."""
    model = build(VARIANTS["classes"])
    for place in (1, 3):
        event = bench.event(model, "token", 2, place)
        calls = [make() for make in event.enter(torch.float32).values()]
        for call in (*calls, *calls):
            assert_close(call(), event.truth().float(), 1e-5)
    layers = sum(p.numel() for layer in model.language.model.layers for p in layer.parameters() if p.dim() == 2)
    keys = 4 * 2 * 2 * 8 * (3 + 2 + 3)
    assert bench.bytes_of_step(model.config, 2, 3, torch.float32) == 4 * (
        layers + model.image_head.weight.numel() + keys
    )
