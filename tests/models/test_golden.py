"""Towers against the papers' JAX code: outputs and the gradient of every parameter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import Golden, assert_close, assert_gradients, text_config, vision_config
from torch import nn

import vlkern
from vlkern import models
from vlkern.interop import big_vision
from vlkern.layers.pooling import MapHead
from vlkern.models import siglip
from vlkern.models.siglip import Siglip, SiglipConfig, TextTower, VisionTower
from vlkern.models.state import NpzFile, Source


def _config(golden: Golden) -> SiglipConfig:
    c = golden.config
    return SiglipConfig(vision_config(c["image"], tuple(c["hw"])), text_config(c["text"], c["L"]))


def _renamed(sources: dict[str, Source]) -> dict[str, Source]:
    """Gradients instead of parameters: they lie under the same names."""
    return {k: Source(tuple(f"grad/{name}" for name in s.names), s.make) for k, s in sources.items()}


def test_two_towers(tmp_path):
    golden = Golden("two_towers_siglip")
    path = tmp_path / "siglip.npz"
    np.savez(path, **{k: a for k, a in golden.arrays.items() if k.startswith("params/")})
    model = models.load_pretrained(path, config=_config(golden))
    pixels, ids = golden.pixels(), golden.ids()
    assert_close(model.vision_model.tokens(pixels), golden["out/img/encoded"], 2e-5)
    assert_close(model.vision_model(pixels), golden["out/img/pre_logits"], 2e-5)
    assert_close(model.text_model.tokens(ids), golden["out/txt/transformed"], 2e-5)
    assert_close(model.text_model(ids), golden["out/txt/normalized"] * golden["out/txt/norm"], 2e-5)
    image, text = model(pixels, ids)
    assert_close(image, golden["out/zimg"], 2e-5)
    assert_close(text, golden["out/ztxt"], 2e-5)
    loss = vlkern.ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    assert_close(loss, golden["out/loss"], 2e-5)
    loss.backward()
    plan = big_vision.plan(NpzFile(path), model.config)
    assert_gradients({"model": model}, {"model": golden.state("grad/params/", _renamed(plan.sources), model)})


@pytest.mark.parametrize("vocabulary", [siglip.MULTILINGUAL, 300])
def test_two_towers_of_which_one_has_no_projection(vocabulary, tmp_path):
    """siglip-so400m-patch16-256-i18n has no text head; of any other model it would be missing."""
    golden = Golden("two_towers_siglip")
    arrays = {k: a for k, a in golden.arrays.items() if k.startswith("params/") and "txt/head" not in k}
    table = "params/txt/Embed_0/embedding"
    arrays[table] = np.resize(arrays[table], (vocabulary, arrays[table].shape[1]))
    np.savez(tmp_path / "siglip.npz", **arrays)
    c = _config(golden)
    config = replace(c, text=replace(c.text, vocabulary=vocabulary))
    if vocabulary != siglip.MULTILINGUAL:
        with pytest.raises(ValueError, match=r"2 tensors do not fit the model: missing text_model\.head\.weight"):
            models.load_pretrained(tmp_path / "siglip.npz", config=config)
        return
    model = models.load_pretrained(tmp_path / "siglip.npz", config=config)
    ids = torch.randint(vocabulary, (3, c.text.length))
    assert torch.equal(model.text_model(ids), model.text_model.tokens(ids)[:, -1])


def _vision(name: str, stacked: bool) -> tuple[Golden, VisionTower]:
    golden = Golden(name)
    tower = VisionTower(vision_config(golden.config, tuple(golden.pixels().shape[2:])))
    tower.load_state_dict(golden.state("params/", _image_sources(tower, stacked), tower))
    return golden, tower


def _image_sources(tower: VisionTower, stacked: bool) -> dict[str, Source]:
    return big_vision.image_sources(tower.config, "params/", stacked=stacked)


def test_image_tower():
    golden, tower = _vision("vit_map_learn", stacked=False)
    pixels = golden.pixels().requires_grad_()
    assert_close(tower.embeddings(pixels), golden["out/with_posemb"], 2e-5)
    assert_close(tower.tokens(pixels), golden["out/encoded"], 2e-5)
    result = tower(pixels)
    assert_close(result, golden["out/result"], 2e-5)
    (result * golden["in/cotangent"]).sum().backward()
    expected = golden.state("grad/params/", _renamed(_image_sources(tower, False)), tower)
    assert_gradients({"tower": tower}, {"tower": expected})
    assert_close(pixels.grad.permute(0, 2, 3, 1), golden["grad/image"], 5e-5)


def test_stacked_layers():
    golden, tower = _vision("scan_vit_map", stacked=True)
    assert_close(tower.tokens(golden.pixels()), golden["out/encoded"], 2e-5)
    assert_close(tower(golden.pixels()), golden["out/result"], 2e-5)

    golden = Golden("scan_text_last")
    tower = TextTower(text_config(golden.config, golden.ids().shape[1]), golden.config["num_classes"])
    tower.load_state_dict(
        golden.state("params/", big_vision.text_sources(tower.config, "params/", stacked=True), tower)
    )
    assert_close(tower.tokens(golden.ids()), golden["out/transformed"], 2e-5)
    assert_close(tower(golden.ids()), golden["out/result"], 2e-5)


def test_image_tower_without_pooling():
    golden = Golden("vit_none_head")
    c = golden.config
    tower = VisionTower(vision_config(c, tuple(c["image"])))
    head = nn.Linear(c["width"], c["num_classes"])
    sources = {name: s for name, s in _image_sources(tower, False).items() if not name.startswith("head.")}
    tower.load_state_dict(golden.state("params/", sources, tower), strict=False)
    head.load_state_dict(golden.state("params/", _head_sources(), head))
    result = head(tower.tokens(golden.pixels()))
    assert_close(result, golden["out/result"], 2e-5)
    (result * golden["in/cotangent"]).sum().backward()
    expected = {
        "tower": golden.state("grad/params/", _renamed(sources), tower),
        "head": golden.state("grad/params/", _renamed(_head_sources()), head),
    }
    assert_gradients({"tower": tower, "head": head}, expected)


def _head_sources() -> dict[str, Source]:
    return {
        "weight": Source(("params/head/kernel",), torch.t),
        "bias": Source(("params/head/bias",), lambda bias: bias),
    }


@pytest.mark.parametrize("pool", ["last", "first", "max", "map"])
def test_text_tower(pool):
    """`last` is the tower's own; the others are what a user would do with its tokens."""
    golden = Golden(f"text_{pool}")
    c = golden.config
    assert c["pool_type"] == pool
    tower = TextTower(text_config(c, c["L"]), out=c["num_classes"] or c["width"])
    sources = big_vision.text_sources(tower.config, "params/", stacked=False)
    modules: dict[str, nn.Module] = {"tower": tower}
    tables = {"tower": sources}
    if pool == "map":
        modules["map"] = MapHead(c["width"], c["mlp_dim"], c["num_heads"])
        tables["map"] = big_vision.map_sources("params/")
        for name in ("head.weight", "head.bias"):
            del sources[name]
    for key, module in modules.items():
        module.load_state_dict(golden.state("params/", tables[key], module), strict=key != "tower" or pool != "map")
    tokens = tower.tokens(golden.ids())
    assert_close(tokens, golden["out/transformed"], 2e-5)
    pools = {
        "last": lambda: tower(golden.ids()),
        "first": lambda: tower.head(tokens[:, 0]),
        "max": lambda: tower.head(tokens.amax(1)),
        "map": lambda: modules["map"](tokens),
    }
    result = pools[pool]()
    assert_close(result, golden["out/result"], 2e-5)
    (result * golden["in/cotangent"]).sum().backward()
    assert_gradients(modules, {k: golden.state("grad/params/", _renamed(tables[k]), m) for k, m in modules.items()})


def test_sizes_come_from_the_shapes(tmp_path):
    """Square pictures and stacked layers: nothing but the file is needed, and what is not a parameter is left alone."""
    golden = Golden("scan_vit_map")
    arrays = {key: array for key, array in golden.arrays.items() if key.startswith("params/")}
    table = arrays["params/pos_embedding"]
    arrays["params/pos_embedding"] = table[:, [0, 1, 2, 3]]
    np.savez(tmp_path / "tower.npz", **arrays, **{"opt/count": np.array(3)})
    tower = models.load_pretrained(tmp_path / "tower.npz")
    assert isinstance(tower, VisionTower)
    assert tower.config == vision_config(golden.config, (16, 16))

    c = _config(Golden("two_towers_siglip"))
    arrays = Golden("two_towers_siglip").arrays
    both = {key.removeprefix("params/"): array for key, array in arrays.items() if key.startswith("params/")}
    both["img/pos_embedding"] = both["img/pos_embedding"][:, :4]
    np.savez(tmp_path / "both.npz", **both)
    model = models.load_pretrained(tmp_path / "both.npz", image_size=(24, 40))
    assert isinstance(model, Siglip)
    assert model.config.text == c.text
    assert model.config.vision == vision_config(Golden("two_towers_siglip").config["image"], (24, 40))


def test_bfloat16(tmp_path):
    """NumPy has no bfloat16: big_vision's files hold two bytes without a type."""
    golden = Golden("scan_vit_map")
    arrays = {key: array for key, array in golden.arrays.items() if key.startswith("params/")}
    arrays["params/pos_embedding"] = arrays["params/pos_embedding"][:, :4]
    low = {key: torch.from_numpy(array).bfloat16() for key, array in arrays.items()}
    np.savez(tmp_path / "tower.npz", **{key: t.view(torch.int16).numpy().view("V2") for key, t in low.items()})
    tower = models.load_pretrained(tmp_path / "tower.npz")
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert torch.equal(tower.head.probe, low["params/MAPHead_0/probe"])
    stack = low["params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]
    assert torch.equal(tower.encoder.layers[2].mlp.fc1.weight, stack[2].T)
