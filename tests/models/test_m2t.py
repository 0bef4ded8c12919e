"""M2T and MT: schedules of the paper, steps against one pass, same bits on both ends, what is coded when, FLOPs."""

import math
from dataclasses import replace
from decimal import Decimal, getcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlkern import models, ops
from vlkern.bench.m2t import decode, decode_masked, event, flops
from vlkern.kernels.interval_attention import samples as interval_attention
from vlkern.layers.init import shapes_only
from vlkern.models.elic import ElicConfig
from vlkern.models.m2t import M2T, PRESETS, M2TConfig, StepCache
from vlkern.models.mt import MaskedSteps, expected_bits
from vlkern.models.schedules import groups, low_discrepancy

CONFIG = M2TConfig(
    channels=8, width=48, depth=2, heads=3, mlp=64, tile=6, steps=4, lambdas=(0.002, 0.01),
    transforms=ElicConfig((8, 12, 16), (1, 1, 1), attention=True),
)  # fmt: skip


def made(config):
    """With parameters that count: fresh heads are nearly constant."""
    torch.manual_seed(0)
    model = M2T(config)
    with torch.no_grad():
        for p in model.entropy.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return made(CONFIG)


@pytest.fixture(scope="module")
def masked():
    return made(replace(CONFIG, bidirectional=True))


def symbols(tiles=3, config=CONFIG):
    g = torch.Generator().manual_seed(1)
    return torch.randn(tiles, config.tokens, config.channels, generator=g).mul(4).round()


def stepwise(model, tokens, level=2, known=None):
    """What coding does: groups one after the other -> parameters [T, N, 3, K, C]."""
    cache, end, found = StepCache(model.entropy, len(tokens), model.quality(level).detach()), 0, []
    previous = None
    for n in model.config.groups:
        there = None if known is None or previous is None else known[:, previous]
        found.append(cache.advance(None if previous is None else tokens[:, previous], there))
        previous = slice(end, end + n)
        end += n
    return torch.cat(found, 1)


# ---- schedules


def exact_order(side):
    """By 60 decimals: the order, and how many points it takes."""
    getcontext().prec = 60
    g = Decimal(1)
    for _ in range(200):
        g = (g + 1) ** (Decimal(1) / 3)
    a, n, found = (1 / g, 1 / g**2), 0, {}
    while len(found) < side**2:
        n += 1
        found.setdefault(tuple(int((Decimal("0.5") + n * x) % 1 * side) for x in a))
    return tuple(found), n


@pytest.mark.parametrize(
    ("side", "start", "draws"),
    [
        (24, ((6, 1), (0, 15), (18, 5), (12, 18), (6, 8), (0, 22), (18, 11), (12, 1)), 1209),
        (16, ((4, 1), (0, 10), (12, 3), (8, 12), (4, 5), (0, 14), (12, 7), (8, 0)), 610),
        (1, ((0, 0),), 1),
    ],
)
def test_order_is_the_low_discrepancy_sequence(side, start, draws):
    order = low_discrepancy(side)
    assert (order, draws) == exact_order(side) and order[:8] == start
    assert sorted(order) == [(row, column) for row in range(side) for column in range(side)]


@pytest.mark.parametrize(
    "sizes",
    [
        (125, 451),
        (27, 98, 181, 270),
        (6, 21, 40, 58, 80, 101, 123, 147),
        (2, 9, 16, 24, 33, 41, 51, 60, 70, 80, 90, 100),
    ],
)
def test_groups_of_the_paper(sizes):
    assert groups(576, len(sizes), 2.2) == sizes and sum(sizes) == 576
    assert replace(PRESETS["m2t-base"], steps=len(sizes)).groups == sizes


def test_one_token_at_a_time_and_what_is_refused():
    assert groups(16, 16, 1.0) == (1,) * 16 and groups(16, 1, 2.2) == (16,)
    with pytest.raises(ValueError, match=r"alpha 0.5 with 4 steps gives groups that are empty or decrease: \(288"):
        groups(576, 4, 0.5)
    with pytest.raises(ValueError, match="steps must be from 1 to the number of tokens, got 17 for 16"):
        groups(16, 17, 1.0)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        groups(16, 4, 0)
    with pytest.raises(ValueError, match="side must be positive, got 0"):
        low_discrepancy(0)


# ---- M2T


@pytest.mark.parametrize("edge", [False, True])
def test_steps_give_what_one_pass_gives(model, edge):
    tokens = symbols()
    known = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.7 if edge else None
    steps = stepwise(model, tokens, known=known)
    with torch.no_grad():
        once = model.entropy(tokens, model.quality(2), known)
    assert steps.shape == once.shape == (3, 36, 3, 3, 8)
    torch.testing.assert_close(steps, once, rtol=1e-4, atol=1e-4)
    assert once.std() > 0.3


def test_a_group_sees_the_groups_before_it_and_no_other(model):
    """By changing one token at a time: the mask of the paper, block by block, with everything inside a block."""
    sizes = CONFIG.groups
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    tokens = symbols(1)
    with torch.no_grad():
        before = model.entropy(tokens, model.quality(1))
        for group, end in enumerate(ends):
            changed = tokens.clone()
            changed[0, end - 1] += 3
            moved = (model.entropy(changed, model.quality(1)) - before).abs().amax((0, 2, 3, 4)) > 0
            assert moved.tolist() == [place >= end for place in range(36)], group


def test_what_is_unknown_counts_for_nothing(model):
    tokens, known = symbols(2), torch.ones(2, 36, dtype=torch.bool)
    known[:, 5] = known[1, 20] = False
    other = torch.where(known.unsqueeze(-1), tokens, 1e6)
    assert torch.equal(stepwise(model, tokens, known=known), stepwise(model, other, known=known))
    assert not torch.equal(stepwise(model, tokens, known=known), stepwise(model, tokens))


@pytest.mark.parametrize("tiles", [1, 4])
def test_both_ends_compute_the_same_bits(model, tiles):
    """Encoder and decoder make the same calls: same bits, also with other numbers of threads."""
    tokens, threads = symbols(tiles), torch.get_num_threads()
    sent = stepwise(model, tokens)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(stepwise(model, tokens), sent)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(sent[:1], stepwise(model, tokens[:1]), rtol=1e-4, atol=1e-4)


def test_the_level_is_seen(model):
    with torch.no_grad():
        anchors = model.entropy.quality
        assert torch.equal(model.quality(0), anchors[0]) and torch.equal(model.quality(4), anchors[1])
        torch.testing.assert_close(model.quality(1), 0.75 * anchors[0] + 0.25 * anchors[1])
        both = model.quality(torch.tensor([1, 4]))
    assert torch.equal(both[0], model.quality(1)) and torch.equal(both[1], model.quality(4))
    assert not torch.equal(stepwise(model, symbols(1), 0), stepwise(model, symbols(1), 3))
    weights = [CONFIG.distortion_weight(level) for level in range(CONFIG.levels)]
    assert weights == pytest.approx([0.002 * 5 ** (i / 4) for i in range(5)])


def test_tiles_in_coding_order(model):
    """Of a grid that they do not fill: what is outside is zero, and said to be."""
    y = torch.arange(2.0 * 8 * 7 * 11).reshape(2, 8, 7, 11) + 1
    tokens, known = model.tiles(y)
    assert tokens.shape == (2 * 2 * 2, 36, 8) and known.sum() == 2 * 7 * 11
    for tile in range(8):
        picture, row, column = tile // 4, tile // 2 % 2, tile % 2
        for place, (i, j) in enumerate(low_discrepancy(6)):
            r, c = 6 * row + i, 6 * column + j
            inside = r < 7 and c < 11
            assert known[tile, place] == inside
            expected = y[picture, :, r, c] if inside else torch.zeros(8)
            assert torch.equal(tokens[tile, place], expected)


def test_training_counts_the_bits_of_noisy_latents_given_rounded_ones(model):
    g = torch.Generator().manual_seed(3)
    pixels, level = torch.rand(2, 3, 96, 112, generator=g) * 2 - 1, torch.tensor([1, 4])
    noise = torch.rand(2, 8, 6, 7, generator=g) - 0.5
    pictures, bits = model(pixels, level, noise)
    assert pictures.shape == pixels.shape and bits.shape == (4, 36)
    with torch.no_grad():
        for i in range(2):
            y = model.analysis(pixels[i : i + 1], int(level[i]))
            tokens, known = model.tiles(y.round())
            noisy, _ = model.tiles(y + noise[i : i + 1])
            params = model.entropy(tokens, model.quality(int(level[i])), known)
            expected = ops.mixture_bits(noisy, params).sum(-1) * known
            torch.testing.assert_close(bits[2 * i : 2 * i + 2], expected, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(pictures[i : i + 1], model.synthesis(y.round(), int(level[i])))
    (bits.mean() + pictures.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("gate" in name or "content" in name or "reduce" in name or "conv" in name for name in without)
    assert model.encoder[0].weight.grad.any() and model.log_gain.grad.any() and model.entropy.mask.grad.any()
    model.zero_grad()


# ---- MT


@pytest.mark.parametrize("schedule", ["qlds", "entropy"])
def test_mt_codes_every_token_once(masked, schedule):
    tokens = symbols(3)
    known = torch.ones(3, 36, dtype=torch.bool)
    known[2, 10:] = False
    both = []
    for _ in ("encoder", "decoder"):
        steps, seen, heard = MaskedSteps(masked.entropy, 3, masked.quality(1).detach(), schedule), [], []
        for n in CONFIG.groups:
            places, params = steps.predict()
            assert places.shape == (3, n) and params.shape == (3, n, 3, 3, 8)
            seen.append(places)
            heard.append(params)
            rows = torch.arange(3).unsqueeze(1)
            steps.reveal(tokens[rows, places], known[rows, places])
        assert torch.equal(torch.cat(seen, 1).sort(1).values, torch.arange(36).expand(3, 36))
        assert torch.equal(steps.known, known) and torch.equal(steps.tokens, tokens)
        both.append((torch.cat(seen, 1), torch.cat(heard, 1)))
    (places, params), (again, same) = both
    assert torch.equal(places, again) and torch.equal(params, same)
    different = not torch.equal(places, torch.arange(36).expand(3, 36))
    assert different == (schedule == "entropy")


def test_mt_takes_the_surest_tokens_first(masked):
    steps = MaskedSteps(masked.entropy, 2, masked.quality(1).detach(), "entropy")
    tokens = symbols(2)
    rows = torch.arange(2).unsqueeze(1)
    for n in CONFIG.groups:
        with torch.no_grad():
            everywhere = masked.entropy.forward_masked(steps.tokens, masked.quality(1), steps.known)
        bits = expected_bits(everywhere).sum(-1)
        left = ~steps.known
        places, params = steps.predict()
        assert torch.equal(params, everywhere[rows, places])
        chosen = torch.zeros_like(left).scatter(1, places, True)
        assert (chosen & ~left).sum() == 0 and chosen.sum(1).tolist() == [n, n]
        for row in range(2):
            rest = bits[row][left[row] & ~chosen[row]]
            assert not len(rest) or bits[row][chosen[row]].max() <= rest.min()
        steps.reveal(tokens[rows, places])


def test_mt_sees_both_ways_and_no_masked_token(masked):
    tokens, known = symbols(1), torch.ones(1, 36, dtype=torch.bool)
    known[0, 3] = known[0, 30] = False
    with torch.no_grad():
        before = masked.entropy.forward_masked(tokens, masked.quality(1), known)
        hidden, shown = tokens.clone(), tokens.clone()
        hidden[0, 30] += 5
        shown[0, 35] += 5
        assert torch.equal(masked.entropy.forward_masked(hidden, masked.quality(1), known), before)
        assert not torch.equal(masked.entropy.forward_masked(shown, masked.quality(1), known)[0, 3], before[0, 3])


def test_mt_is_charged_for_what_is_masked(masked):
    g = torch.Generator().manual_seed(4)
    pixels, noise = torch.rand(1, 3, 96, 96, generator=g), torch.rand(1, 8, 6, 6, generator=g) - 0.5
    known = torch.rand(1, 36, generator=g) < 0.5
    with torch.no_grad():
        _, bits = masked(pixels, torch.tensor([2]), noise, known)
        assert torch.equal(bits > 0, ~known)
        y = masked.analysis(pixels, 2)
        params = masked.entropy.forward_masked(masked.tiles(y.round())[0], masked.quality(2), known)
        expected = ops.mixture_bits(masked.tiles(y + noise)[0], params).sum(-1)
    torch.testing.assert_close(bits[~known], expected[~known], rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="known must be given for MT"):
        masked(pixels, torch.tensor([2]), noise)


def test_expected_bits_are_about_the_entropy():
    """Of rounded symbols: to a tenth of a bit where scales are no narrower than half a unit, and in order below."""
    g = torch.Generator().manual_seed(5)
    logits, means = torch.randn(2, 3, 40, generator=g)
    params = torch.stack([logits, 3 * means, torch.rand(3, 40, generator=g) * 3 - 0.7])
    integers = torch.arange(-200.0, 201.0)[:, None].expand(-1, 40)
    bits = ops.mixture_bits(integers, params.expand(401, 3, 3, 40))
    entropy = (torch.exp2(-bits) * bits * (bits < 29)).sum(0)
    assert (expected_bits(params) - entropy).abs().max() < 0.35
    assert (expected_bits(params) - entropy).abs().mean() < 0.1
    certain = torch.tensor([[0.0, 0.0], [0.0, 0.5], [math.log(0.11)] * 2])[:, None]
    torch.testing.assert_close(expected_bits(certain), torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)


def test_bad_arguments(model, masked):
    with pytest.raises(ValueError, match="schedule must be 'qlds' or 'entropy', got 'random'"):
        MaskedSteps(masked.entropy, 1, masked.quality(0), "random")
    with pytest.raises(ValueError, match="the config must have bidirectional=True"):
        MaskedSteps(model.entropy, 1, model.quality(0))
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, H, W\] with sides that 16 divides, got \[1, 3, 40, "):
        model.analysis(torch.zeros(1, 3, 40, 48), 0)
    with pytest.raises(ValueError, match="level must be from 0 to 4, got 5"):
        model.analysis(torch.zeros(1, 3, 32, 48), 5)
    with pytest.raises(ValueError, match="level must be from 0 to 4, got -1"):
        model.synthesis(torch.zeros(1, 8, 2, 3), -1)
    for change, message in (
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"lambdas": (0.1,)}, "lambdas must be at least two increasing positive numbers"),
        ({"lambdas": (0.2, 0.1)}, "lambdas must be at least two increasing positive numbers"),
        ({"steps": 37}, "steps must be from 1 to the number of tokens, got 37 for 36"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **change)


# ---- sizes


def test_presets():
    """Counted by hand for the paper's: 12 blocks, embedding, slots, 9 C outputs; 256 channels in the transforms."""
    d, c = 768, 192
    block = 4 * d * d + 4 * d + 2 * d * 3072 + 3072 + d + 4 * d
    anchors = 5 * d
    entropy = 12 * block + (c + 1) * d + c + 576 * d + anchors + 2 * d + 9 * c * (d + 1)
    with shapes_only():
        base, same, small = (models.create(name) for name in ("m2t-base", "mt-base", "m2t-small"))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(base.entropy) == count(same.entropy) == entropy
    residual = 256 * 128 + 128 + 128 * 128 * 9 + 128 + 128 * 256 + 256
    latent = c * 96 + 96 + 96 * 96 * 9 + 96 + 96 * c + c
    attention = [6 * block + width * width + width for block, width in ((residual, 256), (latent, c))]
    convolutions = 25 * 256 * (3 + 256 + 256) + 3 * 256 + 25 * 256 * c + c
    assert count(base.encoder) == convolutions + 9 * residual + sum(attention)
    assert 3.5e6 < count(small) < 5e6
    assert PRESETS["m2t-small"].levels == 21 and not base.config.bidirectional and same.config.bidirectional


class Flops(TorchDispatchMode):
    """Adds up those of linear layers and attention."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::addmm":
            self.total += 2 * args[1].numel() * args[2].shape[1]
        elif name in ("aten::linear", "vlkern::linear"):
            self.total += 2 * args[0].numel() * len(args[1])
        elif name == "vlkern::interval_attention":
            self.total += interval_attention.work(*args[:5])["flops"]
        return func(*args, **(kwargs or {}))


def counted(decoding, *args):
    with Flops() as flops:
        decoding(*args)
    return flops.total


@pytest.mark.parametrize("tiles", [1, 2])
def test_flops_are_those_of_the_formula(model, masked, tiles):
    """Cached, N tokens and half of the pairs; MT S times N tokens and N^2 pairs."""
    assert counted(decode, model, tiles, 1) == flops(CONFIG, tiles)
    assert counted(decode_masked, masked, tiles, 1) == flops(masked.config, tiles)


def test_flops_of_the_paper():
    """By hand. The groups see 55 % of all pairs; MT does more than S times as much."""
    base = PRESETS["m2t-base"]
    ends = [sum(base.groups[: i + 1]) for i in range(12)]
    pairs = sum(n * end for n, end in zip(base.groups, ends, strict=True))
    assert pairs / 576**2 == pytest.approx(0.55, abs=0.03)
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072) + 192 * 768 + 768 * 1728
    assert flops(base, 1) == 2 * 576 * weights + 12 * 4 * 768 * pairs
    assert flops(PRESETS["mt-base"], 2) == 2 * 12 * (2 * 576 * weights + 12 * 4 * 768 * 576**2)
    assert flops(PRESETS["mt-base"], 1) > 12 * flops(base, 1)


def test_benchmark_checks_both_against_float64():
    race = event("m2t-tiny", 1)
    want = race.truth()
    calls = {name: make() for name, make in race.enter(torch.float32).items()}
    assert set(calls) == {"vlkern", "MT"}
    for call in calls.values():
        torch.testing.assert_close(call().double(), want, rtol=1e-4, atol=1e-4)
        assert call().shape == (1, 16, 16)
