"""SigLIP against implementations that this project did not write, with random weights: outputs and all gradients."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peers import CONFIGS, load, open_clip_model, randomize, timm_tower, transformers_config
from safetensors.torch import save_file

from vlkern import models
from vlkern.models.siglip import Siglip, SiglipConfig, VisionTower
from vlkern.testing import assert_as_good, assert_same_direction, direction

EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def _inputs(c: SiglipConfig, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.rand(batch, 3, *c.vision.image_size, generator=generator) * 2 - 1
    return pixels, torch.randint(c.text.vocabulary, (batch, c.text.length), generator=generator)


def _run(model, call, pixels, ids):
    """Outputs, and the gradients of a sum that weighs every output differently."""
    outputs = call(model, pixels, ids)
    generator = torch.Generator().manual_seed(6)
    total = sum((out.double() * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    total.backward()
    return [out.detach() for out in outputs], {name: p.grad for name, p in model.named_parameters()}


def _theirs(model, pixels, ids):
    out = model(input_ids=ids, pixel_values=pixels)
    return out.image_embeds, out.text_embeds, out.logits_per_text


def _ours(model, pixels, ids):
    image, text = model(pixels, ids)
    return image, text, model.logit_scale.exp() * text @ image.T + model.logit_bias


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers(config, dtype):
    transformers = load("transformers")
    theirs = randomize(transformers.SiglipModel(transformers_config(config))).to(dtype)
    ours = Siglip(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())  # strict: exactly their names and shapes
    pixels, ids = _inputs(config)
    pixels = pixels.to(dtype)
    exact, exact_gradients = _run(copy.deepcopy(theirs).double(), _theirs, pixels.double(), ids)
    low, low_gradients = _run(theirs, _theirs, pixels, ids)
    got, gradients = _run(ours, _ours, pixels, ids)
    for ours_, low_, exact_ in zip(got, low, exact, strict=True):
        # Our embeddings are normalised in float32.
        assert_as_good(ours_.to(dtype), low_, exact_)
    # The smallest gradients are differences of large numbers: errors count against the largest gradient of the model.
    largest = max(g.abs().max() for g in exact_gradients.values())
    assert gradients.keys() == exact_gradients.keys()
    for name, exact_ in exact_gradients.items():
        assert_as_good(gradients[name], low_gradients[name], exact_, slack=4.0, magnitude=largest / 8)
        if dtype == torch.float32:
            assert_same_direction(gradients[name], low_gradients[name], exact_)
    # In bfloat16 the gradient of one small parameter is a matter of luck; that of all of them is not.
    whole = [torch.cat([g[name].flatten().double() for name in gradients]) for g in (gradients, low_gradients)]
    exact_whole = torch.cat([exact_gradients[name].flatten() for name in gradients])
    (cosine, bias), (low_cosine, _) = (direction(g, exact_whole) for g in whole)
    assert 1 - cosine <= 4 * (1 - low_cosine) + 1e-6
    assert abs(bias) < 0.02


def _dense_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@EACH
def test_timm(config, tmp_path):
    theirs = randomize(timm_tower(config.vision))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = models.load_pretrained(tmp_path / "model.safetensors", config=config.vision)
    assert isinstance(ours, VisionTower)
    pixels, _ = _inputs(config)
    theirs_out, ours_out = theirs(pixels), ours(pixels)
    _dense_equal(ours_out, theirs_out)
    theirs_out.square().sum().backward()
    ours_out.square().sum().backward()
    fused = ours.head.attention.in_proj_weight.grad
    _dense_equal(fused, torch.cat((theirs.attn_pool.q.weight.grad, theirs.attn_pool.kv.weight.grad)))
    attention = ours.encoder.layers[0].self_attn
    parts = [getattr(attention, f"{letter}_proj").weight.grad for letter in "qkv"]
    expected = theirs.blocks[0].attn.qkv.weight.grad
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=float(1e-5 * expected.abs().max()))


@EACH
def test_open_clip(config, tmp_path):
    theirs = randomize(open_clip_model(config))
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    ours = models.load_pretrained(tmp_path, config=config)
    assert ours.config == config
    pixels, ids = _inputs(config)
    with torch.no_grad():
        image, text, scale = theirs(pixels, ids)[:3]
        _dense_equal(ours.encode_image(pixels), image)
        _dense_equal(ours.encode_text(ids), text)
        _dense_equal(ours.logit_scale.exp(), scale.reshape(1))
    assert torch.equal(ours.logit_bias, theirs.logit_bias.reshape(1))


def test_open_clip_without_a_text_projection(tmp_path):
    """siglip-so400m-patch16-256-i18n, but small."""
    config = next(c for c in CONFIGS.values() if c.text.width == c.vision.width)
    config = replace(config, text=replace(config.text, vocabulary=models.siglip.MULTILINGUAL))
    theirs = randomize(open_clip_model(config))
    theirs.text.text_projection = None
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / "all.safetensors")
    ours = models.load_pretrained(tmp_path / "all.safetensors", config=config)
    with torch.no_grad():
        _dense_equal(ours.encode_text(_inputs(config)[1]), theirs(*_inputs(config))[1])


def test_heads_of_known_widths(tmp_path):
    """timm's and open_clip's files say how wide a tower is; the presets know the number of heads."""
    config = models.siglip.PRESETS["siglip-tiny"]
    theirs = timm_tower(config.vision)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = models.load_pretrained(tmp_path / "model.safetensors")
    assert ours.config == config.vision
    pixels, _ = _inputs(config)
    with torch.no_grad():
        _dense_equal(F.normalize(ours(pixels)), F.normalize(theirs.eval()(pixels)))
