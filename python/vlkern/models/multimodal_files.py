"""PaliGemma and Gemma 3 in Hugging Face's files: config.json to and from configurations, and names of tensors.

Ours are the names of the released files. transformers 5 writes the image encoder's without `vision_model`, and has in
memory a `model.` before everything and none behind `language_model`; all of these are read.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlkern.errors import UserError
from vlkern.layers.init import shapes_only
from vlkern.models import gemma_files
from vlkern.models.gemma3 import Gemma3, Gemma3Config
from vlkern.models.paligemma import PaliGemma, PaliGemmaConfig
from vlkern.models.state import Checkpoint, collect, same

#: What `load_pretrained` says of options for other models.
WHAT = "a model whose pictures have one size"

_CLASSES = {"paligemma": "PaliGemmaForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}
_PARTS = ("vision_tower.", "multi_modal_projector.", "language_model.")
_TABLE = "language_model.model.embed_tokens.weight"
_LANGUAGES = {"paligemma": ("gemma", "gemma2"), "gemma3": ("gemma3_text",)}
_GEMMA3 = {
    "mm_tokens_per_image": 256,
    "image_token_index": 262_144,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
}


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether config.json says so, or, without one, the names of the tensors."""
    if "model_type" in entries:
        return entries["model_type"] in _CLASSES
    return any(_hub_name(name).startswith("multi_modal_projector.") for name in names)


def load(
    checkpoint: Checkpoint, entries: Mapping[str, Any], where: Path, config: object, dtype: torch.dtype | None
) -> PaliGemma | Gemma3:
    """The model of a folder or file with transformers' names, on the CPU.

    Args:
        checkpoint: its tensors.
        entries: its config.json, empty when there is none; then `config` must be given.
        where: what errors call config.json.
        config: the user's PaliGemmaConfig or Gemma3Config, which counts instead of config.json, or None.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: config.json or the tensors are not those of such a model, or do not fit together.
    """
    if config is None:
        if not entries:
            raise UserError(f"{checkpoint.path}: expected config.json beside it, or config=")
        config = from_json(entries, where)
    with shapes_only():
        if isinstance(config, PaliGemmaConfig):
            model: PaliGemma | Gemma3 = PaliGemma(config)
        elif isinstance(config, Gemma3Config):
            model = Gemma3(config)
        else:
            got = type(config).__name__
            raise UserError(f"{checkpoint.path}: config must be a PaliGemmaConfig or a Gemma3Config, got {got}")
    there = {_hub_name(name): name for name in checkpoint.shapes}
    wanted = model.state_dict()
    sources = {name: same(there.get(name, name)) for name in wanted}
    for head in ("lm_head.weight", "language_model.lm_head.weight"):
        checkpoint = gemma_files.Tied(checkpoint, there.get(_TABLE, _TABLE), head)
    model.load_state_dict(collect(checkpoint, wanted, sources, dtype), assign=True)
    return model


def _hub_name(name: str) -> str:
    """As the released files name this tensor."""
    short = name.removeprefix("model.")
    if not short.startswith(_PARTS):
        return name
    part, rest = short.split(".", 1)
    if part == "vision_tower" and not rest.startswith("vision_model."):
        rest = f"vision_model.{rest}"
    if part == "language_model" and not rest.startswith(("model.", "lm_head.")):
        rest = f"model.{rest}"
    return f"{part}.{rest}"


def from_json(entries: Mapping[str, Any], where: object = "config.json") -> PaliGemmaConfig | Gemma3Config:
    """The configuration that a Hugging Face config.json describes.

    Args:
        entries: the file's contents, with the names of old or of new versions of transformers; what is left out has
            the value that transformers gives it.
        where: what errors call the file.

    Raises:
        UserError: another model, an entry that these models do not have or of a wrong type, or an impossible size.
    """
    from vlkern.interop.transformers import vision_from_json

    kind = entries.get("model_type")
    if kind not in _CLASSES:
        raise UserError(f"{where}: model_type must be one of {', '.join(map(repr, _CLASSES))}, got {kind!r}")
    parts: dict[str, Mapping[str, Any]] = {}
    for name in ("vision_config", "text_config"):
        part = entries.get(name)
        if not isinstance(part, Mapping):
            raise UserError(f"{where}: {name} must be an object, got {part!r}")
        parts[name] = part
    vision = vision_from_json(parts["vision_config"], f"{where}: vision_config", head=False)
    text = dict(parts["text_config"])
    text.setdefault("model_type", _LANGUAGES[kind][0])
    if text["model_type"] not in _LANGUAGES[kind]:
        expected = " or ".join(map(repr, _LANGUAGES[kind]))
        raise UserError(f"{where}: text_config: model_type must be {expected}, got {text['model_type']!r}")
    if kind == "paligemma":  # transformers says so of the prefix; the answer is causal all the same
        text.pop("use_bidirectional_attention", None)
    language = gemma_files.from_json(text, f"{where}: text_config")
    try:
        if kind == "paligemma":
            token = entries.get("image_token_index", 256_000)
            return PaliGemmaConfig(vision, replace(language, whole_prefix=language.version == 2), token, token)
        count, token, start, end = (entries.get(name, default) for name, default in _GEMMA3.items())
        return Gemma3Config(vision, language, count, token, start, end, sampled_vocabulary=token)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_json(c: PaliGemmaConfig | Gemma3Config, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json with which transformers' model reads the model's state dict.

    Raises:
        ValueError: transformers has no model with this combination of options.
    """
    from vlkern.interop.transformers import vision_to_json

    kind = "paligemma" if isinstance(c, PaliGemmaConfig) else "gemma3"
    if c.image_token != c.sampled_vocabulary:
        raise ValueError(
            f"sampled_vocabulary must be the placeholder, {c.image_token}, to be saved, got {c.sampled_vocabulary}"
        )
    text = gemma_files.to_json(replace(c.language, whole_prefix=False), dtype)
    for name in ("architectures", "dtype"):
        del text[name]
    vision = vision_to_json(c.vision, "siglip")
    entries: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": c.image_token,
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": vision | {"vision_use_head": False},
    }
    if isinstance(c, Gemma3Config):
        sizes = (c.image_tokens, c.image_token, c.start_of_image, c.end_of_image)
        return entries | dict(zip(_GEMMA3, sizes, strict=True))
    if c.language.whole_prefix != (c.language.version == 2):
        raise ValueError("whole_prefix must be true of a Gemma 2 and of no other to be saved, as transformers has it")
    del text["use_bidirectional_attention"]
    entries["vision_config"]["projection_dim"] = c.language.width
    return entries | {"hidden_size": c.language.width, "projection_dim": c.language.width}
