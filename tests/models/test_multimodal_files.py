"""PaliGemma and Gemma 3 from and to files: names of old and new transformers, config.json, presets, and bad ones."""

import json
from dataclasses import replace

import pytest
import torch
from multimodal_peers import GEMMA3, PALIGEMMA, pair, theirs
from peers import load, randomize
from safetensors.torch import load_file, save_file

from vlkern import models
from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models import gemma3, multimodal_files, paligemma
from vlkern.models.gemma3 import Gemma3
from vlkern.models.paligemma import PaliGemma

CONFIGS = PALIGEMMA | {"gemma3": GEMMA3}
PRESETS = paligemma.PRESETS | gemma3.PRESETS
EACH = pytest.mark.parametrize("name", CONFIGS)


def ours(c):
    return PaliGemma(c) if isinstance(c, paligemma.PaliGemmaConfig) else Gemma3(c)


def inputs(c):
    """A prompt with one picture, for both."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (1, 14), generator=g)
    ids[:, : c.image_tokens] = c.image_token
    pixels = torch.rand(1, 3, *c.vision.image_size, generator=g) * 2 - 1
    types = (ids == c.image_token).long() if isinstance(c, gemma3.Gemma3Config) else torch.zeros_like(ids)
    return ids, pixels, types


@EACH
@torch.no_grad()
def test_there_and_back(name, tmp_path):
    """What transformers writes is read; what this library writes, transformers reads: the same logits."""
    c = CONFIGS[name]
    their_model = randomize(theirs(c))
    their_model.save_pretrained(tmp_path / "theirs")
    model = models.load_pretrained(tmp_path / "theirs")
    assert model.config == c
    ids, pixels, types = inputs(c)
    expected = their_model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits
    torch.testing.assert_close(model(ids, pixels), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    models.save_pretrained(model, tmp_path / "ours", max_shard_size=20_000)
    assert (tmp_path / "ours/model.safetensors.index.json").exists()
    again, report = type(their_model).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert torch.equal(again(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits, expected)
    assert models.load_pretrained(tmp_path / "ours").config == c


@EACH
@pytest.mark.parametrize("naming", ["released", "in memory"])
def test_names(name, naming, tmp_path):
    """Also with the table a second time as the output layer, and without config.json."""
    model, their_model = pair(CONFIGS[name])
    if naming == "released":
        tensors = model.state_dict()
        tensors["language_model.lm_head.weight"] = model.language.model.embed_tokens.weight.detach().clone()
    else:
        tensors = {key: p.clone() for key, p in their_model.state_dict().items()}
        assert {"lm_head.weight", "model.language_model.norm.weight"} <= tensors.keys()
    save_file(tensors, tmp_path / "model.safetensors")
    read = models.load_pretrained(tmp_path, config=CONFIGS[name])
    assert type(read) is type(model)
    for key, p in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], p), key
    with pytest.raises(UserError, match=r"expected config\.json beside it, or config="):
        models.load_pretrained(tmp_path)


HUB_PALIGEMMA = {
    "model_type": "paligemma", "image_token_index": 257_152, "projection_dim": 2048, "hidden_size": 2048,
    "bos_token_id": 2, "ignore_index": -100, "vocab_size": 257_152,
    "text_config": {
        "hidden_size": 2048, "intermediate_size": 16_384, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257_216,
    },
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16,
        "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14, "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast", "vision_use_head": False,
    },
}  # fmt: skip
HUB_GEMMA3 = {
    "model_type": "gemma3", "boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144,
    "mm_tokens_per_image": 256, "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip


def test_released_configurations():
    """With the entries that the released files have, and no more."""
    assert multimodal_files.from_json(HUB_PALIGEMMA) == PRESETS["paligemma-3b-224"]
    assert multimodal_files.from_json(HUB_GEMMA3) == PRESETS["gemma-3-4b"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_as_json(name):
    c = PRESETS[name]
    assert multimodal_files.from_json(multimodal_files.to_json(c, torch.bfloat16)) == c


def shallow(c):
    return replace(c, vision=replace(c.vision, depth=2), language=replace(c.language, depth=2))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith(("-448", "-896"))])
def test_transformers_has_the_same_parameters(name):
    """Names and shapes with two layers a tower, since the others are like them; and the number of all."""
    c = PRESETS[name]
    load("transformers")
    with torch.device("meta"):
        small = theirs(shallow(c))
    with shapes_only():
        ours_small, whole = ours(shallow(c)), ours(c)
    tensors = {f"model.{key}": tuple(p.shape) for key, p in ours_small.state_dict().items()}
    found = {key: tuple(p.shape) for key, p in small.state_dict().items()}
    assert found.pop("lm_head.weight") == (c.language.vocabulary, c.language.width)
    assert {
        key.replace("tower.vision_model", "tower").replace("language_model.model", "language_model"): shape
        for key, shape in tensors.items()
    } == found
    layers = (small.model.vision_tower.encoder.layers[0], small.model.language_model.layers[0])
    more = [part.depth - 2 for part in (c.vision, c.language)]
    assert count(whole) == count(small) + sum(n * count(layer) for n, layer in zip(more, layers, strict=True))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("paligemma-3b-224", 2.92), ("paligemma2-3b-224", 3.03), ("paligemma2-10b-448", 9.66),
        ("paligemma2-28b-896", 27.7), ("gemma-3-4b", 4.30), ("gemma-3-12b", 12.19), ("gemma-3-27b", 27.43),
    ],
)  # fmt: skip
def test_the_papers_parameter_counts(name, billions):
    with shapes_only():
        assert count(ours(PRESETS[name])) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_papers_sizes():
    tokens = {name: c.image_tokens for name, c in PRESETS.items() if "tiny" not in name}
    for side, expected in (("224", 256), ("448", 1024), ("896", 4096)):
        assert {n for name, n in tokens.items() if name.endswith(side)} == {expected}
    assert {n for name, n in tokens.items() if name.startswith("gemma-3")} == {256}
    # Gemma 3 without its embedding and its images' projection: 3209, 10,759 and 25,600 million.
    for name, millions in (("gemma-3-4b", 3209), ("gemma-3-12b", 10_759), ("gemma-3-27b", 25_600)):
        with shapes_only():
            language = ours(PRESETS[name]).language
        assert (count(language) - language.model.embed_tokens.weight.numel()) / 1e6 == pytest.approx(millions, abs=0.5)


@pytest.fixture
def saved(tmp_path):
    models.save_pretrained(randomize(PaliGemma(PALIGEMMA["gemma2"])), tmp_path)
    return tmp_path


def test_wrong_tensors(saved):
    """All of them are listed, and nothing is loaded."""
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["multi_modal_projector.linear.bias"]
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    tensors["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 30)
    save_file(tensors, path)
    with pytest.raises(UserError, match="3 tensors do not fit the model") as error:
        models.load_pretrained(saved)
    for part in (
        "missing multi_modal_projector.linear.bias [24]",
        "unexpected vision_tower.vision_model.head.probe [1, 1, 30]",
        f"wrong shape {name}: expected [36, 24], got [5, 24]",
    ):
        assert part in str(error.value)


def test_cut_short(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        models.load_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config must be an object, got None"),
        ({"vision_config": [3]}, r"vision_config must be an object, got \[3\]"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type must be 'gemma' or 'gemma2', got 'llama'"),
        ({"vision_config": {"vision_use_head": True}}, "vision_config: vision_use_head must be False, got True"),
        ({"vision_config": {"image_size": 5}}, "image_size must be at least one patch"),
        ({"image_token_index": 70}, "sampled_vocabulary must be at most the vocabulary, 64, got 70"),
        ({"image_token_index": "60"}, "image_token must be a positive integer, got '60'"),
    ],
)
def test_bad_config(saved, change, message):
    path = saved / "config.json"
    entries = json.loads(path.read_text())
    for key, value in change.items():
        merges = isinstance(value, dict)
        entries[key] = {**entries[key], **value} if merges else value
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        models.load_pretrained(saved)


def test_options_for_other_models(saved):
    with pytest.raises(ValueError, match=r"image_size must be None: .* is a model whose pictures have one size"):
        models.load_pretrained(saved, image_size=32)
    with pytest.raises(UserError, match="config must be a PaliGemmaConfig or a Gemma3Config, got GemmaConfig"):
        models.load_pretrained(saved, config=PALIGEMMA["gemma"].language)
    with pytest.raises(UserError, match="tensors do not fit the model"):
        models.load_pretrained(saved, config=PALIGEMMA["gemma"])


def test_what_transformers_cannot_have(tmp_path):
    c = PALIGEMMA["gemma2"]
    with pytest.raises(ValueError, match="sampled_vocabulary must be the placeholder, 60, to be saved, got 50"):
        models.save_pretrained(PaliGemma(replace(c, sampled_vocabulary=50)), tmp_path)
    with pytest.raises(ValueError, match="whole_prefix must be true of a Gemma 2"):
        models.save_pretrained(PaliGemma(replace(c, language=replace(c.language, whole_prefix=False))), tmp_path)
    assert not list(tmp_path.iterdir())
