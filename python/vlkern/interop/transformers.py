"""Hugging Face's config.json and names, which are this library's own, and `use_interval_attention` for its models.

transformers is not imported, and for checkpoints it is not needed.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch

from vlkern.errors import UserError
from vlkern.interop._shapes import AnyConfig, Plan, given, naflex_vision_config, text_config, vision_config
from vlkern.interop.attention import use_interval_attention as use_interval_attention
from vlkern.layers.init import shapes_only
from vlkern.models.naflex import Naflex, NaflexConfig, NaflexVisionConfig, NaflexVisionTower
from vlkern.models.siglip import Siglip, SiglipConfig, TextConfig, TowerConfig, VisionConfig, VisionTower
from vlkern.models.state import Checkpoint, Source, layers, same

Size = TypeVar("Size", VisionConfig, NaflexVisionConfig)

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
_NAFLEX_VISION = {**_TOWER, "patch_size": 16, "num_patches": 256}
_LANGUAGE = {**_TOWER, "vocab_size": 32_000, "max_position_embeddings": 64}
# Entries that this model has one value for.
_FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_FIXED_VISION = {**_FIXED, "num_channels": 3, "vision_use_head": True}


def knows(names: Collection[str]) -> bool:
    """Whether these are the names of SiglipModel, Siglip2Model or an image tower of theirs."""
    return _PATCHES in names or any(name.startswith((_IMAGE, _TEXT)) for name in names)


def plan(checkpoint: Checkpoint, config: object = None) -> Plan:
    """How to read Siglip or Naflex, or an image tower when there is nothing else; `config` is what the file holds,
    None to tell by its shapes: patches are cut by a convolution, or by a linear map in NaFlex models.

    Raises:
        UserError: the shapes do not tell it, or `config` is of the wrong kind.
    """
    names = checkpoint.shapes
    two = isinstance(config, SiglipConfig | NaflexConfig) or any(name.startswith(_TEXT) for name in names)
    root = _IMAGE if two or any(name.startswith(_IMAGE) for name in names) else ""
    if config is None:
        linear = names.get(root + _PATCHES)
        naflex = linear is not None and linear.dim() == 2
    else:
        naflex = isinstance(config, NaflexConfig | NaflexVisionConfig)
    if naflex and two:
        flexible = given(checkpoint, config, NaflexConfig) or NaflexConfig(
            _vision_size(checkpoint, root, naflex_vision_config), _text_size(checkpoint)
        )
        return Plan(flexible, _sources(lambda: Naflex(flexible)))
    if two:
        fixed = given(checkpoint, config, SiglipConfig) or SiglipConfig(
            _vision_size(checkpoint, root, vision_config), _text_size(checkpoint)
        )
        return Plan(fixed, _sources(lambda: Siglip(fixed)))
    if naflex:
        image = given(checkpoint, config, NaflexVisionConfig) or _vision_size(checkpoint, root, naflex_vision_config)
        return Plan(image, _sources(lambda: NaflexVisionTower(image), root))
    square = given(checkpoint, config, VisionConfig) or _vision_size(checkpoint, root, vision_config)
    return Plan(square, _sources(lambda: VisionTower(square), root))


def _sources(build: Callable[[], torch.nn.Module], root: str = "") -> dict[str, Source]:
    with shapes_only():
        return {name: same(root + name) for name in build().state_dict()}


def _vision_size(checkpoint: Checkpoint, root: str, read: Callable[..., Size]) -> Size:
    depth = layers(checkpoint.shapes, f"{root}encoder.layers.")
    names = (_PATCHES, "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    return read(checkpoint, *(root + name for name in names), depth=depth)


def _text_size(checkpoint: Checkpoint) -> TextConfig:
    depth = layers(checkpoint.shapes, f"{_TEXT}encoder.layers.")
    tables = (f"{_TEXT}embeddings.{table}_embedding.weight" for table in ("token", "position"))
    names = (*tables, f"{_TEXT}encoder.layers.0.mlp.fc1.weight")
    return text_config(checkpoint, *names, depth=depth)


def from_json(entries: Mapping[str, Any], where: object = "config.json") -> AnyConfig:
    """The configuration that a Hugging Face config.json describes.

    Args:
        entries: the file's contents; what is left out has the value that transformers gives it.
        where: what errors call the file.

    Returns:
        SiglipConfig for `"model_type": "siglip"` (also fixed-resolution SigLIP 2), VisionConfig for
        `"siglip_vision_model"`; NaflexConfig for `"siglip2"`, NaflexVisionConfig for `"siglip2_vision_model"`.

    Raises:
        UserError: another model, an entry that this model does not have or of a wrong type, or an impossible size.
    """
    kind = entries.get("model_type")
    if kind == "siglip_vision_model":
        return vision_from_json(entries, where)
    if kind == "siglip2_vision_model":
        return _naflex_vision(entries, where)
    vision, text = entries.get("vision_config") or {}, entries.get("text_config") or {}
    for name, part in (("vision_config", vision), ("text_config", text)):
        if not isinstance(part, Mapping):
            raise UserError(f"{where}: {name} must be an object, got {part!r}")
    if kind not in ("siglip", "siglip2"):
        raise UserError(f"{where}: model_type must be 'siglip' or 'siglip2', got {kind!r}")
    words = _text(text, f"{where}: text_config")
    c: SiglipConfig | NaflexConfig
    if kind == "siglip2" and "image_size" not in vision:  # one that has it is a SigLIP of fixed size
        c = NaflexConfig(_naflex_vision(vision, f"{where}: vision_config"), words)
    else:
        c = SiglipConfig(vision_from_json(vision, f"{where}: vision_config"), words)
    out = text.get("projection_size") or words.width
    if out != c.vision.width:
        raise UserError(
            f"{where}: texts have projection_size {out} and pictures hidden_size {c.vision.width}; they must be equal"
        )
    return c


def to_json(c: SiglipConfig | NaflexConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json with which transformers' SiglipModel, or Siglip2Model, reads the model's state dict."""

    text = c.text
    kind = "siglip2" if isinstance(c, NaflexConfig) else "siglip"
    return {
        "architectures": [f"{kind.capitalize()}Model"],
        "dtype": str(dtype).removeprefix("torch."),
        "initializer_factor": 1.0,
        "model_type": kind,
        "text_config": {
            "model_type": f"{kind}_text_model",
            **_tower(text),
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.length,
            "projection_size": c.vision.width,
            # SiglipModel uses neither, but warns of its defaults, 49406 and 49407, when the vocabulary is smaller.
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        "vision_config": vision_to_json(c.vision, kind),
    }


def vision_to_json(c: VisionConfig | NaflexVisionConfig, kind: str) -> dict[str, Any]:
    """The vision_config of the image tower of a `kind`, "siglip" or "siglip2"."""
    return {
        "model_type": f"{kind}_vision_model",
        **_tower(c),
        "num_channels": 3,
        "patch_size": c.patch,
        **_size(c),
    }


def _tower(t: TowerConfig) -> dict[str, Any]:
    return {
        "hidden_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "intermediate_size": t.mlp,
        **_FIXED,
    }


def _size(vision: VisionConfig | NaflexVisionConfig) -> dict[str, Any]:
    if isinstance(vision, NaflexVisionConfig):
        return {"num_patches": vision.patches}
    height, width = vision.image_size
    return {"image_size": height if height == width else [height, width]}


def vision_from_json(entries: Mapping[str, Any], where: object, *, head: bool = True) -> VisionConfig:
    """The image tower of a vision_config, with or without a pooling head.

    Raises:
        UserError: an entry that this model does not have or of a wrong type, or an impossible size.
    """
    if not head:
        entries = {"vision_use_head": False, **entries}
    got = _filled(entries, _VISION, _FIXED_VISION | {"vision_use_head": head}, where)
    size = got["image_size"]
    got["image_size"] = tuple(size) if isinstance(size, list) else (size, size)
    got["patch_size"] = _patch(got["patch_size"])
    return _checked(where, lambda: VisionConfig(*got.values()))


def _naflex_vision(entries: Mapping[str, Any], where: object) -> NaflexVisionConfig:
    got = _filled(entries, _NAFLEX_VISION, _FIXED_VISION, where)
    patches = got.pop("num_patches")
    side = math.isqrt(patches) if isinstance(patches, int) and patches > 0 else 0
    if side**2 != patches or side == 0:
        raise UserError(f"{where}: num_patches must be the square of a positive integer, got {patches!r}")
    got |= {"patch_size": _patch(got["patch_size"]), "side": side}
    return _checked(where, lambda: NaflexVisionConfig(*got.values()))


def _patch(side: Any) -> Any:
    return side[0] if isinstance(side, list) and len(set(side)) == 1 else side


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
