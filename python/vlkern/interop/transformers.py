"""Hugging Face's config.json and names, which are this library's own, and `use_interval_attention` for its models.

transformers is not imported, and for checkpoints it is not needed.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.interop._shapes import Plan, given, text_config, vision_config
from vlkern.interop.attention import use_interval_attention as use_interval_attention
from vlkern.layers.init import shapes_only
from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, VisionConfig, VisionTower
from vlkern.models.state import Checkpoint, Source, layers, same

_IMAGE, _TEXT = "vision_model.", "text_model."
_PATCHES = "embeddings.patch_embedding.weight"

# What transformers takes for entries that config.json leaves out, in the order of our configurations' fields.
_TOWER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_VISION = {**_TOWER, "image_size": 224, "patch_size": 16}
_LANGUAGE = {**_TOWER, "vocab_size": 32_000, "max_position_embeddings": 64}
# Entries that this model has one value for.
_FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_FIXED_VISION = {**_FIXED, "num_channels": 3, "vision_use_head": True}


def knows(names: Collection[str]) -> bool:
    """Whether these are the names of SiglipModel or SiglipVisionModel."""
    return _PATCHES in names or any(name.startswith((_IMAGE, _TEXT)) for name in names)


def plan(checkpoint: Checkpoint, config: object = None) -> Plan:
    """How to read Siglip, or VisionTower when there is nothing else; `config` is what the file holds, None to tell by
    its shapes.

    Raises:
        UserError: the shapes do not tell it, or `config` is of the wrong kind.
    """
    names = checkpoint.shapes
    if isinstance(config, SiglipConfig) or any(name.startswith(_TEXT) for name in names):
        c = given(checkpoint, config, SiglipConfig) or SiglipConfig(
            _vision_size(checkpoint, _IMAGE), _text_size(checkpoint)
        )
        return Plan(c, _sources(lambda: Siglip(c)))
    root = _IMAGE if any(name.startswith(_IMAGE) for name in names) else ""
    image = given(checkpoint, config, VisionConfig) or _vision_size(checkpoint, root)
    return Plan(image, _sources(lambda: VisionTower(image), root))


def _sources(build: Callable[[], torch.nn.Module], root: str = "") -> dict[str, Source]:
    with shapes_only():
        return {name: same(root + name) for name in build().state_dict()}


def _vision_size(checkpoint: Checkpoint, root: str) -> VisionConfig:
    depth = layers(checkpoint.shapes, f"{root}encoder.layers.")
    names = (_PATCHES, "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    return vision_config(checkpoint, *(root + name for name in names), depth=depth)


def _text_size(checkpoint: Checkpoint) -> TextConfig:
    depth = layers(checkpoint.shapes, f"{_TEXT}encoder.layers.")
    tables = (f"{_TEXT}embeddings.{table}_embedding.weight" for table in ("token", "position"))
    names = (*tables, f"{_TEXT}encoder.layers.0.mlp.fc1.weight")
    return text_config(checkpoint, *names, depth=depth)


def from_json(entries: Mapping[str, Any], where: object = "config.json") -> SiglipConfig | VisionConfig:
    """The configuration that a Hugging Face config.json describes.

    Args:
        entries: the file's contents; what is left out has the value that transformers gives it.
        where: what errors call the file.

    Returns:
        SiglipConfig for `"model_type": "siglip"` (also fixed-resolution SigLIP 2), VisionConfig for
        `"siglip_vision_model"`.

    Raises:
        UserError: another model, an entry that this model does not have or of a wrong type, or an impossible size.
    """
    kind = entries.get("model_type")
    if kind == "siglip_vision_model":
        return _vision(entries, where)
    vision, text = entries.get("vision_config") or {}, entries.get("text_config") or {}
    for name, part in (("vision_config", vision), ("text_config", text)):
        if not isinstance(part, Mapping):
            raise UserError(f"{where}: {name} must be an object, got {part!r}")
    if kind == "siglip2" and "image_size" not in vision:
        raise UserError(
            f"{where}: a NaFlex model (model_type siglip2 without image_size), which takes pictures of any shape; only "
            "models of a fixed resolution are read"
        )
    if kind not in ("siglip", "siglip2"):
        raise UserError(f"{where}: model_type must be 'siglip', got {kind!r}")
    c = SiglipConfig(_vision(vision, f"{where}: vision_config"), _text(text, f"{where}: text_config"))
    out = text.get("projection_size") or c.text.width
    if out != c.vision.width:
        raise UserError(
            f"{where}: texts have projection_size {out} and pictures hidden_size {c.vision.width}; they must be equal"
        )
    return c


def to_json(c: SiglipConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json with which transformers' SiglipModel reads the model's state dict."""
    (height, width), vision, text = c.vision.image_size, c.vision, c.text

    def tower(t: VisionConfig | TextConfig) -> dict[str, Any]:
        return {
            "hidden_size": t.width,
            "num_hidden_layers": t.depth,
            "num_attention_heads": t.heads,
            "intermediate_size": t.mlp,
            **_FIXED,
        }

    return {
        "architectures": ["SiglipModel"],
        "dtype": str(dtype).removeprefix("torch."),
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {
            "model_type": "siglip_text_model",
            **tower(text),
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.length,
            "projection_size": vision.width,
            # SiglipModel uses neither, but warns of its defaults, 49406 and 49407, when the vocabulary is smaller.
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **tower(vision),
            "num_channels": 3,
            "image_size": height if height == width else [height, width],
            "patch_size": vision.patch,
        },
    }


def _vision(entries: Mapping[str, Any], where: object) -> VisionConfig:
    got = _filled(entries, _VISION, _FIXED_VISION, where)
    size, patch = got["image_size"], got["patch_size"]
    got["image_size"] = tuple(size) if isinstance(size, list) else (size, size)
    if isinstance(patch, list) and len(set(patch)) == 1:
        got["patch_size"] = patch[0]
    return _checked(where, lambda: VisionConfig(*got.values()))


def _text(entries: Mapping[str, Any], where: object) -> TextConfig:
    got = _filled(entries, _LANGUAGE, _FIXED, where)
    return _checked(where, lambda: TextConfig(*got.values()))


def _filled(
    entries: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any], where: object
) -> dict[str, Any]:
    for name, value in fixed.items():
        if entries.get(name, value) != value:
            raise UserError(f"{where}: {name} must be {value!r}, got {entries[name]!r}")
    return {name: entries.get(name, default) for name, default in defaults.items()}


def _checked(where: object, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
