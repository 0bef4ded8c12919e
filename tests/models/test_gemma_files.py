"""Gemma's checkpoints: transformers' and the JAX code's, what goes out comes back, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gemmas import CONFIGS, rows
from peers import load, randomize
from safetensors.torch import load_file, save_file

from vlkern import models
from vlkern.errors import UserError
from vlkern.interop import gemma_jax
from vlkern.layers.init import shapes_only
from vlkern.models import gemma_files
from vlkern.models.gemma import PRESETS, Gemma

EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def _same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _model(name="gemma3"):
    return randomize(Gemma(CONFIGS[name]))


@pytest.fixture
def folder(tmp_path):
    models.save_pretrained(_model(), tmp_path / "model")
    return tmp_path / "model"


def _refusal(source, **options):
    with pytest.raises(UserError) as caught:
        models.load_pretrained(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EACH
def test_round_trip_through_transformers(config, tmp_path):
    """Ours is read by transformers, theirs, in several files, by us; config.json says all that matters."""
    transformers = load("transformers")
    ours = randomize(Gemma(config)).bfloat16()
    models.save_pretrained(ours, tmp_path / "a")
    again = models.load_pretrained(tmp_path / "a")
    assert again.config == config and _same(ours, again)

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", **options)
    assert type(theirs).__name__ == {1: "Gemma", 2: "Gemma2", 3: "Gemma3"}[config.version] + "ForCausalLM"
    assert theirs.config.pad_token_id == 0 and theirs.config.eos_token_id == 1
    (text,) = rows(config, (11,))
    with torch.no_grad():
        expected = theirs(text[None]).logits
        torch.testing.assert_close(again.float()(text[None]), expected, rtol=1e-4, atol=1e-4)

    theirs.bfloat16().save_pretrained(tmp_path / "b", max_shard_size="5KB")
    assert (tmp_path / "b/model.safetensors.index.json").exists()
    back = models.load_pretrained(tmp_path / "b")
    assert back.config == config and _same(ours, back)


def test_output_layer_and_names_of_the_decoder_alone(folder):
    """The table may lie in the file twice, and a model without output layer has shorter names."""
    ours = models.load_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert _same(ours, models.load_pretrained(folder))
    save_file({name.removeprefix("model."): p for name, p in tensors.items()}, file)
    assert _same(ours, models.load_pretrained(folder))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """Every preset: names and shapes of transformers' model, and config.json there and back, complete or sparse."""
    transformers = load("transformers")
    config = PRESETS[name]
    entries = gemma_files.to_json(config, torch.bfloat16)
    theirs = transformers.AutoConfig.for_model(**entries)
    for written in (entries, theirs.to_dict(), theirs.to_diff_dict()):
        assert gemma_files.from_json(written) == config
    with shapes_only():
        model = Gemma(config)
        peer = transformers.AutoModelForCausalLM.from_config(theirs)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert shapes == {key: tuple(p.shape) for key, p in peer.named_parameters()}


@pytest.mark.parametrize(
    ("name", "rest", "rows"),
    [
        ("gemma-2b", 1_981_884_416, 256_000),
        ("gemma-7b", 7_751_248_896, 256_000),
        ("gemma-2-2b", 2_024_517_888, 256_000),
        ("gemma-2-9b", 8_324_201_984, 256_000),
        ("gemma-2-27b", 26_047_480_320, 256_000),
        ("gemma-3-270m", 100.3e6, 262_144),
        ("gemma-3-1b", 697.9e6, 262_144),
        ("gemma-3-4b-text", 3209.0e6, 262_208),
        ("gemma-3-12b-text", 10_759.2e6, 262_208),
        ("gemma-3-27b-text", 25_599.7e6, 262_208),
    ],
)
def test_the_reports_parameter_counts(name, rest, rows):
    """Without the embedding, as far as the digits go."""
    with shapes_only():
        model = models.create(name)
    table = model.model.embed_tokens.weight
    assert table.shape == (rows, model.config.width)
    counted = sum(p.numel() for p in model.parameters()) - table.numel()
    assert counted == rest if isinstance(rest, int) else abs(counted - rest) <= 0.05e6


def test_config_json_of_the_hub():
    """The names that the released files have, and everything that they leave out."""
    one = {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
        "max_position_embeddings": 32_768, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "sliding_window_pattern": 6, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "rope_scaling": None,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
    }  # fmt: skip
    assert gemma_files.from_json(one) == PRESETS["gemma-3-1b"]
    four = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    assert gemma_files.from_json(four) == PRESETS["gemma-3-4b-text"]
    first = {
        "model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16_384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 10_000.0,
    }  # fmt: skip
    assert gemma_files.from_json(first) == PRESETS["gemma-2b"]
    assert gemma_files.from_json({"model_type": "gemma"}) == PRESETS["gemma-7b"]
    assert gemma_files.from_json({"model_type": "gemma2"}) == PRESETS["gemma-2-2b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be one of 'gemma', 'gemma2', 'gemma3_text', got 'llama'"),
        ({"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06, got 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be False, got True"),
        ({"hidden_size": "30"}, "width must be a positive integer, got '30'"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 5 times one of sliding_attention, full_attention"),
        (
            {"layer_types": None, "sliding_window_pattern": 0},
            "sliding_window_pattern must be a positive integer, got 0",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type must be 'default' or 'linear'"),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "factor of RoPE must be 1 in sliding_attention, got 2.0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_config_json(change, message):
    entries = gemma_files.to_json(CONFIGS["gemma3"], torch.float32) | change
    with pytest.raises(UserError) as caught:
        gemma_files.from_json(entries, "here")
    assert str(caught.value).startswith(f"here: {message}")


def test_what_transformers_has_no_model_for(tmp_path):
    for name, change in (("gemma1", {"final_softcap": 3.0}), ("gemma2", {"local_rope_base": 5.0})):
        with pytest.raises(ValueError, match="config must be one that transformers' Gemma"):
            models.save_pretrained(Gemma(replace(CONFIGS[name], **change)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_that_do_not_fit(folder):
    """All of them are listed, and nothing is loaded."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.4.self_attn.q_norm.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(45, 31)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(45, 30, dtype=torch.int32)
    tensors["model.layers.5.input_layernorm.weight"] = torch.zeros(30)
    tensors["lm_head.weight"] = torch.zeros(84, 30)
    save_file(tensors, file)
    message = _refusal(folder)
    assert message.startswith(f"{folder}: 6 tensors do not fit the model: missing ")
    for part in (
        "missing model.layers.4.self_attn.q_norm.weight [8]",
        "missing model.norm.weight [30]",
        "unexpected lm_head.weight [84, 30]",
        "unexpected model.layers.5.input_layernorm.weight [30]",
        "wrong shape model.layers.0.mlp.up_proj.weight: expected [45, 30], got [45, 31]",
        "wrong type model.layers.1.mlp.up_proj.weight: expected floating point, got torch.int32",
    ):
        assert part in message


def test_damaged_files(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "not a whole safetensors file" in _refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    assert "tensors do not fit the model" in _refusal(folder)
    (folder / "config.json").unlink()
    assert "does not say what its windows and heads are, and no preset has Gemma 3's layers" in _refusal(folder)
    assert models.load_pretrained(folder, config=CONFIGS["gemma3"]).config == CONFIGS["gemma3"]
    message = _refusal(folder, config=models.siglip.PRESETS["siglip-tiny"])
    assert message.endswith("holds a language model: config must be a GemmaConfig, got SiglipConfig")
    with pytest.raises(ValueError, match=r"image_size must be None: .* is a language model"):
        models.load_pretrained(folder, image_size=64)


def test_shapes_of_a_preset_say_the_rest(tmp_path):
    """One file, without config.json: windows and bases are those of the preset with these shapes."""
    model = models.create("gemma3-tiny")
    save_file(model.state_dict(), tmp_path / "gemma.safetensors")
    again = models.load_pretrained(tmp_path / "gemma.safetensors", dtype=torch.bfloat16)
    assert again.config == model.config and _same(again, model.bfloat16())


def test_loading_takes_no_memory_twice(tmp_path):
    """Loaded, and every parameter used: the peak is the model."""
    model = Gemma(replace(PRESETS["gemma3-tiny"], vocabulary=120_000))  # 67 MB
    models.save_pretrained(model, tmp_path, max_shard_size=30_000_000)
    code = """
import resource, sys, torch
from vlkern import models
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
models.gemma.Gemma(models.gemma.PRESETS["gemma3-tiny"])(torch.ones(1, 3, dtype=torch.long))  # what a first call needs
before = peak()
model = models.load_pretrained(sys.argv[1])
for p in model.parameters():
    assert p.isfinite().all()
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    used, whole = map(int, done.stdout.split())
    assert whole > 60e6
    assert used <= 1.1 * whole + 5e6


def _jax_tree(model):
    """Written anew from the layouts of google-deepmind/gemma, one number of the tree at a time."""
    c, state = model.config, {name: p.detach().numpy() for name, p in model.named_parameters()}
    tree = {
        "embedder": {"input_embedding": state["model.embed_tokens.weight"]},
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    for i in range(c.depth):
        of = {name.split(f"layers.{i}.")[1]: p for name, p in state.items() if f"layers.{i}." in name}
        q, k, v = (of[f"self_attn.{x}_proj.weight"].reshape(-1, c.head_dim, c.width) for x in "qkv")
        attn = {"attn_vec_einsum": {"w": of["self_attn.o_proj.weight"].T.reshape(c.heads, c.head_dim, c.width)}}
        q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))  # [heads, D, C]
        if c.heads == c.kv_heads:
            attn["qkv_einsum"] = {"w": np.stack((q, k, v))}
        else:
            attn |= {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack((k, v))}}
        gates = np.stack((of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]))  # [2, F, D]
        layer = {
            "attn": attn,
            "mlp": {
                "gating_einsum": {"w": gates if c.version == 3 else np.swapaxes(gates, 1, 2)},
                "linear": {"w": of["mlp.down_proj.weight"].T},
            },
            "pre_attention_norm": {"scale": of["input_layernorm.weight"]},
        }
        if c.version == 1:
            layer["pre_ffw_norm"] = {"scale": of["post_attention_layernorm.weight"]}
        else:
            layer["post_attention_norm"] = {"scale": of["post_attention_layernorm.weight"]}
            layer["pre_ffw_norm"] = {"scale": of["pre_feedforward_layernorm.weight"]}
            layer["post_ffw_norm"] = {"scale": of["post_feedforward_layernorm.weight"]}
        if c.version == 3:
            attn["_query_norm"], attn["_key_norm"] = ({"scale": of[f"self_attn.{x}_norm.weight"]} for x in "qk")
        tree[f"layer_{i}"] = layer
    return {"transformer": tree}


@EACH
def test_jax_trees(config):
    model = randomize(Gemma(config))
    assert _same(gemma_jax.from_arrays(_jax_tree(model), config), model)


def test_jax_tree_of_a_preset():
    """The shapes tell which; the dtype is the file's, also bfloat16, for which NumPy has no name."""
    model = randomize(models.create("gemma3-tiny"))
    low = randomize(models.create("gemma3-tiny")).bfloat16()

    def lower(tree):
        if isinstance(tree, dict):
            return {key: lower(value) for key, value in tree.items()}
        return torch.from_numpy(tree.copy()).bfloat16().view(torch.int16).numpy().view("V2")

    again = gemma_jax.from_arrays(lower(_jax_tree(model)))
    assert again.config == model.config and _same(again, low)


def test_bad_jax_trees():
    model = _model("gemma1")
    tree = _jax_tree(model)
    with pytest.raises(UserError, match="no preset has Gemma 1's layers with width 40, depth 2 and 56 hidden units"):
        gemma_jax.from_arrays(tree)
    del tree["transformer"]["layer_1"]["attn"]["q_einsum"]
    tree["transformer"]["layer_0"]["mlp"]["linear"]["w"] = np.zeros((56, 41), np.float32)
    tree["transformer"]["more"] = {"w": np.zeros(3, np.float32)}
    with pytest.raises(UserError) as caught:
        gemma_jax.from_arrays(tree, model.config)
    message = str(caught.value)
    assert message.startswith("tree: 3 tensors do not fit the model: missing model.layers.1.self_attn.q_proj.weight")
    assert "unexpected transformer/more/w [3]" in message
    assert "wrong shape model.layers.0.mlp.down_proj.weight: expected [40, 56], got [41, 56]" in message
    tree["transformer"]["more"] = "text"
    with pytest.raises(UserError, match="tree: transformer/more must be an array of numbers, got str"):
        gemma_jax.from_arrays(tree, model.config)
    with pytest.raises(UserError, match="tree must hold embedder/input_embedding and nothing but a Gemma, got layer/w"):
        gemma_jax.from_arrays({"layer": {"w": np.zeros(3)}})
