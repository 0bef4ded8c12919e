"""NaViT's config.json: to and from configurations. Nobody else's models have these names, so the format is our own."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlkern.errors import UserError
from vlkern.models import state
from vlkern.models.navit import Navit, NavitClassifier, NavitConfig, TextConfig, VisionConfig

MODEL_TYPE = "navit"
#: What `load_pretrained` says of options for other models.
WHAT = "a NaViT, for pictures of any shape"


def knows(names: Collection[str], entries: Mapping[str, Any]) -> bool:
    """Whether config.json says so."""
    return entries.get("model_type") == MODEL_TYPE


def to_json(model: Navit | NavitClassifier) -> dict[str, Any]:
    """What config.json says: the sizes of the towers, or of the image tower and the number of classes."""
    entries = {"model_type": MODEL_TYPE, "architectures": [type(model).__name__]}
    if isinstance(model, Navit):
        return {**entries, **dataclasses.asdict(model.config)}
    return {**entries, "vision": dataclasses.asdict(model.config), "classes": model.classes}


def build(entries: dict[str, Any], file: Path) -> Navit | NavitClassifier:
    """The model that config.json describes; shapes and no numbers when called under `shapes_only`.

    Raises:
        UserError: an entry is missing, left over or out of range. Names the file.
    """
    given = set(entries) - {"model_type", "architectures"}
    if given not in ({"vision", "text"}, {"vision", "classes"}):
        raise UserError(
            f"{file}: expected vision and text, or vision and classes, got {', '.join(sorted(given)) or '-'}"
        )
    try:
        vision = VisionConfig(**entries["vision"])
        if "text" in entries:
            return Navit(NavitConfig(vision, TextConfig(**entries["text"])))
        return NavitClassifier(vision, entries["classes"])
    except (TypeError, ValueError) as error:  # TypeError: an entry that no configuration has, or lacks
        raise UserError(f"{file}: no sizes of a NaViT ({error})") from error


def load(
    checkpoint: state.Checkpoint, entries: dict[str, Any], file: Path, config: object, dtype: torch.dtype | None
) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote, on the CPU.

    Args:
        checkpoint: its tensors.
        entries: its config.json.
        file: where that lies, for messages.
        config: must be None, since config.json says everything.
        dtype: of the parameters; None keeps the file's.

    Raises:
        UserError: config.json or the tensors are not those of a NaViT.
        ValueError: a config is given.
    """
    if config is not None:
        raise ValueError(f"config must be None: {checkpoint.path} is {WHAT}")
    return state.load_same(checkpoint, lambda: build(entries, file), dtype)
