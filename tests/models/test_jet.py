"""Jet: what it refuses, its presets, invertible training, round trips, files."""

import dataclasses

import flow_memory
import pytest
import torch

from vlkern import flows, models
from vlkern.layers.flow import SPLITS, channel_order, cosines, to_pixels, to_tokens, token_order
from vlkern.layers.init import shapes_only
from vlkern.models.jet import PRESETS, Jet, JetConfig

#: Five couplings, one of them spatial.
SMALL = JetConfig(8, 2, depth=5, block_depth=1, width=16, heads=2)


def trained_like(config: JetConfig) -> Jet:
    """A flow whose couplings do something, as after training."""
    torch.manual_seed(0)
    model = Jet(config)
    for coupling in model.couplings:
        torch.nn.init.normal_(coupling.network.final_proj.weight, std=0.1)
        torch.nn.init.normal_(coupling.network.final_proj.bias, std=0.3)
    return model


def test_begins_as_the_identity():
    x = torch.randn(3, 16, 12)
    for scale in (1.5, 2.0, 4.0):
        z, logdet = Jet(dataclasses.replace(SMALL, max_scale=scale))(x)
        assert torch.allclose(z, x, atol=1e-5) and logdet.abs().max() < 1e-3


@pytest.mark.parametrize(("name", "millions"), [("jet-imagenet64-32x2", 207), ("jet-imagenet64-64x5", 1020)])
def test_presets(name, millions):
    """All couplings have the same size, so one is enough."""
    config = PRESETS[name]
    with shapes_only():
        model = Jet(dataclasses.replace(config, depth=1))
    assert round(config.depth * sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert [config.kind(i) for i in range(10)] == [*["channels"] * 4, SPLITS[0], *["channels"] * 4, SPLITS[1]]
    assert name in models.list_models()


def gradients(model: Jet, x: torch.Tensor, context: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    inputs = {name: t.clone().requires_grad_() for name, t in (("x", x), ("context", context)) if t is not None}
    model.bits(inputs["x"], inputs.get("context")).mean().backward()
    found = {name: t.grad for name, t in [*model.named_parameters(), *inputs.items()]}
    model.zero_grad()
    return found


@pytest.mark.parametrize("context", [None, 10])
def test_invertible_training_has_the_same_gradients(context):
    """In float64 to its rounding, so it is the same function; in float32 to what the inverse of the flow loses."""
    plain = trained_like(dataclasses.replace(SMALL, context=context))
    other = Jet(dataclasses.replace(plain.config, invertible=True))
    other.load_state_dict(plain.state_dict())
    x, given = torch.randn(3, 16, 12), None if context is None else torch.randn(3, 4, context)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        arguments = x.to(dtype), None if given is None else given.to(dtype)
        expected, got = (gradients(model.to(dtype), *arguments) for model in (plain, other))
        assert all(g is not None for g in got.values())
        span = max(float(g.abs().max()) for g in expected.values())
        assert max(float((got[name] - g).abs().max()) for name, g in expected.items()) <= bound * span


def test_invertible_training_under_autocast_and_with_frozen_parameters():
    plain = trained_like(SMALL)
    other = Jet(dataclasses.replace(SMALL, invertible=True))
    other.load_state_dict(plain.state_dict())
    x, found = torch.randn(3, 16, 12), []
    for model in (plain, other):
        model.couplings[2].requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.bits(x).mean()
        loss.backward()
        assert all((p.grad is None) == (name.startswith("couplings.2.")) for name, p in model.named_parameters())
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, expected), (again, got) = found
    assert torch.equal(loss, again)
    span = max(float(g.abs().max()) for g in expected)
    assert max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) <= 0.02 * span


def test_invertible_training_needs_no_more_memory_for_more_couplings():
    few, many = (flow_memory.saved_bytes(SMALL, depth) for depth in (2, 8))
    assert many["plain"] - few["plain"] > 2 * few["plain"]
    assert many["invertible"] == few["invertible"] < few["plain"] / 10


def test_round_trip():
    model = trained_like(SMALL)
    errors = flows.round_trip(model, torch.randn(4, 16, 12))
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.5), (torch.float16, 0.1)):
        assert 0 < errors[dtype].mean < errors[dtype].largest < bound
    assert errors[torch.float32].logdet < 1e-3
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_levels_and_bits():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    pixels[0, 0, 0] = 255
    x = flows.dequantise(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(flows.quantise(x), pixels)
    # A flow that stretches each level to 1 knows nothing about noise that is uniform on [0, 256).
    z = torch.zeros(2, 192)
    exact = -torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) / 192 / torch.log(torch.tensor(2.0))
    assert torch.allclose(flows.bits_per_dim(z, torch.zeros(2), step=1.0), exact)
    assert torch.allclose(flows.bits_per_dim(z, torch.full((2,), 192 * 127.5).log() * 0), exact + 6.994353, atol=1e-4)
    with pytest.raises(TypeError, match="pixels must be uint8"):
        flows.dequantise(x)
    with pytest.raises(ValueError, match=r"z must be \[B, \.\.\.\]"):
        flows.bits_per_dim(torch.zeros(0, 4), torch.zeros(0))


def test_tokens_and_orders():
    x = torch.randn(2, 3, 8, 12)
    tokens = to_tokens(x, 4)
    assert torch.equal(tokens[1, 4], x[1, :, 4:, 4:8].permute(1, 2, 0).flatten())
    assert torch.equal(to_pixels(tokens, 2, 3, 4), x)
    flow = Jet(dataclasses.replace(SMALL, basis="cosines"))
    pixels = torch.rand(2, 3, 8, 8)
    waves = flow.tokens(pixels)
    assert torch.allclose(waves, to_tokens(pixels, 2) @ cosines(2, 3).T)
    assert torch.allclose(flow.pixels(waves), pixels, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.tokens(pixels), waves)
    flat = flow.tokens(torch.full((1, 3, 8, 8), 0.5))
    assert torch.allclose(flat[..., :1], torch.tensor(0.5 * 12**0.5)) and flat[..., 1:].abs().max() < 1e-6
    assert sorted(channel_order(48).tolist()) == list(range(48))
    with pytest.raises(ValueError, match="multiples of the patch 5"):
        to_tokens(x, 5)
    with pytest.raises(ValueError, match="tokens must be"):
        to_pixels(tokens, 2, 2, 4)
    with pytest.raises(ValueError, match="channels must be even, got 3"):
        channel_order(3)
    with pytest.raises(ValueError, match="two equal halves, got 3 x 4"):
        token_order(3, 4, "hstripes")
    with pytest.raises(ValueError, match="split must be one of"):
        token_order(4, 4, "rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "image_size must be a multiple of patch, got 8 and 3"),
        ({"patch": 1}, "tokens of an even size, got 3"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"kinds": ("rows",)}, "kinds must be a tuple of channels, spatial"),
        ({"splits": ()}, "splits must be a tuple of checkerboard"),
        ({"basis": "sines"}, "basis must be one of pixels, cosines, got 'sines'"),
        ({"max_scale": 0.0}, "max_scale must be a positive finite number, got 0.0"),
        ({"patch": 8}, "an even number of tokens to spatial couplings, got 1"),
        ({"context": -1}, "context must be a positive integer, got -1"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_bad_input():
    model, other = Jet(SMALL), Jet(dataclasses.replace(SMALL, context=10))
    with pytest.raises(ValueError, match=r"x must be \[B, 16, 12\] with B > 0, got \[0, 16, 12\]"):
        model(torch.zeros(0, 16, 12))
    with pytest.raises(ValueError, match=r"z must be \[B, 16, 12\]"):
        model.inverse(torch.zeros(1, 12, 16))
    with pytest.raises(TypeError, match="x must be float64"):
        model(torch.zeros(1, 16, 12, dtype=torch.int32))
    with pytest.raises(ValueError, match="context must be None"):
        model(torch.zeros(1, 16, 12), torch.zeros(1, 4, 10))
    with pytest.raises(ValueError, match=r"context must be \[B, M, 10\]"):
        other(torch.zeros(1, 16, 12))
    with pytest.raises(ValueError, match=r"context must be \[1, M, 10\]"):
        other(torch.zeros(1, 16, 12), torch.zeros(2, 4, 10))
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, 8, 8\]"):
        model.tokens(torch.zeros(1, 3, 8, 4))


def test_files(tmp_path):
    model = trained_like(dataclasses.replace(SMALL, context=10, invertible=True, basis="cosines"))
    models.save_pretrained(model, tmp_path)
    again = models.load_pretrained(tmp_path)
    assert again.config == model.config
    expected = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype, name
