"""load_pretrained and save_pretrained: what goes out comes back, here and in transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peers import CONFIGS, load, randomize, transformers_config

from vlkern import models
from vlkern.interop.transformers import from_json, to_json
from vlkern.models.siglip import PRESETS, Siglip, SiglipConfig, TextConfig, VisionConfig, VisionTower


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(models.create("siglip-tiny"))


def _same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _visible(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_through_transformers(config, dtype, tmp_path, recwarn):
    transformers = load("transformers")
    ours = randomize(Siglip(config)).to(dtype)
    models.save_pretrained(ours, tmp_path / "a" / "model")
    assert _visible(tmp_path / "a" / "model") == ["config.json", "model.safetensors"]
    again = models.load_pretrained(tmp_path / "a" / "model")
    assert again.config == config and _same(ours, again)

    theirs = transformers.SiglipModel.from_pretrained(tmp_path / "a" / "model").eval()
    assert theirs.dtype == dtype
    assert _same(ours, theirs)
    pixels = torch.rand(2, 3, *config.vision.image_size) * 2 - 1
    ids = torch.randint(config.text.vocabulary, (2, config.text.length))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels)
        image, text = again(pixels, ids)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(image, expected.image_embeds.float(), rtol=0, atol=tolerance)
    torch.testing.assert_close(text, expected.text_embeds.float(), rtol=0, atol=tolerance)

    theirs.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert (tmp_path / "b/model.safetensors.index.json").exists()
    back = models.load_pretrained(tmp_path / "b")
    assert back.config == config and _same(ours, back)


def test_image_tower_of_transformers(tmp_path):
    transformers = load("transformers")
    config = transformers_config(CONFIGS["odd"])
    theirs = randomize(transformers.SiglipVisionModel(config.vision_config))
    theirs.save_pretrained(tmp_path)
    ours = models.load_pretrained(tmp_path)
    assert isinstance(ours, VisionTower)
    pixels = torch.rand(2, 3, 30, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels).pooler_output)


def test_shards(model, tmp_path):
    transformers = load("transformers")
    models.save_pretrained(model, tmp_path, max_shard_size=4_000_000)
    shards = [name for name in _visible(tmp_path) if "-of-" in name]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / name).stat().st_size < 4_100_000 for name in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.state_dict().values())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert _same(model, models.load_pretrained(tmp_path))
    assert _same(model, transformers.SiglipModel.from_pretrained(tmp_path))


def test_all_files_are_readable_by_the_same_people(model, tmp_path):
    """safetensors itself makes files that only their owner may read."""
    models.save_pretrained(model, tmp_path, max_shard_size=20_000)
    (tmp_path / "like any other").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_saving_again_leaves_nothing_stale(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model_card.safetensors.txt").write_text("mine")
    names = []
    for limit in (1_000_000, 5_000_000, 10**9, 3_000_000, 10**9):
        with torch.no_grad():
            model.logit_bias.add_(1)
        models.save_pretrained(model, tmp_path, max_shard_size=limit)
        assert _same(model, models.load_pretrained(tmp_path))
        names.append(_visible(tmp_path))
    mine = ["config.json", "model.safetensors", "model_card.safetensors.txt", "tokenizer.json"]
    assert names[-1] == mine and names[2] == mine


def test_killed_while_saving(tmp_path):
    """Whenever the process dies, the folder holds the old model or the new one, or says that it holds none."""
    code = """
import os, shutil, sys
from pathlib import Path
import torch
from vlkern import models
from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, VisionConfig
def save(value, limit, heads=2):
    model = Siglip(SiglipConfig(VisionConfig(16, 1, heads, 32, (16, 16), 8), TextConfig(16, 1, 2, 32, 30, 7)))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    models.save_pretrained(model, folder, max_shard_size=limit)
def dies_at(event):
    def hook(name, args):
        hook.left -= name in ("os.mkdir", "os.rename", "os.remove") and folder in str(args[0])
        if hook.left < 0:
            os._exit(9)
    hook.left = event
    sys.addaudithook(hook)
one, several = 10**9, 25_000  # files
for first, second, heads in ((one, one, 2), (several, several, 2), (one, several, 4), (several, one, 2), (one, one, 4)):
    for event in range(100):
        folder = f"{sys.argv[1]}/{first}-{second}-{heads}-{event}"
        save(1, first)
        if os.fork() == 0:
            dies_at(event)
            save(2, second, heads)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.wait()[1]) == 9
        try:
            again = models.load_pretrained(folder)
            values = {int(p.flatten()[0]) for p in again.parameters()}
            print(int(killed), *sorted(values), again.config.vision.heads == (heads if 2 in values else 2))
            save(3, second)
            assert not [f for f in os.listdir(folder) if f.startswith(".")]
        except ValueError as error:
            print(int(killed), "expected model.safetensors or model.safetensors.index.json" in str(error))
        shutil.rmtree(folder)
        if not killed:
            break
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    outcomes = ended.stdout.splitlines()
    assert set(outcomes) == {"1 1 True", "1 2 True", "1 True", "0 2 True"}
    assert outcomes.count("1 1 True") >= 8 and outcomes.count("0 2 True") == 5


def test_a_resized_model(model, tmp_path):
    models.save_pretrained(model, tmp_path)
    pixels = torch.rand(2, 3, 40, 56)
    expected = models.siglip.resized(model, (40, 56), patch=4)
    got = models.load_pretrained(tmp_path, image_size=(40, 56), patch=4)
    assert got.config == expected.config and _same(got, expected)
    with torch.no_grad():
        assert got.encode_image(pixels).shape == (2, 192)
    # Pictures that are no squares come back too, though transformers cannot read them.
    models.save_pretrained(got, tmp_path)
    assert models.load_pretrained(tmp_path).config == expected.config


def test_a_file_without_config(model, tmp_path):
    models.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        again = models.load_pretrained(source)
        assert again.config == model.config and _same(model, again)


def test_config_json_beside_the_file_counts(tmp_path):
    config = SiglipConfig(VisionConfig(24, 1, 4, 32, (20, 30), 10), TextConfig(16, 1, 2, 32, 30, 7))
    model = Siglip(config)
    models.save_pretrained(model, tmp_path)
    assert models.load_pretrained(tmp_path / "model.safetensors").config == config


def test_dtype(model, tmp_path):
    models.save_pretrained(model, tmp_path)
    low = models.load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    model.text_model.bfloat16()
    models.save_pretrained(model, tmp_path)
    mixed = models.load_pretrained(tmp_path)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


def test_training_does_not_change_the_file(model, tmp_path):
    models.save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = models.load_pretrained(tmp_path)
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    c = again.config
    image, text = again(torch.rand(2, 3, *c.vision.image_size), torch.zeros(2, c.text.length, dtype=torch.long))
    (image * text).sum().backward()
    torch.optim.SGD(again.parameters(), lr=10.0).step()
    assert not _same(again, model)
    # Saving over the file that is mapped: the model in memory stays what it is.
    models.save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not _same(again, model)


def test_loading_allocates_nothing_twice(tmp_path):
    """A mapped file of 50 MB costs no private memory before it is used."""
    config = SiglipConfig(VisionConfig(64, 1, 1, 64, (16, 16), 8), TextConfig(64, 1, 1, 64, 200_000, 7))
    models.save_pretrained(Siglip(config), tmp_path)
    code = """
import sys, torch
from vlkern import models
def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_Dirty"))
models.load_pretrained(sys.argv[1])  # imports what the first call imports
before = private()
model = models.load_pretrained(sys.argv[1])
print(private() - before, sum(p.nbytes for p in model.parameters()) // 1024)
assert "torch._dynamo" not in sys.modules, "importing it takes longer than loading"
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    kilobytes, whole = map(int, done.stdout.split())
    assert whole > 50_000
    assert kilobytes < 5_000


@pytest.mark.parametrize(
    "name", ["siglip-base-patch16-224", "siglip2-base-patch16-256", "siglip2-giant-opt-patch16-384"]
)
def test_config_json(name):
    """What transformers writes for a preset, with every default left out, and what we write."""
    transformers = load("transformers")
    config = PRESETS[name]
    theirs = transformers_config(config)
    assert from_json(theirs.to_dict()) == config
    assert from_json(theirs.to_diff_dict()) == config
    ours = transformers.SiglipConfig.from_dict(to_json(config, torch.float32))
    assert from_json(ours.to_dict()) == config
    assert ours.text_config.projection_size == config.vision.width


def test_config_json_of_nothing_but_its_kind():
    """All defaults of transformers' SiglipConfig: the first model that was published."""
    assert from_json({"model_type": "siglip"}) == PRESETS["siglip-base-patch16-224"]
    text = {"vocab_size": 256_000}
    vision = {"image_size": 256, "patch_size": 16}
    v2 = {"model_type": "siglip2", "text_config": text, "vision_config": vision}
    assert from_json(v2) == PRESETS["siglip2-base-patch16-256"]
