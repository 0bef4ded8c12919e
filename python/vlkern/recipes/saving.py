"""What a run ends with: a folder with the model and its tokenizer, whole or as it was before."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlkern import models
from vlkern._files import reason
from vlkern.errors import UserError
from vlkern.interop import transformers  # noqa: F401  what it needs: after days the package may have been replaced


def save(family: Callable[[Any], Any], config: Any, weights: dict[str, torch.Tensor], words: Any, folder: Path) -> None:
    """Write what `load_pretrained(folder)` and the loader of the tokenizer read.

    Args:
        family: makes the model of a configuration.
        config: of the model.
        weights: its full state dict.
        words: the tokenizer; has `save(folder)`.
        folder: is replaced.

    Raises:
        UserError: it cannot be written.
    """
    with torch.device("meta"):
        model = family(config)
    model.load_state_dict(weights, assign=True)
    part = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        models.save_pretrained(model, part)
        words.save(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{folder}: cannot write the model ({reason(error)})") from error
