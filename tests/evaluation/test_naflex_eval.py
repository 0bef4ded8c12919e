"""`vlkern eval siglip` and `vlkern search` with a NaFlex model: pictures at their own aspect ratio."""

import io
import json

import numpy as np
import pytest
import shards
import torch
from PIL import Image

from vlkern import cli, data, models
from vlkern.errors import UserError
from vlkern.evaluation import load_encoder
from vlkern.models.naflex import Naflex, NaflexConfig, NaflexVisionConfig
from vlkern.models.siglip import TextConfig

CONFIG = NaflexConfig(NaflexVisionConfig(32, 1, 2, 64, patch=4, side=4), TextConfig(32, 1, 2, 64, 258, 24))
SIZES = [(16, 16), (8, 32), (12, 20), (40, 8)]  # multiples of the patch that the size rule keeps are of 16 patches


def _picture(i):
    h, w = SIZES[i % len(SIZES)]
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Naflex(CONFIG).eval()


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.save_pretrained(model, folder)
    data.ByteTokenizer(CONFIG.text.length).save(folder)
    return folder


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    members = {}
    for i in range(8):
        out = io.BytesIO()
        _picture(i).save(out, "PNG")
        members[f"{i:03}.png"] = out.getvalue()
        members[f"{i:03}.json"] = json.dumps({"captions": [f"caption {i}"]}).encode()
    return shards.write(tmp_path_factory.mktemp("shard") / "test.tar", members)


def test_vectors_are_those_of_the_model(model, model_folder, shard):
    for most in (None, 6):
        encoder = load_encoder(model_folder, device="cpu", bfloat16=False, batch=3, max_patches=most)
        pairs = data.PairShards(shard, encoder.image_size)
        got = torch.cat([encoder.images([pairs[i].pixels for i in part]) for part in ((0, 1, 2), (3, 4, 5, 6, 7))])
        size = data.NaflexSize(4, most or 16)
        for i in range(8):
            resized = _picture(i).resize(size(*_picture(i).size[::-1])[::-1], Image.Resampling.BILINEAR)
            with torch.no_grad():
                want = model.encode_pictures([resized], max_patches=most)
            torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=2e-6)
        assert f"up to {most or 16} patches of 4 x 4 pixels" in str(encoder)


def test_retrieval(model_folder, shard, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", str(model_folder), "--data", str(shard), "--out", str(out), "--precision", "fp32"]
    assert cli.main(["eval", "siglip", *arguments]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["retrieval"]["pictures"] == 8 and "up to 16 patches" in found["model"]


def test_an_index_knows_how_many_patches(model_folder, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        _picture(i).save(folder / f"{i}.png")

    def search(*more):
        arguments = ["--model", str(model_folder), "--images", str(folder), "--index", str(tmp_path / "index")]
        assert cli.main(["search", *arguments, "--precision", "fp32", *more, "a red car"]) == 0
        return capsys.readouterr().out

    search()
    assert "4 of them from" in search()
    assert "those of another model" in search("--max-patches", "6")


def test_max_patches_of_a_fixed_model(model_folder, tmp_path):
    fixed = models.create("siglip-tiny")
    models.save_pretrained(fixed, tmp_path)
    with pytest.raises(UserError, match="--max-patches 6: only for NaFlex models"):
        load_encoder(tmp_path, tokenizer="bytes", max_patches=6)
    with pytest.raises(ValueError, match="max_patches must be a whole number above 0, got 0"):
        load_encoder(model_folder, max_patches=0)
