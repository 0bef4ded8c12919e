"""Small folders: a trained codec without what files of the level `integer` never need.

    config.json            as it is
    transforms.safetensors analysis, synthesis and gains in float16
    integer.safetensors    as it is

The transformer in floating point, most of a codec's bytes, stays behind, and with it files of the level `float`.
"""

import json
import shutil
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save

from vlkern._files import write_file
from vlkern.codec.integer.weights import FILE
from vlkern.errors import UserError
from vlkern.models import picture_files
from vlkern.models.m2t import M2T
from vlkern.models.pretrained import load_pretrained
from vlkern.models.state import load_same, open_checkpoint

TRANSFORMS = "transforms.safetensors"


def _transforms(model: M2T) -> M2T:
    """The model without its transformer."""
    del model.entropy
    return model


def pack(model: Path, folder: Path) -> None:
    """Write the small folder.

    Args:
        model: folder of `vlkern train m2t` with the whole numbers of `python -m vlkern.codec.integer`.
        folder: is made if need be.

    Raises:
        UserError: the first holds no M2T or no whole numbers, or the second cannot be written.
    """
    codec = load_pretrained(model, dtype=torch.float32)
    if not isinstance(codec, M2T):
        raise UserError(f"{model}: expected an M2T, got {type(codec).__name__}")
    if not (model / FILE).is_file():
        raise UserError(f"{model}: expected {FILE}, make it with `python -m vlkern.codec.integer`")
    tensors = {name: tensor.half().contiguous() for name, tensor in _transforms(codec).state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / "config.json", folder / "config.json")
        shutil.copyfile(model / FILE, folder / FILE)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    write_file(folder / TRANSFORMS, save(tensors))


def unpack(folder: Path) -> M2T:
    """The model of a small folder in float32, without its transformer.

    Raises:
        UserError: it is damaged.
    """
    file = folder / "config.json"
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error})") from error
    checkpoint = open_checkpoint(folder / TRANSFORMS)
    build = lambda: _transforms(cast(M2T, picture_files.build(entries, file)))  # noqa: E731
    return cast(M2T, load_same(checkpoint, build, torch.float32))
