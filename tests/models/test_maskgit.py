"""MaskGIT: against a plain restatement, sizes of the paper, the loss, and what decoding commits when."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlkern import models
from vlkern.bench.maskgit import Plain, event
from vlkern.generation.maskgit import Sampler, masked_counts, masked_part, sample
from vlkern.layers.init import shapes_only
from vlkern.models.maskgit import PRESETS, MaskGit, MaskGitConfig
from vlkern.recipes.maskgit import training_mask
from vlkern.testing import record

CONFIG = MaskGitConfig(24, 3, 3, 40, tokens=9, codes=20, classes=4, image_size=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = MaskGit(CONFIG)
    with torch.no_grad():
        for p in made.parameters():  # logits far apart, biases that count
            p.add_(torch.randn_like(p), alpha=0.2)
    return made


def half_filled(c, batch=3):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(c.codes, (batch, c.tokens), generator=g)
    masked = torch.rand(ids.shape, generator=g) < 0.6
    return ids, masked, torch.tensor([2, 0, c.classes])[:batch]


def restated_loss(plain, ids, labels, masked, smoothing):
    """Formula by formula: one-hot targets over everything, smoothed; a mean by example, then over examples."""
    c = plain.config
    given = ids.masked_fill(masked, c.mask)
    x = F.embedding(torch.cat([(labels + c.codes)[:, None], given], 1), plain.embedding.weight)
    x = plain.norm(x + plain.positions.weight)
    for block in plain.blocks:
        x = block(x)
    x = plain.head_norm(F.gelu(plain.dense(x), approximate="tanh"))
    log_p = (x @ plain.embedding.weight.T + plain.bias)[:, 1:].log_softmax(-1)
    target = F.one_hot(ids, c.vocabulary) * (1 - smoothing) + smoothing / c.vocabulary
    losses = -(target * log_p).sum(-1)
    return ((losses * masked).sum(1) / masked.sum(1)).mean()


@pytest.mark.parametrize("places", [False, True])
def test_logits_are_those_of_a_plain_restatement(model, places):
    plain = Plain(model)
    ids, masked, labels = half_filled(CONFIG)
    given = ids.masked_fill(masked, CONFIG.mask)
    want = plain(given, labels)
    if places:
        where = torch.tensor([[3, 0], [8, 1], [2, 5]])
        ours, want = model(given, labels, where), want.gather(1, where[..., None].expand(-1, -1, CONFIG.codes))
    else:
        ours = model(given, labels)
    assert want.std() > 0.5
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_loss_and_its_gradients_are_those_of_a_plain_restatement(model):
    plain = Plain(model).requires_grad_()
    ids, masked, labels = half_filled(CONFIG)
    ours, theirs = model.loss(ids, labels, masked), restated_loss(plain, ids, labels, masked, 0.1)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    gradients = dict(model.named_parameters())
    pairs = [
        ("token_embedding.weight", plain.embedding.weight), ("position_embedding.weight", plain.positions.weight),
        ("head.weight", plain.dense.weight), ("head_bias", plain.bias),
        ("layers.0.fc1.weight", plain.blocks[0].fc1.weight),
        ("layers.2.attention.out_proj.bias", plain.blocks[2].out.bias),
    ]  # fmt: skip
    for name, theirs in pairs:
        torch.testing.assert_close(gradients[name].grad, theirs.grad, rtol=1e-3, atol=1e-6)
    qkv = torch.cat([getattr(plain.blocks[2], n).weight.grad for n in "qkv"])
    torch.testing.assert_close(gradients["layers.2.attention.qkv_proj.weight"].grad, qkv, rtol=1e-3, atol=1e-6)


def test_each_picture_counts_the_same_and_only_masked_tokens_do(model):
    ids, masked, labels = half_filled(CONFIG)
    apart = torch.stack([model.loss(ids[i, None], labels[i, None], masked[i, None]) for i in range(3)])
    torch.testing.assert_close(model.loss(ids, labels, masked), apart.mean())
    nothing = torch.zeros_like(masked)
    assert model.loss(ids, labels, nothing) == 0
    with pytest.raises(TypeError, match="masked must be bool, got"):
        model.loss(ids, labels, masked.long())


def test_parameters_of_the_papers():
    """The sheet's 172.5 M are those of 256 tokens; 768 more positions for 512 pixels."""
    with shapes_only():
        count = {name: sum(p.numel() for p in models.create(name).parameters()) for name in PRESETS}
    assert round(count["maskgit-imagenet256"] / 1e6, 1) == 172.5
    assert count["maskgit-imagenet512"] - count["maskgit-imagenet256"] == 768 * 768
    assert count["maskgit-imagenet256"] - count["maskgit-fsq-imagenet256"] == 24 * 769
    assert count["maskgit-tiny"] < 3e6
    c = PRESETS["maskgit-imagenet256"]
    assert (c.vocabulary, c.mask) == (2025, 2024)


def test_schedules():
    assert masked_counts(256, 8) == [251, 236, 212, 181, 142, 97, 49, 1]
    assert masked_counts(256, 12) == [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 1]
    assert masked_counts(3, 5) == [2, 1, 1, 1, 1]
    assert masked_part(0.25, "uniform") == 0.75 and masked_part(0.5, "pow:2") == 0.75
    assert masked_part(0.25, "log", 256) == 0.25 and masked_part(0.5, "exp", 256) == 1 - 1 / 16
    for name in ("cosine", "uniform", "pow:3", "log", "exp"):
        parts = [masked_part(r / 10, name) for r in range(11)]
        assert parts[-1] == 1e-6 and 0.99 < parts[0] <= 1 and parts == sorted(parts, reverse=True)
    for bad in ("sine", "pow:0", "pow:x"):
        with pytest.raises(ValueError, match="schedule must be one of cosine"):
            masked_part(0.5, bad)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 2"):
        masked_part(2)


def test_masks_of_the_training():
    """Between 45 % and all of the tokens, spread as the sheet's formula has it; each token as often as any other."""
    g = torch.Generator().manual_seed(0)
    masks = training_mask(torch.linspace(0, 0.9999, 2000), torch.rand(2000, 64, generator=g))
    counts = masks.sum(1)
    assert counts.min() == math.ceil(0.45 * 64) and counts.max() == 64
    lowest = 1 - math.acos(0.45) * 2 / math.pi
    r = lowest + (1 - lowest) * torch.linspace(0, 0.9999, 2000).double()
    assert abs(counts.double().mean() - (64 * torch.cos(math.pi / 2 * (1 - r))).mean() - 0.5) < 0.1
    assert masks.double().mean(0).std() < 0.02


def official(model, labels, sampler, noise, known=None):
    """The loop as the sheet has it, all logits in every step, by numbers that are given."""
    c, steps = model.config, sampler.steps
    ids = torch.full((len(labels), c.tokens), c.mask) if known is None else known
    first, masked_after = (ids == c.mask).sum(1), []
    for t in range(steps):
        logits = model(ids, labels)
        a = sampler.guidance * t / (steps - 1)
        logits = logits + a * (logits - model(ids, torch.full_like(labels, c.classes)))
        p = logits.double().softmax(-1)
        drawn = (p.cumsum(-1) <= noise[t, ..., :1]).sum(-1).clamp(max=c.codes - 1)
        unknown = ids == c.mask
        sampled = torch.where(unknown, drawn, ids)
        ratio = (t + 1) / steps
        m = (first * max(1e-6, math.cos(math.pi / 2 * ratio))).floor().long()
        m = torch.minimum(unknown.sum(1) - 1, m).clamp(min=1)
        gumbel = -(-noise[t, ..., 1].clamp(2.0**-32).log()).log()
        conf = p.gather(-1, sampled[..., None])[..., 0].log().masked_fill(~unknown, math.inf)
        conf = conf + sampler.temperature * (1 - ratio) * gumbel
        cut = conf.sort(-1).values.gather(1, m[:, None])
        masked_after.append((conf < cut).sum(1).tolist())
        ids = torch.where(conf < cut, c.mask, sampled)
    return sampled, masked_after


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("painted", [False, True])
def test_decoding_is_the_official_loop(model, guidance, painted):
    c, labels = CONFIG, torch.tensor([1, 3, 0, 4, 2, 2])
    sampler = Sampler(steps=5, guidance=guidance, generator=torch.Generator().manual_seed(5))
    known = None
    if painted:
        ids, _, _ = half_filled(c, 3)
        known = ids.repeat(2, 1)
        known[:, 2:] = c.mask
        known[3, :8] = ids[0, :8]  # one token is left
    with record() as calls:
        ours = sample(model, labels, sampler, known)
    noise = torch.rand(5, 6, c.tokens, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs, masked_after = official(model, labels, sampler, noise, known)
    assert torch.equal(ours, theirs)
    if not painted:
        assert [row[0] for row in masked_after] == masked_counts(c.tokens, 5)
    else:
        assert torch.equal(ours[:, :2], known[:, :2])
    steps = [call for call in calls if "masked_decode_step" in str(call.op)]
    assert len(steps) == 5 and {call.backend for call in steps} == {"cpu"}
    width = [call.args[0].shape[1] for call in steps]
    assert width == ([9] * 5 if painted else [9, *masked_counts(9, 5)[:-1]])


def test_a_sample_depends_on_its_label(model):
    """The logits of the first step, where all is masked, are a function of the class alone; so are frequencies."""
    labels = torch.full((400,), 2)
    ids = sample(model, labels, Sampler(steps=1, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        p = model(torch.full((1, 9), CONFIG.mask), labels[:1])[0].softmax(-1)
    found = F.one_hot(ids, CONFIG.codes).double().mean(0)
    assert ((found - p).abs() < 4.5 * (p * (1 - p) / 400).sqrt() + 1e-3).all()


def test_bfloat16(model):
    ids, masked, labels = half_filled(CONFIG)
    given = ids.masked_fill(masked, CONFIG.mask)
    low = MaskGit(CONFIG).to(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    with torch.no_grad():
        error = (low(given, labels).float() - model(given, labels)).norm() / model(given, labels).norm()
    assert error < 0.05
    assert sample(low, labels, Sampler(steps=3, guidance=1.0)).max() < CONFIG.codes


def test_a_model_is_saved_and_loaded(model, tmp_path):
    models.save_pretrained(model, tmp_path)
    again = models.load_pretrained(tmp_path)
    assert isinstance(again, MaskGit) and again.config == CONFIG
    ids, _, labels = half_filled(CONFIG)
    assert torch.equal(again(ids, labels), model(ids, labels))


def test_bad_input(model):
    ids, _, labels = half_filled(CONFIG)
    bad = [
        (TypeError, "ids must be int64, got torch.int32", lambda: model(ids.int(), labels)),
        (ValueError, r"ids must have shape \[any, 9\], got \[3, 8\]", lambda: model(ids[:, 1:], labels)),
        (ValueError, r"ids must be in \[0, 20\) or 24, got 21", lambda: model(ids * 0 + 21, labels)),
        (ValueError, r"labels must have shape \[3\], got \[2\]", lambda: model(ids, labels[1:])),
        (ValueError, r"labels must be in \[0, 5\), got 5", lambda: model(ids, labels * 0 + 5)),
        (ValueError, r"places must be in \[0, 9\), got 9", lambda: model(ids, labels, ids * 0 + 9)),
        (ValueError, "ids must hold a picture at least", lambda: model.loss(ids[:0], labels[:0], ids[:0] > 0)),
        (ValueError, "heads must share the width", lambda: replace(CONFIG, heads=2)),
        (ValueError, "codes must be a positive integer, got 0", lambda: replace(CONFIG, codes=0)),
        (ValueError, "steps must be a positive integer, got 0", lambda: Sampler(steps=0)),
        (ValueError, "guidance must be at least 0, got -1", lambda: Sampler(guidance=-1)),
        (ValueError, r"known must have shape \[3, 9\], got \[3, 8\]",
         lambda: sample(model, labels, known=ids[:, 1:])),
        (ValueError, r"labels must have shape \[B\], got \[3, 1\]", lambda: sample(model, labels[:, None])),
    ]  # fmt: skip
    for error, message, call in bad:
        with pytest.raises(error, match=message):
            call()


def test_the_race_is_fair(monkeypatch):
    """Both give the same logits first, and pictures then; the rival's tokens are all known in the end."""
    monkeypatch.setitem(PRESETS, "small", CONFIG)
    race = event("small", 2, 3, 1.0)
    truth = race.truth()
    for name, make in race.enter(torch.float32).items():
        call = make()
        torch.testing.assert_close(call(), truth.float(), rtol=1e-4, atol=1e-4)
        ids = call()
        assert ids.shape == (2, 9) and ids.max() < CONFIG.codes, name
