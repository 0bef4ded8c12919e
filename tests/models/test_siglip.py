"""SigLIP against two implementations that this project did not write: the papers' JAX code and transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vlkern
from vlkern import models
from vlkern.models.siglip import PRESETS, Siglip, SiglipConfig, TextConfig, VisionConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "two_towers_siglip.npz"


def _flax_names(depth: int) -> dict[str, tuple[str, str]]:
    """Torch parameter -> (flax parameter, how its array is laid out)."""
    names = {
        "vision_model.embeddings.patch_embedding.weight": ("img/embedding/kernel", "conv"),
        "vision_model.embeddings.patch_embedding.bias": ("img/embedding/bias", "same"),
        "vision_model.embeddings.position_embedding.weight": ("img/pos_embedding", "first"),
        "vision_model.head.probe": ("img/MAPHead_0/probe", "same"),
        "text_model.embeddings.token_embedding.weight": ("txt/Embed_0/embedding", "same"),
        "text_model.embeddings.position_embedding.weight": ("txt/pos_embedding", "first"),
        "logit_scale": ("t", "same"),
        "logit_bias": ("b", "same"),
    }

    def dense(torch_name: str, flax_name: str) -> None:
        names[f"{torch_name}.weight"] = (f"{flax_name}/kernel", "dense")
        names[f"{torch_name}.bias"] = (f"{flax_name}/bias", "same")

    def norm(torch_name: str, flax_name: str) -> None:
        names[f"{torch_name}.weight"] = (f"{flax_name}/scale", "same")
        names[f"{torch_name}.bias"] = (f"{flax_name}/bias", "same")

    def attention_output(torch_name: str, flax_name: str) -> None:
        names[f"{torch_name}.weight"] = (f"{flax_name}/out/kernel", "out")
        names[f"{torch_name}.bias"] = (f"{flax_name}/out/bias", "same")

    for tower, root in (("vision_model", "img/Transformer"), ("text_model", "txt/Encoder_0")):
        for i in range(depth):
            layer, block = f"{tower}.encoder.layers.{i}", f"{root}/encoderblock_{i}"
            attention = f"{block}/MultiHeadDotProductAttention_0"
            for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
                names[f"{layer}.self_attn.{letter}_proj.weight"] = (f"{attention}/{word}/kernel", "heads")
                names[f"{layer}.self_attn.{letter}_proj.bias"] = (f"{attention}/{word}/bias", "flat")
            attention_output(f"{layer}.self_attn.out_proj", attention)
            for j in (0, 1):
                norm(f"{layer}.layer_norm{j + 1}", f"{block}/LayerNorm_{j}")
                dense(f"{layer}.mlp.fc{j + 1}", f"{block}/MlpBlock_0/Dense_{j}")
    norm("vision_model.post_layernorm", "img/Transformer/encoder_norm")
    norm("text_model.final_layer_norm", "txt/Encoder_0/encoder_norm")
    norm("vision_model.head.layernorm", "img/MAPHead_0/LayerNorm_0")
    attention_output("vision_model.head.attention.out_proj", "img/MAPHead_0/MultiHeadDotProductAttention_0")
    for j in (0, 1):
        dense(f"vision_model.head.mlp.fc{j + 1}", f"img/MAPHead_0/MlpBlock_0/Dense_{j}")
    dense("text_model.head", "txt/head")
    return names


LAYOUT = {
    "same": lambda a: a,
    "flat": lambda a: a.reshape(-1),
    "first": lambda a: a[0],
    "dense": lambda a: a.T,
    "heads": lambda a: a.reshape(a.shape[0], -1).T,
    "out": lambda a: a.reshape(-1, a.shape[-1]).T,
    "conv": lambda a: a.transpose(3, 2, 0, 1),
}


def _from_flax(arrays: dict[str, np.ndarray], depth: int) -> dict[str, torch.Tensor]:
    state = {name: LAYOUT[how](arrays[flax]) for name, (flax, how) in _flax_names(depth).items()}
    pool = "img/MAPHead_0/MultiHeadDotProductAttention_0"
    parts = [pool + "/" + word for word in ("query", "key", "value")]
    head = "vision_model.head.attention.in_proj"
    state[f"{head}_weight"] = np.concatenate([LAYOUT["heads"](arrays[f"{p}/kernel"]) for p in parts])
    state[f"{head}_bias"] = np.concatenate([arrays[f"{p}/bias"].reshape(-1) for p in parts])
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()}


@pytest.fixture(scope="module")
def golden():
    file = np.load(GOLDEN)
    c = json.loads(str(file["config"]))
    tower = lambda t: {"width": t["width"], "depth": t["depth"], "heads": t["num_heads"], "mlp": t["mlp_dim"]}  # noqa: E731
    config = SiglipConfig(
        VisionConfig(**tower(c["image"]), image_size=tuple(c["hw"]), patch=c["image"]["patch_size"][0]),
        TextConfig(**tower(c["text"]), vocabulary=c["text"]["vocab_size"], length=c["L"]),
    )
    subtree = lambda root: {k[len(root) :]: file[k] for k in file.files if k.startswith(root)}  # noqa: E731
    depth = c["image"]["depth"]
    model = Siglip(config)
    model.load_state_dict(_from_flax(subtree("params/"), depth))
    return model, file, _from_flax(subtree("grad/params/"), depth)


def _close(got: torch.Tensor, expected: np.ndarray | torch.Tensor, tolerance: float, span: float | None = None) -> None:
    """The largest error, relative to the largest entry of the array or to `span`, is at most `tolerance`."""
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    span = float(expected.abs().max()) if span is None else span
    error = float((got.detach() - expected).abs().max())
    assert error <= tolerance * span


def test_forward_and_gradients_of_the_papers_code(golden):
    model, file, expected_gradients = golden
    pixels = torch.from_numpy(file["in/image"]).permute(0, 3, 1, 2)
    ids = torch.from_numpy(file["in/text"]).long()
    _close(model.vision_model.tokens(pixels), file["out/img/encoded"], 2e-5)
    _close(model.vision_model(pixels), file["out/img/pre_logits"], 2e-5)
    _close(model.text_model(ids), file["out/txt/normalized"] * file["out/txt/norm"], 2e-5)
    image, text = model(pixels, ids)
    _close(image, file["out/zimg"], 2e-5)
    _close(text, file["out/ztxt"], 2e-5)
    loss = vlkern.ops.sigmoid_contrastive_loss(image, text, model.logit_scale.exp(), model.logit_bias)
    _close(loss, file["out/loss"], 2e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    span = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, expected in expected_gradients.items():
        _close(gradients[name], expected, 5e-5, span)


@pytest.mark.parametrize(
    "config",
    [
        SiglipConfig(VisionConfig(16, 2, 2, 32, (16, 16), 8), TextConfig(16, 2, 2, 32, 30, 7)),
        # Odd: 30 pixels leave an incomplete patch, widths differ between the towers, heads of 13 and 7 channels.
        SiglipConfig(VisionConfig(39, 3, 3, 50, (30, 30), 7), TextConfig(21, 1, 3, 33, 19, 5)),
    ],
    ids=["small", "odd"],
)
def test_transformers(config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    common = lambda t: {  # noqa: E731
        "hidden_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "intermediate_size": t.mlp,
    }
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config={
                **common(config.vision),
                "image_size": config.vision.image_size[0],
                "patch_size": config.vision.patch,
            },
            text_config={
                **common(config.text),
                "vocab_size": config.text.vocabulary,
                "max_position_embeddings": config.text.length,
                "projection_size": config.vision.width,
                # The default ids lie outside this small vocabulary.
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
            },
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    theirs.eval()
    ours = Siglip(config)
    ours.load_state_dict(theirs.state_dict())  # strict: exactly their names and shapes
    pixels = torch.rand(4, 3, *config.vision.image_size, generator=generator) * 2 - 1
    ids = torch.randint(config.text.vocabulary, (4, config.text.length), generator=generator)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels)
        image, text = ours(pixels, ids)
        logits = ours.logit_scale.exp() * text @ image.T + ours.logit_bias
    _close(image, expected.image_embeds, 2e-5)
    _close(text, expected.text_embeds, 2e-5)
    _close(logits, expected.logits_per_text, 2e-5)


@pytest.mark.parametrize("name", models.list_models())
def test_presets_on_the_meta_device(name):
    with torch.device("meta"):
        model = models.create(name)
        c = model.config
        image, text = model(torch.empty(2, 3, *c.vision.image_size), torch.empty(2, c.text.length, dtype=torch.long))
    assert image.shape == text.shape == (2, c.vision.width)


def test_base_has_the_papers_parameter_counts():
    with torch.device("meta"):
        model = models.create("siglip2-base-patch16-256")
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(model.vision_model) == 92_930_304  # 92.9 M
    assert count(model.text_model) == 282_303_744  # 282 M


def test_initial_values():
    torch.manual_seed(0)
    model = models.create("siglip-tiny")
    assert model.logit_scale.exp().item() == pytest.approx(10.0)
    assert model.logit_bias.item() == -10.0
    width = model.config.text.width
    assert model.text_model.embeddings.token_embedding.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    fc1 = model.vision_model.encoder.layers[0].mlp.fc1
    bound = (6 / (fc1.in_features + fc1.out_features)) ** 0.5
    assert 0.99 * bound < fc1.weight.abs().max().item() <= bound
    assert 0 < fc1.bias.abs().max().item() < 1e-5
    assert model.text_model.head.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)


def test_pads_are_ordinary_tokens():
    """There is no mask: changing a pad's vector changes the embedding of the text."""
    torch.manual_seed(0)
    model = models.create("siglip-tiny")
    ids = torch.zeros(1, model.config.text.length, dtype=torch.long)
    ids[0, :3] = torch.tensor([70, 80, 1])
    with torch.no_grad():
        before = model.encode_text(ids)
        model.text_model.embeddings.token_embedding.weight[0].neg_()
        assert (model.encode_text(ids) - before).abs().max() > 1e-3


def test_bad_input():
    model = models.create("siglip-tiny")
    h, w = model.config.vision.image_size
    length = model.config.text.length
    with pytest.raises(ValueError, match=rf"pixels must have shape \[B, 3, {h}, {w}\], got \[2, 3, 8, 8\]"):
        model.encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=rf"ids must have shape \[B, {length}\], got \[2, 5\]"):
        model.encode_text(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"name must be one of .*'sigilp-tiny' \(did you mean 'siglip-tiny'\?\)"):
        models.create("sigilp-tiny")
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 10 and 3"):
        TextConfig(10, 1, 3, 20, 30, 8)
    assert set(PRESETS) <= set(models.list_models())
