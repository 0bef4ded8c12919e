"""Gemma in Hugging Face's files: config.json to and from `GemmaConfig`, and names of tensors, which are our own.

transformers is not imported, and not needed.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models.gemma import PRESETS, Gemma, GemmaConfig
from vlkern.models.state import Checkpoint, Source, collect, layers, need, same

MODEL_TYPES = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}
#: What `load_pretrained` says of options for other models.
WHAT = "a language model"

_TABLE = "model.embed_tokens.weight"
_CLASSES = {1: "GemmaForCausalLM", 2: "Gemma2ForCausalLM", 3: "Gemma3ForCausalLM"}
_KINDS = {"sliding_attention": "L", "full_attention": "G"}
_GELU = "gelu_pytorch_tanh"
# Entry -> field of GemmaConfig, and what transformers takes in Gemma 1, 2 and 3 when it is left out.
_SIZES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "hidden_size": ("width", (3072, 2304, 2304)),
    "num_hidden_layers": ("depth", (28, 26, 26)),
    "num_attention_heads": ("heads", (16, 8, 8)),
    "num_key_value_heads": ("kv_heads", (16, 4, 4)),
    "head_dim": ("head_dim", (256, 256, 256)),
    "intermediate_size": ("mlp", (24_576, 9216, 9216)),
    "vocab_size": ("vocabulary", (256_000, 256_000, 262_208)),
    "max_position_embeddings": ("context", (8192, 8192, 131_072)),
}
# The same for entries that only Gemma 2 and 3 have.
_OPTIONS: dict[str, tuple[str, tuple[Any, Any]]] = {
    "query_pre_attn_scalar": ("query_scalar", (256, 256)),
    "sliding_window": ("window", (4096, 4096)),
    "attn_logit_softcapping": ("attention_softcap", (50.0, None)),
    "final_logit_softcapping": ("final_softcap", (30.0, None)),
}
# Entries that these models have one value for; false and null are the same.
_FIXED = {
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether config.json says so, or, without one, the names of the tensors."""
    if "model_type" in entries:
        return entries["model_type"] in list(MODEL_TYPES)
    return _TABLE in names


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> Gemma:
    """The model of a folder or file with transformers' names, on the CPU.

    Args:
        checkpoint: its tensors.
        entries: its config.json, empty when there is none: then a preset with these shapes tells the rest.
        where: what errors call config.json.
        config: the user's GemmaConfig, which counts instead of config.json, or None.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: config.json or the tensors are not those of a Gemma, or do not fit together.
    """
    if config is None:
        config = from_json(entries, where) if entries else _by_shapes(checkpoint)
    if not isinstance(config, GemmaConfig):
        raise UserError(f"{checkpoint.path} holds {WHAT}: config must be a GemmaConfig, got {type(config).__name__}")
    with shapes_only():
        model = Gemma(config)
    root = "model." if any(name.startswith("model.") for name in checkpoint.shapes) else ""
    sources = {name: same(root + name.removeprefix("model.")) for name in model.state_dict()}
    fill(model, Tied(checkpoint, root + "embed_tokens.weight"), sources, dtype)
    return model


def fill(model: Gemma, checkpoint: Checkpoint, sources: Mapping[str, Source], dtype: torch.dtype | None) -> None:
    """Give a model made under `shapes_only` its parameters: all of them, or none and the list of what is wrong.

    Raises:
        UserError: tensors are missing, left over, of a wrong shape or of a type that is no float.
    """
    model.load_state_dict(collect(checkpoint, model.state_dict(), sources, dtype), assign=True)


class Tied:
    """A checkpoint without the output layer `head`: some files hold the embedding table a second time."""

    def __init__(self, checkpoint: Checkpoint, table: str, head: str = "lm_head.weight") -> None:
        self.path, self.read = checkpoint.path, checkpoint.read
        self.shapes = dict(checkpoint.shapes)
        second = self.shapes.get(head)
        if second is not None and table in self.shapes and second.shape == self.shapes[table].shape:
            del self.shapes[head]


def _by_shapes(checkpoint: Checkpoint) -> GemmaConfig:
    first = "model.layers.0."
    table, q, k, mlp = need(
        checkpoint,
        {
            _TABLE: 2,
            f"{first}self_attn.q_proj.weight": 2,
            f"{first}self_attn.k_proj.weight": 2,
            f"{first}mlp.up_proj.weight": 2,
        },
    )
    names = checkpoint.shapes
    normed, sandwich = f"{first}self_attn.q_norm.weight" in names, f"{first}pre_feedforward_layernorm.weight" in names
    return preset_like(
        checkpoint.path,
        version=3 if normed else 2 if sandwich else 1,
        vocabulary=table[0],
        width=table[1],
        depth=layers(names, "model.layers."),
        mlp=mlp[0],
        q=q[0],
        k=k[0],
    )


def preset_like(
    path: Path, *, version: int, vocabulary: int, width: int, depth: int, mlp: int, q: int, k: int
) -> GemmaConfig:
    """The preset of these sizes (q and k: channels of all heads), with this vocabulary: shapes alone tell neither
    windows nor bases of RoPE.

    Raises:
        UserError: there is none.
    """
    for c in PRESETS.values():
        of_heads = (c.heads * c.head_dim, c.kv_heads * c.head_dim)
        if (c.version, c.width, c.depth, c.mlp, *of_heads) == (version, width, depth, mlp, q, k):
            return replace(c, vocabulary=vocabulary)
    raise UserError(
        f"{path}: does not say what its windows and heads are, and no preset has Gemma {version}'s layers with width "
        f"{width}, depth {depth} and {mlp} hidden units: pass config="
    )


def from_json(entries: Mapping[str, Any], where: object = "config.json") -> GemmaConfig:
    """The configuration that a Hugging Face config.json, or the text_config in one, describes.

    Args:
        entries: the file's contents, with the names of old or of new versions of transformers; what is left out has
            the value that transformers gives it.
        where: what errors call the file.

    Raises:
        UserError: another model, an entry that these models do not have or of a wrong type, or an impossible size.
    """
    kind = entries.get("model_type")
    if kind not in list(MODEL_TYPES):
        raise UserError(f"{where}: model_type must be one of {', '.join(map(repr, MODEL_TYPES))}, got {kind!r}")
    version = MODEL_TYPES[kind]
    fixed: dict[str, Any] = dict(_FIXED)
    if version == 1:  # its first files say "gelu", and mean the tanh form
        if entries.get("hidden_act") != "gelu":
            fixed["hidden_act"] = _GELU
    else:
        fixed["hidden_activation"] = _GELU
    for name, value in fixed.items():
        if (got := entries.get(name, value)) != value and (got or value):
            raise UserError(f"{where}: {name} must be {value!r}, got {got!r}")
    fields = {ours: entries.get(name, defaults[version - 1]) for name, (ours, defaults) in _SIZES.items()}
    try:
        if version == 1:
            fields["query_scalar"] = fields["head_dim"]
        else:
            fields |= {ours: entries.get(name, defaults[version - 2]) for name, (ours, defaults) in _OPTIONS.items()}
            fields["pattern"] = _pattern(entries, fields["depth"], 2 if version == 2 else 6)
        return GemmaConfig(version=version, **fields, **_rope(entries, version))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _pattern(entries: Mapping[str, Any], depth: int, period: int) -> str:
    """The shortest pattern that gives every layer its kind."""
    kinds = entries.get("layer_types")
    if kinds is None:
        period = entries.get("sliding_window_pattern", period)
        if type(period) is not int or period < 1:
            raise ValueError(f"sliding_window_pattern must be a positive integer, got {period!r}")
        return "L" * (period - 1) + "G"
    if not isinstance(kinds, list) or len(kinds) != depth or not all(kind in list(_KINDS) for kind in kinds):
        raise ValueError(f"layer_types must be {depth} times one of {', '.join(_KINDS)}, got {kinds!r:.80}")
    letters = "".join(_KINDS[kind] for kind in kinds)
    return next(letters[:n] for n in range(1, depth + 1) if (letters[:n] * depth)[:depth] == letters)


def _rope(entries: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Base and factor of global layers, and base of local ones."""
    new = entries.get("rope_parameters") or {}
    if not isinstance(new, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {new!r:.80}")
    everywhere, theta = version < 3, 10_000.0 if version < 3 else 1_000_000.0
    global_ = new if everywhere else new.get("full_attention")
    base, factor = _one_rope(global_, entries.get("rope_theta", theta), entries.get("rope_scaling"))
    if everywhere:
        local, local_factor = base, factor
    else:
        local, local_factor = _one_rope(
            new.get("sliding_attention"), entries.get("rope_local_base_freq", 10_000.0), None
        )
    if local_factor != 1:
        where = f"Gemma {version}" if everywhere else "sliding_attention"
        raise ValueError(f"factor of RoPE must be 1 in {where}, got {local_factor!r}")
    return {"rope_base": base, "rope_factor": factor, "local_rope_base": local}


def _one_rope(new: Any, old_base: Any, old_scaling: Any) -> tuple[Any, Any]:
    scaling = new or old_scaling or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"RoPE must be described by an object, got {scaling!r:.80}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"rope_type must be 'default' or 'linear', got {kind!r}")
    return scaling.get("rope_theta", old_base), scaling.get("factor", 1.0) if kind == "linear" else 1.0


def to_json(c: GemmaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json with which transformers' Gemma*ForCausalLM reads the model's state dict.

    Raises:
        ValueError: transformers has no model with this combination of options.
    """
    names = {letter: kind for kind, letter in _KINDS.items()}
    entries: dict[str, Any] = {
        "architectures": [_CLASSES[c.version]],
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": next(kind for kind, version in MODEL_TYPES.items() if version == c.version),
        **{name: getattr(c, ours) for name, (ours, _) in _SIZES.items()},
        "hidden_act" if c.version == 1 else "hidden_activation": _GELU,
        **_FIXED,
    }
    if c.version > 1:
        entries |= {name: getattr(c, ours) for name, (ours, _) in _OPTIONS.items()}
        if c.query_scalar == int(c.query_scalar):
            entries["query_pre_attn_scalar"] = int(c.query_scalar)  # transformers takes no other
        entries["layer_types"] = [names[letter] for letter in c.kinds]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_base}
    local = rope | {"rope_theta": c.local_rope_base}
    if c.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": c.rope_factor}
    entries["rope_parameters"] = rope if c.version < 3 else {"full_attention": rope, "sliding_attention": local}
    try:
        same_model = _meaning(from_json(entries)) == _meaning(c)
    except UserError:
        same_model = False
    if not same_model:
        raise ValueError(f"config must be one that transformers' {_CLASSES[c.version]} can have, got {c}")
    return entries


def _meaning(c: GemmaConfig) -> GemmaConfig:
    """Equal for configurations of the same model."""
    kinds = c.kinds
    return replace(
        c,
        pattern=kinds,
        window=c.window if "L" in kinds else None,
        local_rope_base=c.local_rope_base if "L" in kinds else c.rope_base,
    )
