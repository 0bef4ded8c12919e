"""What cannot be loaded or saved says why in one line, runs no code and changes nothing."""

import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import Golden
from peers import CONFIGS, randomize, timm_tower
from safetensors.torch import load_file, save_file

from vlkern import models
from vlkern.errors import UserError
from vlkern.models.siglip import Siglip, VisionConfig, VisionTower

CONFIG = CONFIGS["odd"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    models.save_pretrained(randomize(Siglip(CONFIG)), folder)
    return folder


@pytest.fixture(scope="module")
def saved_naflex(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "naflex"
    models.save_pretrained(models.create("naflex-tiny"), folder)
    return folder


@pytest.fixture
def naflex_folder(saved_naflex, tmp_path):
    return Path(shutil.copytree(saved_naflex, tmp_path / "naflex"))


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _refusal(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        models.load_pretrained(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _edit(folder, change):
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    save_file(state, folder / "model.safetensors")


def _configure(folder, change):
    entries = json.loads((folder / "config.json").read_text())
    change(entries)
    (folder / "config.json").write_text(json.dumps(entries))


def test_every_misfit_is_listed(folder):
    def change(state):
        for i in range(3):
            del state[f"vision_model.encoder.layers.{i}.mlp.fc1.weight"]
        state["text_model.head.weight"] = torch.zeros(21, 39)
        state["logit_scale"] = torch.zeros(())
        state["vision_model.encoder.layers.3.mlp.fc1.bias"] = torch.zeros(50)
        state["logit_bias"] = torch.zeros(1, dtype=torch.int32)
        state["vision_model.embeddings.position_ids"] = torch.zeros(1, 16, dtype=torch.int64)  # of old files: ignored

    _edit(folder, change)
    message = _refusal(folder)
    for part in (
        f"{folder}: 7 tensors do not fit the model",
        "missing vision_model.encoder.layers.0.mlp.fc1.weight [50, 39]",
        "missing vision_model.encoder.layers.1.mlp.fc1.weight [50, 39]",
        "missing vision_model.encoder.layers.2.mlp.fc1.weight [50, 39]",
        "wrong shape text_model.head.weight: expected [39, 21], got [21, 39]",
        "wrong shape logit_scale: expected [1], got []",
        "wrong type logit_bias: expected floating point, got torch.int32",
        "unexpected vision_model.encoder.layers.3.mlp.fc1.bias [50]",
    ):
        assert part in message
    assert "position_ids" not in message


def test_every_misfit_of_other_names_is_listed(tmp_path):
    golden = Golden("two_towers_siglip")
    arrays = {key: array for key, array in golden.arrays.items() if key.startswith("params/")}
    arrays["params/img/pos_embedding"] = arrays["params/img/pos_embedding"][:, :4]
    attention = "Encoder_0/encoderblock_1/MultiHeadDotProductAttention_0"
    del arrays[f"params/txt/{attention}/key/bias"]
    arrays[f"params/txt/{attention}/out/kernel"] = np.zeros((3, 24), np.float32)
    arrays["params/img/head/kernel"] = np.zeros((24, 5), np.float32)
    arrays["params/txt/head/bias"] = np.array(["a"] * 24)
    arrays["params/txt/head/kernel"] = np.zeros((24, 24), np.longdouble)
    np.savez(tmp_path / "siglip.npz", **arrays)
    message = _refusal(tmp_path / "siglip.npz")
    layer = "text_model.encoder.layers.1.self_attn"
    for part in (
        "5 tensors do not fit",
        "wrong type params/txt/head/bias: expected floating point, got torch.uint8",
        f"missing {layer}.k_proj.bias [24] (from params/txt/{attention}/key/bias)",
        f"wrong shape {layer}.out_proj.weight: expected [24, 24], got [3, 24] (from params/txt/{attention}/out/kernel)",
        "unexpected params/img/head/kernel [24, 5]",
    ):
        assert part in message


def test_stacks_of_different_depths(tmp_path):
    golden = Golden("scan_vit_map")
    arrays = {key: array for key, array in golden.arrays.items() if key.startswith("params/")}
    arrays["params/pos_embedding"] = arrays["params/pos_embedding"][:, :4]
    key = "params/Transformer/encoderblock/LayerNorm_1/bias"
    arrays[key] = np.concatenate([arrays[key], arrays[key][:1]])
    np.savez(tmp_path / "tower.npz", **arrays)
    message = _refusal(tmp_path / "tower.npz")
    assert "3 tensors do not fit" in message
    assert f"encoder.layers.0.layer_norm2.bias: expected [24], got [4, 24] (from {key})" in message


class _Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.safetensors", "model.npz"])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_pickles_are_refused(tmp_path, name, how):
    bomb, path = _Bomb(tmp_path / "exploded"), tmp_path / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"w": torch.zeros(2), "x": bomb}, path, _use_new_zipfile_serialization=how == "zip")
    message = _refusal(path)
    assert message.startswith(f"{path}: a pickle file; loading one can run any code that is in it, so it is refused")
    assert not bomb.path.exists()


def test_a_directory_of_pickles(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert _refusal_without_weights(folder).startswith(f"{folder}/pytorch_model.bin: a pickle file")


def _refusal_without_weights(folder):
    (folder / "model.safetensors").unlink()
    return _refusal(folder)


def test_arrays_of_objects_are_refused(tmp_path):
    bomb = _Bomb(tmp_path / "exploded")
    np.savez(tmp_path / "siglip.npz", **{"params/t": np.zeros(1)}, extra=np.array([bomb], dtype=object))
    message = _refusal(tmp_path / "siglip.npz")
    assert "siglip.npz: extra hold Python objects, stored as pickles; reading them could run code" in message
    assert not bomb.path.exists()


@pytest.mark.parametrize("size", [0, 5, 100, 9000, -1])
def test_truncated_safetensors(folder, size):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    for source in (folder, file):
        message = _refusal(source)
        assert str(file) in message
        assert re.search("not a whole safetensors file|expected a safetensors or .npz file", message)


def test_truncated_npz(tmp_path):
    golden = Golden("two_towers_siglip")
    path = tmp_path / "siglip.npz"
    shutil.copy(golden.path, path)
    whole = path.read_bytes()
    for size in (30, 1000, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert f"{path}: not a whole" in _refusal(path)
    # One array is damaged, the directory at the end of the file is not.
    np.savez(path, **{key: a for key, a in golden.arrays.items() if key.startswith("params/")})
    damaged = bytearray(path.read_bytes())
    values = golden.arrays["params/txt/Embed_0/embedding"].tobytes()
    at = damaged.find(values)
    damaged[at : at + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    config = models.siglip.SiglipConfig(
        VisionConfig(24, 2, 3, 40, (24, 16), 8), models.siglip.TextConfig(24, 2, 3, 40, 40, 8)
    )
    assert re.search("siglip.npz: .*params/txt/Embed_0/embedding", _refusal(path, config=config))
    np.savez_compressed(path, **{key: a for key, a in golden.arrays.items() if key.startswith("params/")})
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = b"\xff" * 40
    path.write_bytes(damaged)
    assert re.search("cannot read|not a whole .npz file", _refusal(path, config=config))


def test_no_checkpoint_at_all(tmp_path):
    assert _refusal(tmp_path / "none") == f"{tmp_path}/none: no such file or directory"
    assert _refusal(tmp_path) == (
        f"{tmp_path}: expected model.safetensors or model.safetensors.index.json, found no safetensors or .npz file"
    )
    (tmp_path / "notes.txt").write_text("a long text that is no checkpoint")
    assert "expected a safetensors or .npz file, it begins with b'a long te'" in _refusal(tmp_path / "notes.txt")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    assert "PaliGemma or SigLIP with names of transformers, open_clip, timm or big_vision (conv.weight" in _refusal(
        tmp_path
    )
    save_file({}, tmp_path / "empty.safetensors")
    assert "found empty.safetensors, resnet.safetensors" in _refusal(tmp_path)
    assert "(none, ...)" in _refusal(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(model_type="clip"), "model_type must be 'siglip' or 'siglip2', got 'clip'"),
        (lambda e: e.update(text_config=[1]), r"text_config must be an object, got \[1\]"),
        (
            lambda e: e["vision_config"].update(hidden_act="gelu"),
            "vision_config: hidden_act must be 'gelu_pytorch_tanh', got 'gelu'",
        ),
        (lambda e: e["text_config"].update(layer_norm_eps=1e-5), "layer_norm_eps must be 1e-06, got 1e-05"),
        (lambda e: e["vision_config"].update(vision_use_head=False), "vision_use_head must be True, got False"),
        (lambda e: e["vision_config"].update(hidden_size="39"), "width must be a positive integer, got '39'"),
        (lambda e: e["vision_config"].update(image_size=3), r"at least one patch of 7 x 7, got \(3, 3\)"),
        (lambda e: e["vision_config"].update(patch_size=[7, 6]), r"patch must be a positive integer, got \[7, 6\]"),
        (lambda e: e["text_config"].update(num_attention_heads=4), "width must be a multiple of heads, got 21 and 4"),
        (lambda e: e["text_config"].update(projection_size=7), "projection_size 7 and pictures hidden_size 39"),
        (lambda e: e["text_config"].pop("vocab_size"), r"wrong shape .*token_embedding.*\[32000, 21\], got \[19, 21\]"),
        (
            lambda e: (e.update(model_type="siglip2"), e["vision_config"].pop("image_size")),
            "vision_config: heads must share the width .* got 3 heads of width 39",
        ),
    ],
)
def test_config_json_that_does_not_fit(folder, change, message):
    _configure(folder, change)
    assert re.search(message, _refusal(folder))


@pytest.mark.parametrize(("text", "message"), [("{", "cannot read"), ("[1]", "expected an object, got list")])
def test_config_json_that_is_no_object(folder, text, message):
    (folder / "config.json").write_text(text)
    assert message in _refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["vision_config"].update(num_patches=15), "num_patches must be the square .*, got 15"),
        (lambda e: e["vision_config"].update(num_patches="16"), "num_patches must be the square .*, got '16'"),
        (lambda e: e["vision_config"].update(num_patches=9), r"wrong shape .*position.*\[9, 192\], got \[16, 192\]"),
        (lambda e: e["vision_config"].update(num_attention_heads=16), "heads must share .* 16 heads of width 192"),
        (lambda e: e["vision_config"].update(image_size=32), r"wrong shape .*patch_embedding.*\[192, 3, 8, 8\]"),
    ],
)
def test_naflex_config_json_that_does_not_fit(naflex_folder, change, message):
    _configure(naflex_folder, change)
    assert re.search(message, _refusal(naflex_folder))


def test_naflex_shapes_that_do_not_fit(naflex_folder, folder, tmp_path):
    (naflex_folder / "config.json").unlink()
    patches = "vision_model.embeddings.patch_embedding.weight"
    _edit(naflex_folder, lambda s: s.update({patches: torch.zeros(192, 147 + 3)}))
    assert "patches of 150 numbers are no squares with three channels" in _refusal(naflex_folder)
    _edit(naflex_folder, lambda s: s.update({patches: torch.zeros(192, 147)}))
    _edit(naflex_folder, lambda s: s.update({patches.replace("patch", "position"): torch.zeros(17, 192)}))
    assert "17 positions fill no square" in _refusal(naflex_folder)
    # Under timm's names, too, NaFlex models have linear patches.
    timm = {"patch_embed.proj.weight": torch.zeros(8, 12), "pos_embed": torch.zeros(1, 4, 8)}
    save_file({**timm, "attn_pool.latent": torch.zeros(1, 1, 8)}, tmp_path / "timm.safetensors")
    assert "its patch embedding is linear, as in NaFlex models" in _refusal(tmp_path / "timm.safetensors")


def test_naflex_models_have_no_size(naflex_folder):
    with pytest.raises(ValueError, match=r"image_size and patch must be None: .* holds a model for"):
        models.load_pretrained(naflex_folder, image_size=64)
    with pytest.raises(ValueError, match=r"image_size and patch must be None: .* holds a model for"):
        models.load_pretrained(naflex_folder, patch=16)


def test_what_shapes_do_not_tell(folder, tmp_path):
    (folder / "config.json").unlink()
    assert "does not say how many heads a tower of width 39 has: pass config=" in _refusal(folder)
    vision = VisionConfig(192, 1, 3, 32, (16, 24), 8)
    save_file({f"vision_model.{k}": p for k, p in VisionTower(vision).state_dict().items()}, tmp_path / "a.safetensors")
    assert "6 positions fill no square: pass config=" in _refusal(tmp_path / "a.safetensors")
    assert isinstance(models.load_pretrained(tmp_path / "a.safetensors", config=vision), VisionTower)
    text = {
        f"text_model.{k}": p for k, p in Siglip(models.siglip.PRESETS["siglip-tiny"]).text_model.state_dict().items()
    }
    save_file(text, tmp_path / "b.safetensors")
    assert "missing vision_model.embeddings.patch_embedding.weight, vision_model" in _refusal(
        tmp_path / "b.safetensors"
    )


def test_config_of_the_wrong_kind(tmp_path):
    save_file(timm_tower(CONFIG.vision).state_dict(), tmp_path / "timm.safetensors")
    message = _refusal(tmp_path / "timm.safetensors", config=CONFIG)
    assert message.endswith("holds the image tower alone: config must be a VisionConfig, got SiglipConfig")
    other = VisionConfig(39, 2, 3, 50, (30, 30), 7)
    message = _refusal(tmp_path / "timm.safetensors", config=other)
    assert "unexpected blocks.2.norm1.weight [39]" in message


def test_bad_shards(saved, tmp_path):
    torch.manual_seed(0)
    models.save_pretrained(models.load_pretrained(saved), tmp_path, max_shard_size=100_000)
    shards = sorted(tmp_path.glob("model-*"))
    index = tmp_path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())

    shutil.copy(shards[0], tmp_path / "kept")
    shutil.copy(shards[1], shards[0])
    assert re.search(r"tensor \S+ is also in another file", _refusal(tmp_path))
    shards[0].unlink()
    assert _refusal(tmp_path) == f"{tmp_path}: missing {shards[0].name}, which {index.name} lists"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "files must lie beside the index, got ../model.safetensors" in _refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": 3}))
    assert "expected an object weight_map with the file of every tensor, got 3" in _refusal(tmp_path)
    index.write_text(json.dumps({**entries, "weight_map": {"a": shards[1].name}}))
    assert "missing" in _refusal(tmp_path)


@pytest.mark.parametrize("size", [0, -8, (16, 0), (30, 6), (30.0, 30), "30", (30, 30, 30)])
def test_impossible_image_sizes(saved, size):
    with pytest.raises(ValueError, match=r"image_size must be (two positive integers|at least one patch of 7 x 7)"):
        models.load_pretrained(saved, image_size=size)
    with pytest.raises(ValueError, match="patch must be a positive integer, got 0"):
        models.load_pretrained(saved, patch=0)


def test_dtype_that_is_none(saved):
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float64, .*, got torch.int8"):
        models.load_pretrained(saved, dtype=torch.int8)


def test_what_cannot_be_saved(saved, tmp_path):
    with pytest.raises(TypeError, match=r"model must be one of Siglip, .*, PaliGemma, Gemma3, .*VitVae, got Linear"):
        models.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "new")
    with torch.device("meta"):
        empty = Siglip(CONFIG)
    with pytest.raises(ValueError, match="model must have data, got parameters on the meta device"):
        models.save_pretrained(empty, tmp_path / "new")
    with pytest.raises(ValueError, match="max_shard_size must be a positive integer, got 0"):
        models.save_pretrained(models.load_pretrained(saved), tmp_path / "new", max_shard_size=0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file: cannot write the model \(File exists\)"):
        models.save_pretrained(models.load_pretrained(saved), tmp_path / "file")
    with pytest.raises(UserError, match=r"file/sub: cannot write the model \(Not a directory\)"):
        models.save_pretrained(models.load_pretrained(saved), tmp_path / "file/sub")
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk(folder):
    """What was there stays, and no part of what could not be written."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = models.load_pretrained(folder)
    with torch.no_grad():
        model.logit_bias.add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"model: cannot write the model \(.*File too large"):
            models.save_pretrained(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
