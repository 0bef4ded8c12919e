"""`vlkern eval siglip` with a NaViT: packed pictures at their own aspect ratio, packed texts."""

import json

import pytest
import shards
import torch

from vlkern import cli, data, models
from vlkern.evaluation import load_encoder
from vlkern.models.navit import Navit, NavitClassifier, NavitConfig, TextConfig, VisionConfig

CONFIG = NavitConfig(
    VisionConfig(width=32, depth=1, heads=2, mlp=64, patch=4, grid=6),
    TextConfig(width=32, depth=1, heads=2, mlp=64, vocabulary=258, length=24),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    models.save_pretrained(Navit(CONFIG), folder)
    data.ByteTokenizer(CONFIG.text.length).save(folder)
    return folder


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    members = {}
    for i in range(6):
        members[f"{i}.png"] = shards.picture(color=(40 * i, 9, 200 - 30 * i), size=(10 + 9 * i, 40 - 5 * i))
        members[f"{i}.txt"] = f"caption {i}".encode()
    return shards.write(tmp_path_factory.mktemp("data") / "test.tar", members)


def test_vectors_are_those_of_the_model(folder, shard):
    model = models.load_pretrained(folder)
    encoder = load_encoder(folder, device="cpu", bfloat16=False, batch=4, max_patches=20)
    pairs = data.PairShards(shard, data.NavitSize(4, 20, longest=6))
    assert "up to 20 patches of 4 x 4 pixels" in str(encoder)
    assert len({pairs[i].pixels.shape for i in range(6)}) > 2
    images = encoder.images([pairs[i].pixels for i in range(6)])
    texts = encoder.texts([pairs[i].caption for i in range(6)])
    tokenizer = data.ByteTokenizer(24)
    for i in range(6):
        alone = data.pack_images([data.to_unit(pairs[i].pixels)], 4)
        with torch.no_grad():
            torch.testing.assert_close(images[i : i + 1], model.encode_image(*alone), rtol=0, atol=2e-6)
            text = data.pack_texts(tokenizer([pairs[i].caption]), tokenizer.end)
            torch.testing.assert_close(texts[i : i + 1], model.encode_text(*text), rtol=0, atol=2e-6)
    assert encoder.fingerprint() != load_encoder(folder, device="cpu", bfloat16=False).fingerprint()


def test_retrieval(folder, shard, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", folder, "--data", shard, "--out", out, "--precision", "fp32"]
    assert cli.main(["eval", "siglip", *map(str, arguments)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["retrieval"]["pictures"] == 6 and "up to 256 patches" in found["model"]


def test_a_classifier_has_no_texts(shard, tmp_path, capfd):
    models.save_pretrained(NavitClassifier(CONFIG.vision, 3), tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["eval", "siglip", "--model", str(tmp_path), "--data", str(shard)])
    assert "expected a SigLIP or a NaViT, got a NavitClassifier" in capfd.readouterr().err


def test_bad_sizes():
    with pytest.raises(ValueError, match="max_patches must be at least 1, got 0"):
        data.NavitSize(16, 0)
    with pytest.raises(ValueError, match="patch must be at least 1, got 0"):
        data.NavitSize(0, 16)
